"""Convolutions: behind a tower, one whose windows lie side by side is a linear map of each window; what is then done place by
place is done with the channels on the last axis, as rules and other passes expect it of tokens."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tokcompile.passes.find import Structure
from tokcompile.passes.graph import aten, bind, emitter, packet, shape, stand_in
from tokcompile.passes.memory import ancestors_of, reachable_from
from tokcompile.passes.movement import pair
from tokcompile.passes.rules.pointwise import UNARY

POINTWISE = {f"aten.{name}" for name in UNARY}


def write_convolutions(gm: GraphModule, structure: Structure) -> bool:
    """Rewrites them in place, and returns whether there were any. Shapes have to be propagated again after it."""
    towers = {b.mid for b in structure.blocks if not b.stage.text}
    behind = reachable_from(towers) - ancestors_of(towers)
    last: dict[Node, Node] = {}  # (B, C, H, W) -> (B, H, W, C)
    for node in [n for n in gm.graph.nodes if n in behind]:
        x = node.args[0] if node.args else None
        kernel = side_by_side(node)
        if kernel is not None and (x in last or max(kernel) > 1):
            last[node] = linear(gm, node, x, last.get(x), kernel)
        elif x in last and packet(node) in POINTWISE and node.all_input_nodes == [x]:
            last[node] = emitter(gm, node)(node.target, last[x], *node.args[1:], **node.kwargs)
    for node, twin in last.items():
        if any(user not in last for user in node.users):
            stand_in(node, emitter(gm, node)(aten.permute.default, twin, [0, 3, 1, 2]))
    gm.graph.eliminate_dead_code()
    return bool(last)


def side_by_side(node: Node) -> tuple[int, int] | None:
    """(height, width) of the windows of a convolution that cover its input side by side; None for other ops."""
    if packet(node) != "aten.conv2d":
        return None
    a = bind(node)
    kernel, grid = shape(a["weight"])[2:], shape(a["input"])[2:]
    padded = a["padding"] not in ("valid", "same") and any(pair(a["padding"]))
    if a["padding"] == "same" or padded or a["groups"] != 1 or tuple(pair(a["stride"])) != kernel:
        return None
    if len(grid) != 2 or any(d != 1 for d in pair(a["dilation"])) or any(s % k for s, k in zip(grid, kernel)):
        return None
    return kernel[0], kernel[1]


def linear(gm: GraphModule, node: Node, x: Node, twin: Node | None, kernel: tuple[int, int]) -> Node:
    """(B, h, w, C') of windows of x: (B, C, H, W). twin: x with the channels last, where it is known."""
    emit, a, sizes = emitter(gm, node), bind(node), shape(x)
    (height, width), (h, w) = kernel, shape(node)[2:]
    if twin is None or max(kernel) > 1:
        x = x if twin is None else emit(aten.permute.default, twin, [0, 3, 1, 2])
        cells = emit(aten.reshape.default, x, [*sizes[:2], h, height, w, width])
        rows = emit(aten.permute.default, cells, [0, 2, 4, 1, 3, 5])
        twin = emit(aten.reshape.default, rows, [sizes[0], h, w, sizes[1] * height * width])
    weight = emit(aten.reshape.default, a["weight"], [shape(a["weight"])[0], sizes[1] * height * width])
    return emit(aten.linear.default, twin, weight, a["bias"])
