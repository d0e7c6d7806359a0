"""Mixtures of experts: rows are sorted by the expert they go to, multiplied in groups, and put back in their order.

Between the sort and the way back no row looks at another one, and any number of rows is served alike. So such a region does
with the tokens that are left what it did with all of them, and is written as it stands, over fewer rows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from tokcompile.passes.graph import aten, bind, get_attr, is_tensor, packet, shape
from tokcompile.passes.rules.core import Axis, Call, has_tokens, is_labelled, normal, old, plain, rule
from tokcompile.passes.rules.pointwise import BINARY, UNARY
from tokcompile.passes.rules.reduce import positions

PRODUCTS = {"aten.grouped_mm", "aten._grouped_mm", "transformers.grouped_mm_fallback"}
ROW_BY_ROW = {f"aten.{name}" for name in UNARY + BINARY}
ALONG = {  # another axis than that of the rows
    "aten.chunk", "aten.split", "aten.split_with_sizes", "aten.slice", "aten.select", "aten.unsqueeze", "aten.squeeze",
    "aten.mean", "aten.sum", "aten.amax", "aten.softmax", "aten._softmax",
}  # fmt: skip
NORMS = {"aten.layer_norm", "aten.rms_norm"}  # of the last axes, as long as the rows' is none of them
COUNTS = {"aten.histc", "aten.bincount"}  # how many rows each expert has,
OF_COUNTS = {"aten.cumsum", "aten.to", "aten._to_copy"}  # and where they begin, which only the products may look at


@dataclass
class Region:
    """nodes: from a sort to the node that undoes it, in order. places: of the sorted rows, the sort's second result, and
    of the tokens they are copies of (that over a number). inverse: where each row went. counts: what counts rows."""

    nodes: list[Node]
    places: dict[Node, int]
    inverse: Node
    counts: set[Node]


@rule("aten.sort")
def sort(call: Call) -> Any:
    label = call.label("self")
    region = find_region(call, label[0]) if len(label) == 1 and has_tokens(label[0]) else None
    return positions(call) if region is None else write(call, region, label[0])


def find_region(call: Call, rows: Axis) -> Region | None:
    """The region that starts with this sort; None where it is anything else."""
    first = call.node
    order = next((u for u in first.users if u.target is operator.getitem and u.args[1] == 1), None)
    if order is None:
        return None
    places = {order: 1} | {u: u.args[1] for u in order.users if packet(u) == "aten.floor_divide" and isinstance(u.args[1], int)}
    inverse = next((u for u in order.users if is_inverse(call, u, order)), None)
    back = next((u for u in inverse.users if picked_at(u) is inverse), None) if inverse is not None else None
    if inverse is None or back is None or len(inverse.users) != 1:
        return None
    region, inside = Region([], places, inverse, set()), {first}
    for node in first.graph.nodes:
        if node is first or any(n in inside for n in node.all_input_nodes):
            inside.add(node)
            region.nodes.append(node)
            if node is back and node.args[0] in inside:
                break
            if node is not first and not allowed(call, node, region, inside, rows):
                return None
    leaving = [n for n in region.nodes[:-1] if any(u not in inside for u in n.users)]
    return None if leaving or region.nodes[-1] is not back else region


def is_inverse(call: Call, node: Node, order: Node) -> bool:
    """argsort(order), or 0, 1, 2.. written at order."""
    if packet(node) == "aten.argsort":
        return node.args[0] is order
    if packet(node) != "aten.index_put" or list(node.args[1]) != [order]:
        return False
    given = node.args[2]
    if given.op != "get_attr":
        return packet(given) == "aten.arange" and shape(given) == shape(order) and bind(given).get("start", 0) == 0
    value = get_attr(call.rewriter.old, given.target)
    return not value.is_meta and torch.equal(value.cpu(), torch.arange(len(value), dtype=value.dtype))


def picked_at(node: Node) -> Node | None:
    """The one index by which a node picks along the first axis."""
    if packet(node) == "aten.index_select":
        return node.args[2] if node.args[1] == 0 else None
    return node.args[1][0] if packet(node) == "aten.index" and len(node.args[1]) == 1 else None


def allowed(call: Call, node: Node, region: Region, inside: set[Node], rows: Axis) -> bool:
    """Whether a node treats the sorted rows one by one, or counts them by expert."""
    name, index = packet(node), picked_at(node)
    if name in COUNTS or any(n in region.counts for n in node.all_input_nodes):
        if name not in PRODUCTS:
            region.counts.add(node)
        return name in COUNTS | OF_COUNTS | PRODUCTS
    given = [n for n in node.all_input_nodes if n not in inside and is_labelled(call.label_of(n))]
    if node in region.places or node is region.inverse or (name == "aten.empty_like" and not given):
        return True
    if index in region.places:  # rows brought in, copies of a token each
        return given == [node.args[0]] and normal((*call.label_of(given[0])[0], region.places[index])) == rows
    if given or node.op != "call_function" or any(n in region.places for n in node.all_input_nodes):
        return False
    if name in PRODUCTS:
        return True
    if row_for_row(node, inside, rows) or crossed(node, inside):
        return False
    if index is not None:  # a row of a table for each
        return node.args[0] not in inside
    if name in NORMS:
        return len(bind(node)["normalized_shape"]) < len(shape(node))
    return name == "getitem" or name in ROW_BY_ROW or (name in ALONG and not along_rows(node))


def along_rows(node: Node) -> bool:
    dim, rank = bind(node).get("dim"), len(shape(node.args[0])) + (packet(node) == "aten.unsqueeze")
    dims = [dim] if isinstance(dim, int) else dim or ([] if packet(node) == "aten.squeeze" else [0])
    return any(d % rank == 0 for d in dims)


def crossed(node: Node, inside: set[Node]) -> bool:
    """Whether the sorted rows are laid along two axes, so that each meets all others."""
    ranks = {len(shape(n)) for n in node.all_input_nodes if n in inside and is_tensor(n)}
    return packet(node) in ROW_BY_ROW and len(ranks - {0}) > 1


def row_for_row(node: Node, inside: set[Node], rows: Axis) -> bool:
    """Whether a node meets something of another place that has one row for each of the rows; what has fewer axes lies along the
    last ones."""
    rank = len(shape(node)) if is_tensor(node) else 1
    given = [shape(n) for n in node.all_input_nodes if n not in inside and is_tensor(n)]
    return any(len(sizes) >= rank and sizes[:1] == (old(rows),) for sizes in given)


def write(call: Call, region: Region, rows: Axis) -> Any:
    """Writes all of it, since nothing before its end has a meaning for single tokens."""
    rw = call.rewriter
    inside = set(region.nodes)
    for node in region.nodes:  # weights that are only now transposed
        for needed in node.all_input_nodes:
            if needed not in inside and node is not region.inverse:
                step_to(call, needed)
    values = rw.builder.unpack(call.op(call.node.target, call["self"]))
    for node in region.nodes[1:]:
        rw.builder.origin = node
        if node.args[0] is call.node:
            rw.env[node] = values[node.args[1]]
        elif node is region.inverse:
            rw.env[node] = call.op(aten.argsort.default, values[1])
        else:
            args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: rw.env[a] if isinstance(a, Node) else a)
            rw.env[node] = call.op(node.target, *args, **kwargs)
        if packet(node) in PRODUCTS or node is region.nodes[-1]:
            rw.labels[node] = (rows, *plain(shape(node)[1:]))  # by which its cost is known
    rw.builder.origin = call.node
    return [(value, plain(shape(value))) for value in values]


def step_to(call: Call, node: Node) -> None:
    """Walks ahead to a node that does not depend on the region."""
    if node not in call.rewriter.env:
        for needed in node.all_input_nodes:
            step_to(call, needed)
        call.rewriter.step(node)
