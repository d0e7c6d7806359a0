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
from tokcompile.passes.graph import RESHAPES, aten, bind, emitter, is_tensor, packet, shape, user_dependent
from tokcompile.passes.memory import ancestors_of
from tokcompile.passes.rules.pointwise import BINARY, UNARY

ROWWISE = {"aten.linear", "aten.layer_norm", "aten.rms_norm"}
TOKENWISE = {f"aten.{name}" for name in UNARY + BINARY} - {"aten.prelu"} | ROWWISE  # whose weights lie along axis 1
PARTS = {"aten.chunk", "aten.split", "aten.split_with_sizes"}  # of the channels


def flatten_grids(gm: GraphModule, structure: Structure) -> bool:
    """Rewrites `gm` in place; returns whether there was anything to do. Shapes have to be propagated again after it."""
    streams = [n for b in structure.blocks if b.why_not for n in (b.entry, b.mid) if len(shape(n)) > 3]
    if not streams:
        return False
    for grid in dict.fromkeys(shape(n)[:-1] for n in streams):
        _Flatten(gm, grid).run([n for n in streams if shape(n)[:-1] == grid])
    gm.graph.eliminate_dead_code()
    return True


def flatten_projector(gm: GraphModule, structure: Structure) -> bool:
    """The same for a grid that a pixel shuffle leaves behind a tower, where nothing looks at it until it is laid out as one
    axis. One at a time: shapes have to be propagated before the next."""
    dependent = user_dependent(gm.graph)
    inside = ancestors_of({b.mid for b in structure.blocks if not b.stage.text})
    for node in gm.graph.nodes:
        if node not in dependent or node in inside or packet(node) not in RESHAPES | {"aten.permute", "aten.transpose"}:
            continue
        rows = _Flatten(gm, shape(node)[:-1])
        region = rows.region([node]) if len(rows.grid) == 3 else set()
        ends = {u for n in region for u in n.users if u not in region}
        if any(packet(n) in ROWWISE for n in region) and all(merges(u, rows.lead) for u in ends):
            rows.run([node])
            gm.graph.eliminate_dead_code()
            return True
    return False


def flatten_tiles(gm: GraphModule, structure: Structure) -> bool:
    """The same for a stream that is seen as rows of tiles only for as long as something is done to each token, such as a tile's
    embedding that is added to all its tokens (Mllama). One at a time: shapes have to be propagated before the next."""
    streams = {shape(b.mid) for b in structure.blocks if b.why_not is None}
    dependent = user_dependent(gm.graph)
    for node in gm.graph.nodes:
        if node not in dependent or packet(node) not in RESHAPES or len(shape(node)) != 4:
            continue
        rows, stream = _Flatten(gm, shape(node)[:-1]), node.args[0]
        if shape(stream) not in streams or shape(stream) != (*rows.lead, shape(node)[-1]):
            continue
        region = rows.region([node])
        ends = {u for n in region for u in n.users if u not in region}
        if len(region) > 1 and all(merges(u, rows.lead) for u in ends):
            rows.flat[node] = stream
            rows.rewrite(region)
            gm.graph.eliminate_dead_code()
            return True
    return False


def merges(node: Node, lead: tuple[int, ...]) -> bool:
    """Whether a node lays a grid out as (B, H*W, C) or (B*H*W, C)."""
    return packet(node) in RESHAPES and shape(node)[:-1] in (lead, (prod(lead),)) and shape(node)[-1] == shape(node.args[0])[-1]


class _Flatten:
    """One grid (B, H, W); `flat`: 4-D node -> its (B, H*W, C) twin."""

    def __init__(self, gm: GraphModule, grid: tuple[int, ...]):
        self.gm, self.grid, self.lead = gm, grid, (*grid[:1], prod(grid[1:]))
        self.flat: dict[Node, Node] = {}
        self.twins: set[Node] = set()  # the nodes whose op runs flat, not those that were only reshaped as operands

    def region(self, streams: list[Node]) -> set[Node]:
        """The streams, and what is computed from them place by place."""
        dependent = user_dependent(self.gm.graph)
        region = set(streams)
        for node in self.gm.graph.nodes:
            if node in dependent and any(n in region for n in node.all_input_nodes) and self.tokenwise(node):
                region.add(node)
        return region

    def run(self, streams: list[Node]) -> None:
        """Rewrites what belongs to streams whose channels are on the last axis; others are feature maps."""
        region = self.region(streams)
        if any(packet(n) in ROWWISE for n in region):
            self.rewrite(region)

    def rewrite(self, region: set[Node]) -> None:
        """Runs what is computed place by place on one axis, and restores the grid behind it."""
        for node in list(self.gm.graph.nodes):
            if node in region and self.tokenwise(node):
                self.twin(node)
        for node, flat in list(self.flat.items()):
            outside = [u for u in node.users if u not in self.twins and u is not flat]
            if node in region and self.tokenwise(node) and outside:
                grid = self.behind(flat, aten.reshape.default, list(shape(node)))
                grid.meta = dict(node.meta)
                for user in outside:
                    user.replace_input_with(node, grid)
                    if merges(user, self.lead):
                        user.target, user.args, user.kwargs = aten.reshape.default, (flat, list(shape(user))), {}

    def tokenwise(self, node: Node) -> bool:
        """Whether the op treats each place of the grid by itself and leaves it a grid."""
        value = node.meta.get("val")
        if packet(node) == "getitem" and packet(node.args[0]) in PARTS:
            return self.tokenwise(node.args[0])
        if packet(node) in PARTS:
            return shape(node.args[0])[:-1] == self.grid and bind(node)["dim"] % 4 == 3
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
            if isinstance(a, Node) and a not in self.flat and (not is_tensor(a) or len(shape(a)) != len(self.grid) + 1):
                return a
            return self.flattened(a) if isinstance(a, Node) else a

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), operand)
        if packet(node) in PARTS:
            args, kwargs = args[:2], {"dim": -1}  # which may have been given as 3
        self.flat[node] = emitter(self.gm, node)(node.target, *args, **kwargs)
        self.twins.add(node)

    def flattened(self, node: Node) -> Node:
        """A 4-D operand as (B, H*W, C): its twin, or a reshape right after it."""
        if node not in self.flat:
            sizes = shape(node)[:-1]
            body = prod(sizes[1:]) if all(s == g for s, g in zip(sizes[1:], self.grid[1:])) else 1
            source = node
            if body == 1 and any(s > 1 for s in sizes[1:]):  # broadcast along one side of the grid only
                source = self.behind(node, aten.expand.default, [sizes[0], *self.grid[1:], shape(node)[-1]])
                body = self.lead[1]
            self.flat[node] = self.behind(source, aten.reshape.default, [sizes[0], body, shape(node)[-1]])
        return self.flat[node]

    def behind(self, node: Node, target: Any, sizes: list[int]) -> Node:
        """A view of a node, right behind it."""
        with self.gm.graph.inserting_after(node):
            new = self.gm.graph.call_function(target, (node, sizes))
        new.meta = {k: v for k, v in node.meta.items() if k != "val"}
        return new
