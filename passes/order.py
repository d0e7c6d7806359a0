"""Order: tokens that a model puts in another order by a constant (windows undone), after some of them are gone. Some of the
original ones may be missing in the order, where none of them is among those that are left, or where it is known how many."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import Node

from tokcompile.passes.crop import Hidden
from tokcompile.passes.gather import Gatherer, once
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.tokens import Atom, Seq, Space, extent

Parts = tuple[int | Space, ...]
LEAST_SHOWN = 0.25  # of the tokens that reductions chose from: what is picked out of fewer is no map without its padding


class CutOff(Exception):
    """Tokens are missing in an order that may be among those that are left. hidden: those that are missing of each sample."""

    def __init__(self, hidden: Hidden):
        super().__init__(hidden)
        self.hidden = hidden


def permuted(g: Gatherer, x: Node, atoms: list[Atom], at: int, order: Tensor, origin: Node | None) -> tuple[Node, Seq] | None:
    """x with the tokens of atom `at` in another order, `order`: (m,) old positions; None where some are in it twice, or
    few at all.

    Runs of parts that only change places among themselves become one space, its tokens in ascending order.
    Raises: CutOff.
    """
    seq = atoms[at]
    assert isinstance(seq, Seq)
    shown = torch.zeros(seq.old, dtype=torch.bool).index_fill(0, order, True)
    missing = unforeseen(g, seq, shown)
    if int(shown.sum()) < len(order) or missing is None:
        return None
    if missing:
        raise CutOff(missing)
    pieces, parts = [], []
    begin = 0
    for group, start, mine in closed_runs(seq, order, shown):
        count = Seq(group).new
        piece = g.b.emit(aten.slice.Tensor, x, at, begin, begin + count)
        begin += count
        if len(group) == 1 and torch.equal(mine, torch.arange(start, start + Seq(group).old)):
            parts.append(group[0])
        elif len(mine):
            space, rank = laid_out(g, group, mine - start)
            piece, _ = g.pick(piece, [*atoms[:at], Seq(group), *atoms[at + 1 :]], at, rank, space.k, origin)
            parts.append(space)
        else:
            continue
        pieces.append(piece)
    return g.b.cat(pieces, at), Seq(tuple(parts))


def unforeseen(g: Gatherer, seq: Seq, shown: Tensor) -> Hidden | None:
    """The tokens that are missing of each sample, where a reduction of some did not know; () where all is well, None where
    too few are there."""
    found: dict[Space, dict[int, tuple[int, ...]]] = {}
    start = chosen = there = 0
    for part in seq.parts:
        size, _ = extent(part)
        gone = ~shown[start : start + size]
        start += size
        if isinstance(part, int):
            continue
        chosen, there = chosen + size, there + size - int(gone.sum())
        known = part.hidden is not None and bool((part.hidden == gone).all())
        if gone.any() and not gone.all() and not known:
            space, samples = g.sampled(part)
            found.setdefault(space, {}).update(dict.fromkeys(samples, tuple(gone.nonzero().flatten().tolist())))
    if not found:
        return ()
    if there < LEAST_SHOWN * chosen:
        return None
    space, rows = next(iter(found.items()))
    assert space.index is not None
    return tuple(rows.get(i, ()) for i in range(shape(space.index)[0]))


def laid_out(g: Gatherer, group: Parts, order: Tensor) -> tuple[Space, Node]:
    """Parts as one space after their root tokens were put in `order`, and (B, k) the rank of its tokens before that."""
    seq = Seq(group)
    place = len(order) + torch.arange(seq.old)  # what is missing comes last
    place[order] = torch.arange(len(order))  # where each root token stands now
    gone = place >= len(order)
    olds, news = zip(*map(extent, group))
    edges = [0, *accumulate(olds)]
    most = tuple(int((~gone[a:b]).sum()) for a, b in zip(edges, edges[1:]))
    count = sum(map(min, news, most))
    table, moved = g.b.constant(place, "places"), g.b.constant(order, "order")
    whole = g.index(seq.old, seq)
    flat = g.b.emit(aten.index_select.default, table, 0, g.b.emit(aten.reshape.default, whole, [-1]))
    index, ranks = g.b.unpack(g.b.emit(aten.sort.default, g.reshape(flat, list(shape(whole))), 1))
    rank = ranks
    if count < seq.new:
        index, rank = (g.b.emit(aten.slice.Tensor, v, 1, 0, count) for v in (index, ranks))

    def assign() -> Node:
        """The slot of each root token, in the new order of both."""
        slot = g.b.unpack(g.b.emit(aten.sort.default, ranks, 1))[1]
        before = g.b.emit(aten.index_select.default, g.assign(seq), 1, moved)
        return g.b.emit(aten.gather.default, slot, 1, before)

    def derive(chosen: Callable[[Space], Tensor]) -> Tensor:
        own = [torch.arange(p)[None] if isinstance(p, int) else chosen(p) for p in group]
        batch = max(one.shape[0] for one in own)
        return place[torch.cat([(one + e).expand(batch, -1) for one, e in zip(own, edges)], 1)].sort(1).values[:, :count]

    tracked = any(s.size is not None for s in seq.spaces)
    size = g.b.emit(aten.gather.default, g.sizes(seq), 1, rank) if tracked else None
    name = "_".join(s.name for s in seq.spaces) or "order"
    proportional = any(s.proportional for s in seq.spaces)
    space = Space(f"{name}_p", len(order), count, None, index, once(assign), size, proportional)
    space.sources, space.derive = group, derive
    space.most = most if gone.any() else ()
    space.renumber = any(s.renumber for s in seq.spaces)
    return space, rank


def closed_runs(seq: Seq, order: Tensor, shown: Tensor) -> list[tuple[Parts, int, Tensor]]:
    """The shortest runs of parts among which tokens change places, the old position that each starts at, and its part of the
    order."""
    runs: list[tuple[Parts, int, Tensor]] = []
    group: list[int | Space] = []
    start = stop = done = 0
    for part in seq.parts:
        group.append(part)
        stop += extent(part)[0]
        mine = order[done : done + int(shown[start:stop].sum())]
        if bool(((mine >= start) & (mine < stop)).all()):
            runs.append((tuple(group), start, mine))
            group, start, done = [], stop, done + len(mine)
    return runs
