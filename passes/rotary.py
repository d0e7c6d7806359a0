"""Rotary tables for tokens that have several positions each (PPE): every channel is taken at one of them."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.gather import Gatherer, bands_of, samples
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.tokens import Seq, Space


def by_channel(g: Gatherer, x: Node, want: Seq, pairs: bool, rank: int, origin: Node | None) -> Node:
    """A table x: (.., L, d), as wide as a head or half of it, as (B, 1, .., L', d) of that rank: each channel at the position
    that its frequency's share of them names. pairs: see `channel_shares`."""
    x = g.reshape(x, [1] * (rank - len(shape(x))) + list(shape(x)))
    sizes, width, batch = shape(x), shape(x)[-1], samples(want)
    middle = [1] * (rank - 3)
    wide = g.b.emit(aten.expand.default, x, [batch, *middle, *sizes[-2:]])
    index = g.reshape(positions(g, want, width, pairs, origin), [batch, *middle, want.new, width])
    return g.b.emit(aten.gather.default, wide, -2, index)


def positions(g: Gatherer, want: Seq, width: int, pairs: bool, origin: Node | None) -> Node:
    """(B, L', width) positions, on the full axis, that each channel of each token is taken at."""
    key = want, width, pairs
    if key not in g.channels:
        pieces, start = [], 0
        for part in want.parts:
            if isinstance(part, Space):
                pieces += [g.shifted(per_channel(g, part, width, pairs, origin), start)] * (part.k > 0)
                start += part.root_n
            else:
                column = g.b.constant(torch.arange(start, start + part)[None, :, None], "column")
                pieces.append(g.b.emit(aten.expand.default, column, [samples(want), part, width]))
                start += part
        g.channels[key] = g.b.cat(pieces, 1)
    return g.channels[key]


def per_channel(g: Gatherer, space: Space, width: int, pairs: bool, origin: Node | None) -> Node:
    """(B, k, width) positions, among the root's tokens, that each channel of a table is taken at."""
    many = g.several(space)
    if many is None:
        return g.spread(g.within(space.root_n, space), width)
    share = channel_shares(width, shape(many)[2], bands_of(space), pairs, origin)
    return g.b.emit(aten.index_select.default, many, 2, g.b.constant(torch.tensor(share), "shares"))


def channel_shares(width: int, count: int, bands: tuple[int, ...], pairs: bool, origin: Node | None) -> list[int]:
    """Which of `count` positions each channel takes: every band of frequencies is cut into `count` parts.

    The channels hold the frequencies once, or twice: one run after the other, as in Llama, or each one in a pair.
    """
    total = sum(bands) if bands else width // 2
    if total == 0 or width not in (total, 2 * total):
        raise UnsupportedGraph(
            f"a rotary table of {width} channels does not hold {total} frequencies once or twice",
            origin,
            f"sections=(...) that add up to {width // 2}, as in the model's configuration",
        )
    share = [i * count // band for band in bands or (total,) for i in range(band)]
    return [s for s in share for _ in range(2)] if pairs else share * (width // total)
