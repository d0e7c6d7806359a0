"""FLOPs as a budget: the largest token counts whose cost is no more than a share of the original's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Graph

from tokcompile.errors import BudgetError
from tokcompile.passes.cost import terms, total
from tokcompile.passes.plan import Reduction
from tokcompile.passes.rewrite import Rewritten
from tokcompile.passes.schedule import apportion, reductions
from tokcompile.passes.slots import Slot
from tokcompile.passes.tokens import Space
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere
from tokcompile.steps import same_number


def first_tokens(tokens: Tokens, site: Site) -> Keep:
    """A stand-in method for costing: it keeps the first k tokens."""
    return Keep(torch.arange(site.k, device=tokens.x.device).expand(tokens.x.shape[0], -1))


STAND_IN = Recipe("probe", first_tokens, together=anywhere)


def solve_flops(
    graph: Graph,
    recipe: Recipe,
    probe: Callable[[Recipe, Sequence[Reduction]], tuple[Rewritten, list[Space]]],
    to_nothing: Callable[[Slot], bool],
    of_stream: list[list[Slot]],
    counts: Callable[[int, list[Slot]], list[int]],
    ratio: float,
) -> list[list[int]]:
    """The counts of the largest budget whose FLOPs do not exceed `ratio` of the original, exactly, over this schedule.

    One rewrite with a stand-in method types every axis; other counts are then only other sizes of the same products. probe:
    rewrites with such a method at some places, behind the reductions that are there already, and gives what it left first.
    to_nothing: whether a schedule may end there without any token.
    """
    original = total(terms(graph, {}))
    placed: list[Reduction] = []
    for slots in of_stream:
        n, many = slots[0].n, len(slots[0].spans)
        placed += reductions([max(many, n - many * (i + 1)) for i in range(len(slots))], slots, STAND_IN, {})
    placed.sort(key=lambda r: r.block)
    probed, spaces = probe(STAND_IN, placed)
    cost = terms(graph, probed.labels, probed.recovered, probed.mixed)
    by_block = {(r.block, r.prefix): space for r, space in zip(placed, spaces)}

    def share(final: int) -> float:
        wanted: dict[Space, int] = {}
        for slots in of_stream:
            current = list(slots[0].left)
            for slot, k in zip(slots, counts(final, slots)):
                current = apportion(k, current)
                for k_span, (start, _) in zip(current, slot.spans):
                    space = by_block.get((slot.block.index, slot.token(start)))
                    if space is not None:
                        wanted[space] = k_span
        return total(cost, wanted) / original

    every = [slot for slots in of_stream for slot in slots]
    low, high = 0 if to_nothing(every[0]) else len(every[0].spans), every[0].n
    if share(low) > ratio and recipe.steps.counts is same_number:
        low = high - high * len(every)  # a larger r than would last to the end: every step takes what one step can
    if share(low) > ratio:
        left = counts(low, of_stream[0])[-1]
        raise BudgetError(
            f"Flops({ratio}) cannot be met: even with {left} token{'s' * (left != 1)} left {share(low):.3f} of the FLOPs "
            f"remain (reductions at blocks {[s.block.index for s in every]}); reduce earlier (where=...) or raise the budget"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share(middle) <= ratio else (low, middle - 1)
    return [counts(low, slots) for slots in of_stream]
