"""The values that options take as text: budgets, blocks, spans and method options."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from tokcompile.budget import Flops, KeepRate, Remove, Schedule, Share, Tokens
from tokcompile.errors import BudgetError, ExportError, InputError, MethodError
from tokcompile.recipe import get_method

BUDGETS = """\
  0.5                  half the patch tokens are left after the last reduction
  tokens:98            98 patch tokens are left
  flops:0.7            at most 70 % of the FLOPs are left
  keep-rate:0.7        every single reduction keeps 70 %
  remove:16[:INFLECT]  16 tokens fewer in every block; INFLECT from -1 (more early) to 1 (more late)
  schedule:3=98,6=60   98 tokens are left after block 3, 60 after block 6"""


def budget(text: str) -> Any:
    """A budget from one of the forms in `BUDGETS`. Raises: BudgetError."""
    kind, colon, rest = text.partition(":")
    if not colon:
        return share(text)
    makers: dict[str, Callable[[str], Any]] = {
        "share": share,
        "tokens": lambda t: Tokens(int(t)),
        "flops": lambda t: Flops(float(t)),
        "keep-rate": lambda t: KeepRate(float(t)),
        "remove": remove,
        "schedule": schedule,
    }
    if kind not in makers:
        raise BudgetError(f"budget {text!r} is none of\n{BUDGETS}")
    try:
        return makers[kind](rest)
    except BudgetError:
        raise
    except ValueError:
        raise BudgetError(f"budget {text!r}: {kind} does not take {rest!r}; a budget is one of\n{BUDGETS}") from None


def share(text: str) -> Share:
    try:
        value = float(text)
    except ValueError:
        raise BudgetError(f"budget {text!r} is none of\n{BUDGETS}") from None
    if value > 1 and value == int(value):
        raise BudgetError(f"budget {text} is not a share in (0, 1]; for {int(value)} tokens write tokens:{int(value)}")
    return Share(value)


def remove(text: str) -> Remove:
    r, colon, inflect = text.partition(":")
    return Remove(int(r), float(inflect) if colon else 0.0)


def schedule(text: str) -> Schedule:
    pairs = [part.split("=") for part in text.split(",")]
    if any(len(p) != 2 for p in pairs):
        raise ValueError(text)
    return Schedule({int(block): int(k) for block, k in pairs})


def blocks(text: str) -> list[int | str]:
    """ "3,6,blocks.9" as [3, 6, "blocks.9"]."""
    parts = [p.strip() for p in text.split(",")]
    if not all(parts):
        raise InputError(f"--where {text!r} is not a list of blocks such as 3,6,9 or blocks.3,blocks.6")
    return [int(p) if p.lstrip("-").isdecimal() else p for p in parts]


def span(text: str) -> tuple[int, int]:
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise InputError(f"--span {text!r} is not START:STOP, such as 5:30 for the positions 5 to 29")
    return int(start), int(stop)


def profile(text: str) -> tuple[int, int, int]:
    """ "1:4:8" as (1, 4, 8)."""
    parts = text.split(":")
    if len(parts) != 3 or not all(p.isdecimal() for p in parts):
        raise InputError(f"--profile {text!r} is not MIN:BEST:MAX, such as 1:4:8 for batches of 1 to 8")
    return int(parts[0]), int(parts[1]), int(parts[2])


def options(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; values are numbers, true, false, null or text. Raises: MethodError."""
    out: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key):
            raise MethodError(f"the method option {text!r} is not KEY=VALUE, such as -o pivots=8")
        try:
            out[key] = json.loads(value.lower() if value in ("True", "False", "None") else value)
        except json.JSONDecodeError:
            out[key] = value
    return out


def reduction(method: str, left: str | None, where: str | None, given: Sequence[str]) -> dict[str, Any]:
    """The arguments of `tokcompile.optimize` for a method, its budget, blocks and options.

    Raises: MethodError, BudgetError, InputError.
    """
    recipe, own = get_method(method), options(given)
    recipe.with_options(own)  # refuses what is wrong before any work is done
    made = {"method": recipe, "budget": budget(left or "0.5"), **own}
    return made | ({"where": blocks(where)} if where else {})


def check_folder(path: str, overwrite: bool) -> None:
    """Refuses a folder that could not be made, before any work is done; those that it is in may be missing.

    Raises: ExportError.
    """
    if os.path.lexists(path) and not overwrite:
        raise ExportError(f"{path} is there already; choose another name, or pass --overwrite")
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise ExportError(f"cannot write {path}: {parent} is no folder")
    if not os.access(parent, os.W_OK):
        raise ExportError(f"cannot write {path}: the folder {parent} is read-only")


def check_writable(*paths: str | None) -> None:
    """Refuses files that could not be written, before any work is done. Raises: ExportError."""
    for path in filter(None, paths):
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path):
            raise ExportError(f"{path} is a folder; give a file name")
        if not os.path.isdir(folder):
            raise ExportError(f"cannot write {path}: there is no folder {folder}")
        if not os.access(folder, os.W_OK):
            raise ExportError(f"cannot write {path}: the folder {folder} is read-only")
