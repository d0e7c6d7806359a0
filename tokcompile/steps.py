"""At which blocks a method reduces, and how one budget spreads over them: compile-time integers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

from tokcompile.errors import MethodError

Blocks = Callable[[int], Sequence[int]]
Counts = Callable[[int, int, int], Sequence[int]]
Rate = Callable[[int, int, float, int], int]


def all_blocks(depth: int) -> tuple[int, ...]:
    return tuple(range(depth))


def at_fractions(*fractions: float) -> Blocks:
    """Blocks at these fractions of the depth: (1/4, 1/2, 3/4) are blocks 3, 6 and 9 of 12."""
    return lambda depth: tuple(sorted({min(int(depth * f + 1e-9), depth - 1) for f in fractions}))


def same_number(n: int, final: int, steps: int) -> tuple[int, ...]:
    """Each step removes the same number of tokens, give or take one (ToMe's constant r)."""
    return tuple(n - (n - final) * (i + 1) // steps for i in range(steps))


def same_share(n: int, final: int, steps: int) -> tuple[int, ...]:
    """Each step keeps the same share, rounded up; the last one lands on `final`. Before 0, as if 1 were to be left."""
    rate = (max(final, 1) / n) ** (1 / steps)
    counts = [min(n, max(final, ceil(n * rate ** (i + 1) - 1e-9))) for i in range(steps)]
    return (*counts[:-1], final)


def ceil_of_current(n: int, first: int, rate: float, step: int) -> int:
    return ceil(rate * n)


def floor_of_current(n: int, first: int, rate: float, step: int) -> int:
    return n - floor(n - n * rate)


def int_of_first(n: int, first: int, rate: float, step: int) -> int:
    """int(first * rate ** (step + 1)): the rule of JoakimHaurum/TokenReduction."""
    return min(n, int(first * rate ** (step + 1)))


@dataclass(frozen=True)
class Steps:
    """blocks: depth -> block numbers. counts: (n, final, steps) -> tokens left after each. rate: one step of `KeepRate`.

    language: the same as blocks in a language model's stack, where the published place differs there.
    """

    blocks: Blocks = all_blocks
    counts: Counts = same_number
    rate: Rate = ceil_of_current
    language: Blocks | None = None

    def at(self, depth: int, language: bool) -> Sequence[int]:
        """The blocks of a stack of that depth."""
        return (self.language if language and self.language is not None else self.blocks)(depth)


def every_block(counts: Counts = same_number, rate: Rate = floor_of_current) -> Steps:
    """A reduction in every block."""
    return Steps(all_blocks, counts, rate)


def stages(*fractions: float, counts: Counts = same_share, rate: Rate = ceil_of_current) -> Steps:
    """Reductions at fractions of the depth; by default blocks 3, 6 and 9 of 12."""
    return Steps(at_fractions(*(fractions or (1 / 4, 1 / 2, 3 / 4))), counts, rate)


def once(fraction: float, language: int | None = None) -> Steps:
    """One reduction, at a fraction of the depth; in a language model at the entrance of layer `language`."""
    return Steps(at_fractions(fraction), same_share, language=at_layer(language))


def last_block(language: int | None = None) -> Steps:
    """One reduction, in the last block: at its entrance are the features of layer -2, those that LLaVA takes from its
    tower; in a language model at the entrance of layer `language`, 0 being before it."""
    return Steps(lambda depth: (depth - 1,), same_share, language=at_layer(language))


def at_layer(layer: int | None) -> Blocks | None:
    return None if layer is None else (lambda depth: (min(layer, depth - 1),))


def layer_of(method: str, depth: int, layer: Any) -> int:
    """The block that an option `layer` means: its number, or a share of the depth. Raises: MethodError for any other value."""
    if not isinstance(layer, (int, float)) or not 0 <= layer < (depth if isinstance(layer, int) else 1):
        raise MethodError(f"{method}'s layer is one of the {depth} blocks, or a share of the depth below 1, not {layer!r}")
    return layer if isinstance(layer, int) else round(depth * layer)
