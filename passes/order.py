"""Order: tokens that a model puts in another order by a constant (windows undone), after some of them are gone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import Node

from tokcompile.passes.gather import Gatherer, once
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.tokens import Atom, Seq, Space

Parts = tuple[int | Space, ...]


def permuted(g: Gatherer, x: Node, atoms: list[Atom], at: int, order: Tensor, origin: Node | None) -> tuple[Node, Seq] | None:
    """x with the tokens of atom `at` in another order, `order`: (old,) old positions; None where it is no permutation.

    Runs of parts that only change places among themselves become one space, its tokens in ascending order.
    """
    seq = atoms[at]
    assert isinstance(seq, Seq)
    pieces, parts = [], []
    begin = start = 0
    for group, start, stop in closed_runs(seq, order):
        count = Seq(group).new
        piece = g.b.emit(aten.slice.Tensor, x, at, begin, begin + count)
        begin += count
        if len(group) == 1 and torch.equal(order[start:stop], torch.arange(start, stop)):
            parts.append(group[0])
        else:
            space, rank = laid_out(g, group, order[start:stop] - start)
            mine = [*atoms[:at], Seq(group), *atoms[at + 1 :]]
            piece, _ = g.pick(piece, mine, at, rank, count, origin)
            parts.append(space)
        pieces.append(piece)
    if begin != seq.new:
        return None
    return (g.b.emit(aten.cat.default, pieces, at) if len(pieces) > 1 else pieces[0]), Seq(tuple(parts))


def laid_out(g: Gatherer, group: Parts, order: Tensor) -> tuple[Space, Node]:
    """Parts as one space after their root tokens were put in `order`, and (B, k) the rank of its tokens before that."""
    seq = Seq(group)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))  # where each root token stands now
    table, moved = g.b.constant(place, "places"), g.b.constant(order, "order")
    whole = g.index(seq.old, seq)
    flat = g.b.emit(aten.index_select.default, table, 0, g.b.emit(aten.reshape.default, whole, [-1]))
    sorted_ = g.b.emit(aten.sort.default, g.reshape(flat, list(shape(whole))), 1)
    index, rank = g.b.unpack(sorted_)

    def assign() -> Node:
        """The slot of each root token, in the new order of both."""
        slot = g.b.unpack(g.b.emit(aten.sort.default, rank, 1))[1]
        before = g.b.emit(aten.index_select.default, g.assign(seq), 1, moved)
        return g.b.emit(aten.gather.default, slot, 1, before)

    def derive(chosen: Callable[[Space], Tensor]) -> Tensor:
        edges = [0, *accumulate(p if isinstance(p, int) else p.root_n for p in group)]
        own = [torch.arange(p)[None] if isinstance(p, int) else chosen(p) for p in group]
        batch = max(one.shape[0] for one in own)
        return place[torch.cat([(one + e).expand(batch, -1) for one, e in zip(own, edges)], 1)].sort(1).values

    tracked = any(s.size is not None for s in seq.spaces)
    size = g.b.emit(aten.gather.default, g.sizes(seq), 1, rank) if tracked else None
    name = "_".join(s.name for s in seq.spaces) or "order"
    proportional = any(s.proportional for s in seq.spaces)
    space = Space(f"{name}_p", seq.old, seq.new, None, index, once(assign), size, proportional)
    space.sources, space.derive = group, derive
    space.renumber = any(s.renumber for s in seq.spaces)
    return space, rank


def closed_runs(seq: Seq, order: Tensor) -> list[tuple[Parts, int, int]]:
    """The shortest runs of parts, with their old (start, stop), within which a permutation stays; fewer where it leaves."""
    runs: list[tuple[Parts, int, int]] = []
    group: list[int | Space] = []
    start = stop = 0
    for part in seq.parts:
        group.append(part)
        stop += part if isinstance(part, int) else part.root_n
        if torch.equal(order[start:stop].sort().values, torch.arange(start, stop)):
            runs.append((tuple(group), start, stop))
            group, start = [], stop
    return runs
