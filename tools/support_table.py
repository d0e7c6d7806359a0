"""Prints build/support.json, which tests/test_families.py writes, as a Markdown table: one row a family."""

import json
import sys
from pathlib import Path

ORDER = ("not yet", "no", "recover='anywhere'", "yes")


def row(name: str, batches: dict[str, dict[str, str]]) -> list[str]:
    """The worst verdict over the batch sizes, and its note."""
    worst = min(batches.values(), key=lambda result: ORDER.index(result["verdict"]))
    return [f"`{name.partition('/')[2]}`", worst["library"], worst["verdict"], worst["note"].replace("|", "\\|")]


def table(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """A Markdown table of all families in the order of the file, and a line that counts them."""
    rows = [row(name, batches) for name, batches in results.items()]
    lines = ["| family | library | supported | note |", "|---|---|---|---|", *(f"| {' | '.join(r)} |" for r in rows)]
    verdicts = [r[2] for r in rows]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in reversed(ORDER) if v in verdicts)
    return "\n".join([*lines, "", f"{len(rows)} families: {counts}."])


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "build/support.json")
    print(table(json.loads(source.read_text())))
