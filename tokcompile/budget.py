"""How many tokens to keep, said in one of several ways; all are fixed at compile time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokcompile.errors import BudgetError


@dataclass(frozen=True)
class Share:
    """Share of the patch tokens left after the last reduction, in (0, 1]; a bare float means this."""

    share: float

    def __post_init__(self) -> None:
        check_share(self.share, "budget")


@dataclass(frozen=True)
class Tokens:
    """Number of patch tokens left after the last reduction; 0 drops all of them, where text is left in a language model."""

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0:
            raise BudgetError(f"Tokens(k) takes a non-negative integer, not {self.k!r}")


@dataclass(frozen=True)
class Flops:
    """Share of the original FLOPs, in (0, 1]; the token counts are solved for over the method's own schedule."""

    ratio: float

    def __post_init__(self) -> None:
        check_share(self.ratio, "Flops(ratio)")


@dataclass(frozen=True)
class KeepRate:
    """Share kept by each single reduction, with the method's published rounding (EViT's kappa, PiToMe's ratio)."""

    rate: float

    def __post_init__(self) -> None:
        check_share(self.rate, "KeepRate(rate)")


@dataclass(frozen=True)
class Remove:
    """ToMe's r: tokens removed in each block; inflect -1 removes more early and none at the end, 1 the reverse."""

    r: int
    inflect: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 0:
            raise BudgetError(f"Remove(r) takes a non-negative integer, not {self.r!r}")
        if not isinstance(self.inflect, (int, float)) or not -1 <= self.inflect <= 1:
            raise BudgetError(f"Remove(inflect={self.inflect!r}) is outside [-1, 1]")

    def per_block(self, blocks: int) -> list[int]:
        """r of each block, as tome/utils.py defines it."""
        least = int(self.r * (1.0 - self.inflect))
        step = (2 * self.r - least - least) / max(blocks - 1, 1)
        return [int(least + step * i) for i in range(blocks)]


@dataclass(frozen=True)
class Schedule:
    """Tokens left after each named block: {block: k}; 0 as in `Tokens`."""

    counts: Mapping[int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.counts, Mapping):
            raise BudgetError(f"Schedule takes {{block: k}}, not {self.counts!r}")
        if not self.counts:
            raise BudgetError("Schedule({block: k}) is empty")
        for block, k in self.counts.items():
            if bool in (type(block), type(k)) or not isinstance(block, int) or not isinstance(k, int) or k < 0:
                raise BudgetError(f"Schedule maps block numbers to token counts, not {block!r}: {k!r}")


def as_budget(value: Any) -> Share | Tokens | Flops | KeepRate | Remove | Schedule:
    """A budget object from what the user gave. Raises: BudgetError."""
    if isinstance(value, (Share, Tokens, Flops, KeepRate, Remove, Schedule)):
        return value
    if isinstance(value, Mapping):
        return Schedule(dict(value))
    if isinstance(value, int) and value > 1:
        raise BudgetError(f"budget {value} is not a share in (0, 1]; for {value} tokens write Tokens({value})")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Share(float(value))
    raise BudgetError(
        f"budget {value!r} is not a share in (0, 1], nor Tokens(k), Flops(ratio), KeepRate(rate), Remove(r) or "
        "Schedule({block: k})"
    )


def check_share(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise BudgetError(f"{name} must be a share in (0, 1], not {value!r}")


def to_data(budget: Any) -> dict[str, Any]:
    """JSON form: {"kind": "Flops", "ratio": 0.7}."""
    data = dict(vars(budget))
    if isinstance(budget, Schedule):
        data["counts"] = {str(b): k for b, k in budget.counts.items()}
    return {"kind": type(budget).__name__, **data}
