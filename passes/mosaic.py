"""Mosaic: where a model lays the tokens of several tiles out as one map, with a newline token behind each row, this is
written as what it is: the tiles one after the other, then the newline tokens, put in another order by a constant.

What the movement does is read off by running it on numbers, as in `tokcompile.passes.regroup`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tokcompile.passes.graph import aten, get_attr, is_tensor, packet, shape
from tokcompile.passes.memory import CASTS
from tokcompile.passes.movement import moves
from tokcompile.passes.placeholders import emitter

REPEATS = {"aten.expand", "aten.repeat"}


@dataclass(frozen=True)
class Mosaic:
    """A node that holds every row of `source` and some copies of the weight `filler`: in `order`, of the rows of the one and
    then the copies of the other."""

    node: Node
    source: Node
    filler: Node
    order: Tensor


def write_mosaics(gm: GraphModule) -> bool:
    """Rewrites all mosaics, in place; whether there were any."""
    found = [m for node, (source, filler) in ends(gm).items() if (m := read(gm, node, source, filler)) is not None]
    for m in found:
        emit, (*lead, width) = emitter(gm, m.node), shape(m.source)
        rows = prod(lead)
        runs, places = apart(m.order, rows, int(lead[-1]))
        name = f"_mosaic_{m.node.name}"
        gm.register_buffer(name, places.to(m.node.meta["val"].device), persistent=False)
        with gm.graph.inserting_before(m.node):
            order = gm.graph.get_attr(name)
        tiles = emit(aten.reshape.default, m.source, [rows, width])
        newline = emit(aten.to.dtype, emit(aten.reshape.default, m.filler, [1, width]), m.source.meta["val"].dtype)
        pieces = []
        for start, stop, count in runs:
            pieces.append(tiles if (start, stop) == (0, rows) else emit(aten.slice.Tensor, tiles, 0, start, stop))
            pieces += [emit(aten.expand.default, newline, [count, width])] if count else []
        joined = emit(aten.cat.default, pieces, 0)
        new = emit(aten.reshape.default, emit(aten.index_select.default, joined, 0, order), list(shape(m.node)))
        m.node.replace_all_uses_with(new)
    gm.graph.eliminate_dead_code()
    return bool(found)


def apart(order: Tensor, rows: int, tile: int) -> tuple[list[tuple[int, int, int]], Tensor]:
    """(start, stop, newline tokens) of runs of tiles that make a map of their own, so that the images of several prompts stay
    apart; and the order among these runs, the newline tokens behind each."""
    places, runs = order.clone(), []
    at = start = seen = 0
    for i in range(len(order)):
        seen = max(seen, int(order[i]) + 1) if order[i] < rows else seen
        last = i + 1 == len(order)
        tokens = int((order[at : i + 1] < rows).sum())
        if (seen == start + tokens and seen % tile == 0 and seen > start and (last or order[i + 1] < rows)) or last:
            part = order[at : i + 1]
            fills = part >= rows
            base = at  # as many rows as the map had before
            places[at : i + 1] = torch.where(fills, base + tokens + fills.cumsum(0) - 1, base + part - start)
            runs.append((start, seen, int(fills.sum())))
            at, start = i + 1, seen
    return runs, places


def ends(gm: GraphModule) -> dict[Node, tuple[Node, Node]]:
    """The last nodes of movements of one tensor and one weight: node -> (tensor, weight)."""
    origins: dict[Node, frozenset[Node]] = {}
    for node in gm.graph.nodes:
        given = [n for n in node.all_input_nodes if n.op != "get_attr" or packet(node) != "aten.index_select"]
        of = frozenset().union(*(origins.get(n, {n}) for n in given))
        weights = {n for n in of if n.op == "get_attr"}
        repeats = packet(node) in REPEATS | CASTS and of == weights
        if (repeats or moves(node)) and len(weights) <= 1 and len(of) - len(weights) <= 1:
            origins[node] = of
    both = {node: of for node, of in origins.items() if len(of) == 2}
    last = {node: of for node, of in both.items() if is_tensor(node) and any(user not in both for user in node.users)}
    return {n: (next(o for o in of if o.op != "get_attr"), next(o for o in of if o.op == "get_attr")) for n, of in last.items()}


def read(gm: GraphModule, node: Node, source: Node, filler: Node) -> Mosaic | None:
    """None where a node is no mosaic of whole rows, all of them, in some order; nor where only a class token stands before."""
    width = shape(source)[-1]
    if shape(node)[-1] != width or shape(filler)[-1:] != (width,) or prod(shape(filler)) != width:
        return None
    rows = prod(shape(source)[:-1])
    numbers = {
        source: torch.arange(rows * width).reshape(shape(source)),
        filler: -1 - torch.arange(width).reshape(shape(filler)),
    }
    marks = run(gm, node, numbers).reshape(-1, width)
    first, columns = marks[:, 0], torch.arange(width)
    fills = first < 0
    whole = torch.where(fills[:, None], -1 - columns, first[:, None] + columns)
    tokens = first[~fills]
    if not torch.equal(marks, whole) or not torch.equal(tokens.sort().values, torch.arange(rows) * width):
        return None
    inside = (~fills).nonzero()[:, 0]
    if int(inside[-1] - inside[0]) == rows - 1 and bool((tokens.diff() > 0).all()):
        return None
    return Mosaic(node, source, filler, torch.where(fills, rows + fills.cumsum(0) - 1, first // width))


def run(gm: GraphModule, wanted: Node, values: dict[Node, Any]) -> Tensor:
    """A movement of numbers."""
    if wanted not in values:
        if wanted.op == "get_attr":
            values[wanted] = get_attr(gm, wanted.target)
        else:
            for n in wanted.all_input_nodes:
                run(gm, n, values)
            args, kwargs = map_arg((wanted.args, wanted.kwargs), values.__getitem__)
            values[wanted] = args[0] if packet(wanted) in CASTS else wanted.target(*args, **kwargs)
    return values[wanted]
