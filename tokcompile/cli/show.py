"""What the commands print: tables with rich on a terminal, plain columns elsewhere, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """Rows of text under their headers; `right` names the columns of numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[str] = ()
    title: str = ""

    def __str__(self) -> str:
        lines = [list(self.headers), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]
        out = []
        for line in lines:
            cells = [c.rjust(w) if h in self.right else c.ljust(w) for c, w, h in zip(line, widths, self.headers, strict=True)]
            out.append("  ".join(cells).rstrip())
        return "\n".join(([self.title] if self.title else []) + out)


@dataclass
class Result:
    """What a command found: `data` for --json, `parts` for people, and the exit code."""

    data: Any = None
    parts: Sequence[Any] = field(default_factory=list)
    code: int = 0


def emit(result: Result, as_json: bool) -> None:
    """Prints one result on stdout."""
    if as_json:
        print(json.dumps(result.data, indent=2))
        return
    for part in result.parts:
        if not (isinstance(part, Table) and rich_table(part)):
            print(part)


def rich_table(table: Table) -> bool:
    """Prints the table with rich; False where there is no terminal or no rich."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return False
    rich = RichTable(title=Text(table.title) if table.title else None, title_justify="left")
    for header in table.headers:
        rich.add_column(Text(header), justify="right" if header in table.right else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*map(Text, row))
    Console().print(rich)
    return True


def note(text: str) -> None:
    """Says on stderr what is going on."""
    print(f"tokcompile: {text}", file=sys.stderr, flush=True)
