"""Flatten: where the residual stream is a grid (B, H, W, C), what is done token by token is done on (B, H*W, C) instead.

Window attention (SAM, Swin, ViTDet) keeps tokens on two axes. A reduction needs one: the stream, its norms and its MLPs
are rewritten to run over one token axis, and the grid is restored where an op looks at it. Values stay the same.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tokcompile.passes.find import Structure
from tokcompile.passes.graph import aten, bind, packet, shape, user_dependent
from tokcompile.passes.rules.pointwise import BINARY, UNARY

ROWWISE = {"aten.linear", "aten.layer_norm", "aten.rms_norm"}
TOKENWISE = {f"aten.{name}" for name in UNARY + BINARY} | ROWWISE


def flatten_grids(gm: GraphModule, structure: Structure) -> bool:
    """Rewrites `gm` in place; returns whether there was anything to do. Shapes have to be propagated again after it."""
    streams = [n for b in structure.blocks if b.why_not for n in (b.entry, b.mid) if len(shape(n)) > 3]
    if not streams:
        return False
    for grid in dict.fromkeys(shape(n)[:-1] for n in streams):
        _Flatten(gm, grid).run([n for n in streams if shape(n)[:-1] == grid])
    gm.graph.eliminate_dead_code()
    return True


class _Flatten:
    """One grid (B, H, W); `flat`: 4-D node -> its (B, H*W, C) twin."""

    def __init__(self, gm: GraphModule, grid: tuple[int, ...]):
        self.gm, self.grid, self.lead = gm, grid, (grid[0], prod(grid[1:]))
        self.flat: dict[Node, Node] = {}
        self.twins: set[Node] = set()  # the nodes whose op runs flat, not those that were only reshaped as operands

    def run(self, streams: list[Node]) -> None:
        dependent = user_dependent(self.gm.graph)
        region = set(streams)
        nodes = list(self.gm.graph.nodes)
        for node in nodes:
            if node in dependent and any(n in region for n in node.all_input_nodes) and self.tokenwise(node):
                region.add(node)
        if not any(packet(n) in ROWWISE for n in region):
            return  # channels are not on the last axis: these are feature maps, not rows of tokens
        for node in nodes:
            if node in region and self.tokenwise(node):
                self.twin(node)
        for node, flat in list(self.flat.items()):
            outside = [u for u in node.users if u not in self.twins and u is not flat]
            if node in region and self.tokenwise(node) and outside:
                with self.gm.graph.inserting_after(flat):
                    grid = self.gm.graph.call_function(aten.reshape.default, (flat, list(shape(node))))
                grid.meta = dict(node.meta)
                for user in outside:
                    user.replace_input_with(node, grid)

    def tokenwise(self, node: Node) -> bool:
        """Whether the op treats each place of the grid by itself and leaves it a grid."""
        value = node.meta.get("val")
        if packet(node) not in TOKENWISE or not isinstance(value, torch.Tensor) or tuple(value.shape[:-1]) != self.grid:
            return False
        if packet(node) in ("aten.layer_norm", "aten.rms_norm"):
            return len(bind(node)["normalized_shape"]) == 1
        weights = {"weight", "bias"}
        return all(self.fits(a) for name, a in bind(node).items() if isinstance(a, Node) and name not in weights)

    def fits(self, node: Node) -> bool:
        sizes = shape(node)
        return len(sizes) <= 1 or (len(sizes) == len(self.grid) + 1 and all(s in (1, g) for s, g in zip(sizes, self.grid)))

    def twin(self, node: Node) -> None:
        """The same op on flattened operands."""

        def operand(a: Any) -> Any:
            return self.flattened(a) if isinstance(a, Node) and len(shape(a)) == len(self.grid) + 1 else a

        with self.gm.graph.inserting_before(node):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), operand)
            flat = self.gm.graph.call_function(node.target, args, kwargs)
        flat.meta = {k: v for k, v in node.meta.items() if k != "val"}
        self.flat[node] = flat
        self.twins.add(node)

    def flattened(self, node: Node) -> Node:
        """A 4-D operand as (B, H*W, C): its twin, or a reshape right after it."""
        if node not in self.flat:
            sizes = shape(node)[:-1]
            body = prod(sizes[1:]) if all(s == g for s, g in zip(sizes[1:], self.grid[1:])) else 1
            if body == 1 and any(s > 1 for s in sizes[1:]):  # broadcast along one side of the grid only
                with self.gm.graph.inserting_after(node):
                    wide = self.gm.graph.call_function(aten.expand.default, (node, [sizes[0], *self.grid[1:], shape(node)[-1]]))
                wide.meta = {k: v for k, v in node.meta.items() if k != "val"}
                source, body = wide, self.lead[1]
            else:
                source = node
            with self.gm.graph.inserting_after(source):
                flat = self.gm.graph.call_function(aten.reshape.default, (source, [sizes[0], body, shape(node)[-1]]))
            flat.meta = {k: v for k, v in node.meta.items() if k != "val"}
            self.flat[node] = flat
        return self.flat[node]
