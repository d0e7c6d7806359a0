"""Movement: the parts of a graph that only move values of one tensor to other places, and where each value goes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tokcompile.passes.graph import RESHAPES, bind, get_attr, is_tensor, packet, shape
from tokcompile.passes.memory import CASTS, ancestors_of

MOVES = RESHAPES | {
    "aten.view_as", "aten.reshape_as", "aten.permute", "aten.transpose", "aten.t", "aten.movedim", "aten.swapaxes",
    "aten.swapdims", "aten.numpy_T", "aten.mT", "aten.unsqueeze", "aten.squeeze", "aten.contiguous", "aten.clone",
    "aten.slice", "aten.narrow", "aten.select", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split",
    "aten.unbind", "aten.cat", "aten.stack", "aten.index_select", "aten.unfold", "aten.im2col", "aten.pixel_shuffle",
    "aten.pixel_unshuffle",
}  # fmt: skip
POOLS = {"aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d", "aten.mean"}


@dataclass
class Movement:
    """All that is moved out of `source`: the nodes in order, and those of them that something else reads."""

    gm: GraphModule
    source: Node
    nodes: list[Node] = field(default_factory=list)

    @property
    def ends(self) -> list[Node]:
        inside = set(self.nodes)
        return [n for n in self.nodes if is_tensor(n) and any(u not in inside for u in n.users)]

    def run(
        self, marks: Tensor, wanted: Iterable[Node], weights: Mapping[Node, Tensor] | None = None
    ) -> dict[Node, list[Tensor]]:
        """The wanted nodes computed from `marks` in the place of the source: one tensor, or the several whose mean it is.
        weights: what stands in the place of weights that are moved too."""
        wanted = list(wanted)
        needed = ancestors_of(set(wanted))
        env: dict[Node, Any] = {self.source: [marks], **{node: [value] for node, value in (weights or {}).items()}}
        for node in self.nodes:
            if node in needed and (made := self.step(node, env)) is not None:
                env[node] = made
        return {n: env[n] for n in wanted if n in env}

    def step(self, node: Node, env: dict[Node, Any]) -> list[Any] | None:
        """None where the movement cannot be followed."""
        given = [n for n in node.all_input_nodes if n.op != "get_attr" or n in env]
        if any(n not in env for n in given) or len({len(env[n]) for n in given}) != 1:
            return None
        if packet(node) in CASTS:
            return list(env[given[0]])
        if packet(node) in POOLS:
            return [piece for one in env[given[0]] for piece in pooled(node, one)]
        return [self.call(node, {n: env[n][i] for n in given}) for i in range(len(env[given[0]]))]

    def call(self, node: Node, values: dict[Node, Any]) -> Any:
        def value(n: Node) -> Any:
            return values[n] if n in values else get_attr(self.gm, n.target)

        if node.target is operator.getitem:
            return values[node.args[0]][node.args[1]]
        args, kwargs = map_arg((node.args, node.kwargs), value)
        if packet(node) == "aten.im2col":  # there is none for integers
            return node.target(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        return node.target(*args, **kwargs)


def movements(gm: GraphModule) -> list[Movement]:
    """One for each tensor from which something is moved away."""
    sources: dict[Node, Node] = {}
    found: dict[Node, Movement] = {}
    for node in gm.graph.nodes:
        if not moves(node):
            continue
        given = [n for n in node.all_input_nodes if n.op != "get_attr"]
        origins = {sources.get(n, n) for n in given}
        if len(origins) == 1:
            source = sources[node] = origins.pop()
            found.setdefault(source, Movement(gm, source)).nodes.append(node)
    return list(found.values())


def moves(node: Node) -> bool:
    name = packet(node)
    if name == "aten.mean":  # along the last axis alone as in a norm, and no pooling
        return bool(axes := averaged(node)) and axes != [len(shape(node.args[0])) - 1]
    if name in POOLS:
        return windows(node) is not None
    if name == "aten.index_select":
        return bind(node)["index"].op == "get_attr" and bind(node)["self"].op != "get_attr"
    if name == "aten.index":  # by one constant list, as in x[:, order]
        before, index = bind(node)["indices"][:-1], bind(node)["indices"][-1]
        return bind(node)["self"].op != "get_attr" and not any(before) and index.op == "get_attr" and len(shape(index)) == 1
    return name in MOVES or (node.target is operator.getitem and packet(node.args[0]) in MOVES)


def windows(node: Node) -> tuple[int, int] | None:
    """(height, width) of the windows of a pooling that covers its input with windows side by side; None for others."""
    a, sizes = bind(node), shape(node.all_input_nodes[0])[-2:]
    if "output_size" in a:
        out = [
            o if o is not None else s for o, s in zip(list(a["output_size"]) * (2 if len(a["output_size"]) == 1 else 1), sizes)
        ]
        kernel = [s // o if s % o == 0 else 0 for s, o in zip(sizes, out)]
    else:
        kernel, stride = pair(a["kernel_size"]), pair(a["stride"] or a["kernel_size"])
        if stride != kernel or any(pair(a["padding"])) or a["divisor_override"] is not None:
            return None
    if not all(kernel) or any(s % k for s, k in zip(sizes, kernel)):
        return None
    return kernel[0], kernel[1]


def averaged(node: Node) -> list[int]:
    """The axes that a mean goes over."""
    return sorted(d % len(shape(node.args[0])) for d in bind(node).get("dim") or ())


def pooled(node: Node, marks: Tensor) -> list[Tensor]:
    """What each window of a pooling holds: one tensor for each place in it."""
    if packet(node) == "aten.mean":
        axes = averaged(node)
        first = marks.movedim(axes, list(range(len(axes)))).flatten(0, len(axes) - 1)
        return [piece.reshape(shape(node)) for piece in first]
    height, width = windows(node) or (1, 1)
    return [marks[..., i::height, j::width] for i in range(height) for j in range(width)]


def pair(value: Any) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (value * 2 if len(value) == 1 else value)]
