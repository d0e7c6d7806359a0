"""Mosaic: where a model lays the tokens of several tiles out as one map, with a newline token behind each row, this is
written as what it is: the tiles one after the other, then the newline tokens, put in another order by a constant. Tokens of
padding that the model cuts off the map are not in that order.

What the movement does is read off by running it on numbers, as in `tokcompile.passes.regroup`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.passes.attentions import SDPA, SOFTMAX
from tokcompile.passes.graph import aten, buffer, emitter, is_tensor, numel, packet, shape
from tokcompile.passes.memory import CASTS, reachable_from
from tokcompile.passes.movement import Movement, moves

REPEATS = {"aten.expand", "aten.repeat"}
TAKES = {"aten.index_select", "aten.index"}  # by a constant, which is no filler


@dataclass(frozen=True)
class Mosaic:
    """A node that holds rows of `source`, none of them twice, and some copies of the weight `filler`: in `order`, of the rows
    of the one and then the copies of the other."""

    node: Node
    source: Node
    filler: Node
    order: Tensor


def write_mosaics(gm: GraphModule) -> bool:
    """Rewrites all mosaics, in place; whether there were any."""
    found = mosaics(gm)
    for m in found:
        emit, (*lead, width) = emitter(gm, m.node), shape(m.source)
        rows = prod(lead)
        runs, places = apart(m.order, rows, tile_of(m.source))
        places = places.to(m.node.meta["val"].device)
        order = buffer(gm, f"_mosaic_{m.node.name}", places, m.node, persistent=False)
        tiles = emit(aten.reshape.default, m.source, [rows, width])
        newline = emit(aten.to.dtype, emit(aten.reshape.default, m.filler, [1, width]), m.source.meta["val"].dtype)
        pieces = []
        for start, stop, count in runs:
            pieces.append(tiles if stop - start == rows else emit(aten.slice.Tensor, tiles, 0, start, stop))
            pieces += [emit(aten.expand.default, newline, [count, width])] if count else []
        joined = emit(aten.cat.default, pieces, 0)
        new = emit(aten.reshape.default, emit(aten.index_select.default, joined, 0, order), list(shape(m.node)))
        m.node.replace_all_uses_with(new)
    gm.graph.eliminate_dead_code()
    return bool(found)


def tile_of(source: Node) -> int:
    """How many tokens each tile has; their axes are all but the first and the last."""
    return prod(shape(source)[1:-1] or shape(source)[:-1])


def apart(order: Tensor, rows: int, tile: int) -> tuple[list[tuple[int, int, int]], Tensor]:
    """(start, stop, newline tokens) of runs of tiles that are laid out among themselves, so that the images of several prompts
    stay apart; and the order among these runs, the newline tokens behind each."""
    fills = order >= rows
    tokens, newlines = (~fills).cumsum(0), fills.cumsum(0)
    furthest = torch.where(fills, -1, order).cummax(0).values
    whole = (furthest // tile + 1) * tile  # up to the end of the last tile that any of these tokens is of
    shown = torch.zeros(rows, dtype=torch.long).index_fill(0, order[~fills], 1).cumsum(0)
    last = torch.ones(1, dtype=torch.bool)
    ends = (tokens > 0) & (shown[whole - 1] == tokens) & torch.cat([~fills[1:], last])  # where these are all that it shows
    run = ends.cumsum(0) - ends.long()
    stops, filled = whole[ends], newlines[ends]
    starts, before = (torch.cat([torch.zeros(1, dtype=torch.long), v[:-1]]) for v in (stops, filled))
    places = torch.where(fills, stops[run] + newlines - 1, order + before[run])
    return list(zip(starts.tolist(), stops.tolist(), (filled - before).tolist())), places


def mosaics(gm: GraphModule) -> list[Mosaic]:
    """The last nodes of movements of one tensor and one weight that hold rows of the tensor, which has gone through attention:
    before it no token is reduced, and a class token is none of a map."""
    origins: dict[Node, frozenset[Node]] = {}
    attentions = {n for n in gm.graph.nodes if packet(n) in {SDPA, *SOFTMAX}}
    attended = attentions | reachable_from(attentions)
    for node in gm.graph.nodes:
        given = [n for n in node.all_input_nodes if n.op != "get_attr" or packet(node) not in TAKES]
        of = frozenset().union(*(origins.get(n, {n}) for n in given))
        weights = {n for n in of if n.op == "get_attr"}
        repeats = packet(node) in REPEATS | CASTS and of == weights
        if (repeats or moves(node)) and len(weights) <= 1 and len(of) - len(weights) <= 1:
            origins[node] = of
    found = []
    for node, of in origins.items():
        if len(of) == 2 and is_tensor(node) and any(len(origins.get(user, ())) < 2 for user in node.users):
            filler, source = sorted(of, key=lambda n: n.op != "get_attr")
            if source not in attended:
                continue
            found.append(read(Movement(gm, source, list(origins)), node, filler))
    return [m for m in found if m is not None]


def read(movement: Movement, node: Node, filler: Node) -> Mosaic | None:
    """None where a node holds anything but whole rows, or rows that are no layout of tiles."""
    order = order_of_rows(movement, node, filler)
    if order is None or not shows_tiles(order, movement.source, node):
        return None
    return Mosaic(node, movement.source, filler, order)


def order_of_rows(movement: Movement, node: Node, filler: Node) -> Tensor | None:
    """Which rows a node holds, as in `Mosaic`; None where it holds anything but whole ones."""
    source = movement.source
    if min(len(shape(source)), len(shape(node))) < 2:
        return None
    *lead, width = shape(source)
    if shape(node)[-1] != width or shape(filler)[-1:] != (width,) or numel(filler) != width:
        return None
    numbers = torch.arange(prod(lead) * width).reshape(shape(source))
    made = movement.run(numbers, [node], {filler: -1 - torch.arange(width).reshape(shape(filler))})
    if len(made.get(node, ())) != 1:
        return None
    marks, columns = made[node][0].reshape(-1, width), torch.arange(width)
    fills = marks[:, 0] < 0
    row = marks[:, 0] // width
    whole = torch.where(fills[:, None], -1 - columns, row[:, None] * width + columns)
    return torch.where(fills, prod(lead) + fills.cumsum(0) - 1, row) if torch.equal(marks, whole) else None


def shows_tiles(order: Tensor, source: Node, node: Node) -> bool:
    """Whether rows in this order are the tokens of tiles: each of them once; more than one of each sequence, which may be its
    class token; and not a plain concatenation."""
    rows = prod(shape(source)[:-1])
    tokens = order[order < rows]
    if len(tokens.unique()) < len(tokens) or len(tokens) * tile_of(source) <= rows:
        return False
    samples = shape(source)[0] if shape(node)[:-2] == shape(source)[:-2] else 1
    return not plain_cat(order, rows, samples)


def plain_cat(order: Tensor, rows: int, samples: int) -> bool:
    """Whether each sample's tokens stand in their order, with copies of the filler at their ends or in one place between."""
    inside = order < rows
    tokens = order[inside]
    if len(order) % samples or not bool((tokens.diff() > 0).all()):
        return False
    inside = inside.reshape(samples, -1)
    return bool((inside.sum(1) * samples == len(tokens)).all() and (inside.long().diff(dim=1).abs().sum(1) <= 2).all())
