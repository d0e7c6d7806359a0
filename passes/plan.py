"""Plan: the reductions of one program, as pure data that can be printed, saved, edited and passed back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from tokcompile.errors import PlanError

VERSION = 1
OUTPUTS = ("keep", "reduced")
RECOVER = ("end", "anywhere", "never")
SAY_IT_THERE = "leave them out, or edit the plan (plan.replace(...))"


@dataclass(frozen=True)
class Reduction:
    """One reduction. block: its number. place: "attention" (between attention and MLP) or "block" (at the entrance).

    n, k: tokens before and after, in units of `unit` neighbours. prefix, suffix: protected tokens around them, counted in
    the original sequence. path: the module path of the block, for the reader. method, options: where they are not the plan's.
    """

    block: int
    n: int
    k: int
    place: str = "attention"
    prefix: int = 0
    suffix: int = 0
    unit: int = 1
    path: str = ""
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n", "k", "prefix", "suffix", "unit"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise PlanError(f"the {name!r} of a reduction is {value!r}, not a whole number")
        only_mappings(self, "options")


@dataclass(frozen=True)
class Plan:
    """All reductions of one program; `print` it, `json()` and `Plan.from_json()` it, `replace()` its reductions.

    Example:
        >>> import tokcompile
        >>> plan = tokcompile.Plan("tome", (tokcompile.Reduction(block=3, n=196, k=98, prefix=1),))
        >>> tokcompile.Plan.from_json(plan.json()) == plan
        True
    """

    method: str
    reductions: tuple[Reduction, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    outputs: str = "keep"
    recover: str = "end"
    version: int = VERSION

    def __post_init__(self) -> None:
        only_mappings(self, "options", "budget")

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises: PlanError for anything that is not a plan of a version we know."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or "reductions" not in data or "method" not in data:
                raise PlanError("this is not a tokcompile plan: it has no 'method' and 'reductions'")
            if data.get("version") != VERSION:
                raise PlanError(f"plan version {data.get('version')!r} is not the version {VERSION} that this release reads")
            data["reductions"] = tuple(Reduction(**r) for r in data["reductions"])
            return cls(**data)
        except (json.JSONDecodeError, TypeError) as error:
            raise PlanError(f"this is not a tokcompile plan: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan file. Raises: PlanError."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_json(file.read())
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {os.fspath(path)!r}: {error}") from error

    def replace(self, **changes: Any) -> Plan:
        return replace(self, **changes)

    def __str__(self) -> str:
        names = list(dict.fromkeys([self.method, *(r.method for r in self.reductions if r.method)]))
        title = f"{' and '.join(names)}, {len(self.reductions)} reduction{'s' * (len(self.reductions) != 1)}"
        several = len(names) > 1
        rows = [
            f"  block {r.block:>3} {r.place:<9} {r.n:>5} -> {r.k:<5} {f'x{r.unit} ' * (r.unit > 1)}"
            f"{f'{r.method or self.method} ' * several}{r.path}"
            for r in self.reductions
        ]
        runs = [(row, len(list(same))) for row, same in groupby(rows)]  # tiles and windows are reduced alike
        return "\n".join([title, *(f"{row}{f'  ({count} times)' * (count > 1)}" for row, count in runs)])


def only_mappings(one: Plan | Reduction, *names: str) -> None:
    """Raises: PlanError where one of these fields is no mapping."""
    for name in names:
        if not isinstance(value := getattr(one, name), Mapping):
            raise PlanError(f"the {name!r} of a plan are {value!r}, not names with values")
