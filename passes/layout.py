"""Layout: what the graph turned out to demand of the tokens while it was rewritten, for another try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.crop import Hidden, can_choose, joint_hidden
from tokcompile.passes.tokens import Space

if TYPE_CHECKING:
    from tokcompile.passes.find import Structure
    from tokcompile.passes.plan import Reduction
    from tokcompile.passes.regroup import Grouping
    from tokcompile.passes.rewrite import Rewriter

LARGEST_UNIT = 16  # a view that splits tokens into larger groups is a grid or a window, not a merger
MOST_SEGMENTS = 256  # images or windows in one sequence, each reduced by itself


@dataclass(frozen=True)
class Layout:
    """What the graph was found to demand: groups of `unit` rows stay together, and `cuts` (in groups) part the tokens
    into segments that are never mixed (images or windows in one sequence), each with its own quota. regrouped: the tokens were
    put into the order of their groups, which may begin after a class token. sample: the length of each of several samples
    that the sequence is parted into later, as a batch; 0 for none. hidden: the tokens of each sample that are cut off later.
    final: whether this is the last try, in which tokens are given back where no layout helped."""

    unit: int = 1
    cuts: tuple[int, ...] = ()
    regrouped: bool = False
    sample: int = 0
    hidden: Hidden = ()
    final: bool = False


class NeedsLayout(Exception):
    """The rewrite showed that tokens must be kept in groups or in segments; `error` is what stands if that does not help."""

    def __init__(self, layout: Layout, error: Exception):
        super().__init__(layout)
        self.layout, self.error = layout, error


def with_layout(attempt: Callable[[Layout], Any], give_back: bool) -> Any:
    """Runs an attempt, again with the groups or segments that it turned out to need, as long as that is news. give_back:
    whether tokens may be given back anywhere if that does not help."""
    tried, layout = [Layout()], Layout()
    while True:
        try:
            return attempt(layout)
        except NeedsLayout as needed:
            layout, error = joint(layout, needed.layout), needed.error
            if layout not in tried:
                tried.append(layout)
                continue
        except UnsupportedGraph as unsupported:
            error = unsupported
        if give_back and len(tried) > 1 and isinstance(error, UnsupportedGraph):
            return attempt(Layout(final=True))
        raise error


def joint(layout: Layout, needed: Layout) -> Layout:
    """A layout that does both; cuts found before tokens were regrouped are of no use after it."""
    if needed.regrouped and not layout.regrouped:
        return needed
    cuts, sample = {*layout.cuts, *needed.cuts}, needed.sample or layout.sample
    hidden = joint_hidden(layout.hidden, needed.hidden)
    if sample:  # every sample is cut like the others
        cuts = {first + c % sample for c in cuts for first in range(0, max(cuts) + 1, sample)} - {0}
    return Layout(max(layout.unit, needed.unit), tuple(sorted(cuts)), layout.regrouped, sample, hidden)


def demanded(
    rewriter: Rewriter, structure: Structure, groupings: Sequence[Grouping], chosen: Sequence[Reduction]
) -> Layout | None:
    """What another try should do: keep tokens that go first, where the model cuts them off later; groups in an order of their
    own, where the grid is rearranged into them; groups, where a view tears a sequence without prefix into small ones; segments,
    where slices cut the tokens."""
    placed = [s for many in rewriter.splices.values() for s in many]
    news = [s for s in placed if can_choose(s.recipe) and joint_hidden(s.hidden, rewriter.hidden) != s.hidden]
    if chosen[0].unit == 1 and news:
        return Layout(hidden=rewriter.hidden)
    met = [n for n in rewriter.met if not rewriter.behind_blocks(n)] or rewriter.met
    if met:
        stages = [structure.blocks[r.block].stage for r in chosen]
        for grouping in groupings:
            if met[0] in grouping.inside and any(s is grouping.stage for s in stages):
                return Layout(grouping.unit, (), True)
    grids = [s.grid or () for s in rewriter.structure.stages]
    for split in rewriter.splits:
        unit = split.unit
        if unit and 1 < unit <= LARGEST_UNIT and chosen[0].unit == 1 and not any(unit in grid for grid in grids):
            whole = not any(edge % unit for r in chosen if r.block == chosen[0].block for edge in (r.prefix, r.n, r.suffix))
            if whole and all(isinstance(p, Space) for p in split.seq.parts):
                return Layout(unit)
    if 0 < len(rewriter.cuts) < MOST_SEGMENTS:
        return Layout(chosen[0].unit, tuple(sorted(rewriter.cuts)), sample=rewriter.sample)
    return None
