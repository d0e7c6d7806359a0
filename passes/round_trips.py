"""Round trips: what is moved and stands at its old places again, such as tokens seen as a grid on which nothing is done, is a
view."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tokcompile.passes.graph import RESHAPES, aten, emitter, is_tensor, numel, packet, shape, stand_in
from tokcompile.passes.movement import movements


def write_round_trips(gm: GraphModule) -> None:
    """Rewrites all of them, in place."""
    for movement in movements(gm):
        source = movement.source
        back = [n for n in movement.ends if packet(n) in RESHAPES and is_tensor(source) and same_rows(n, source)]
        if not back or all(packet(n) in RESHAPES for n in movement.nodes):
            continue
        numbers = torch.arange(numel(source)).reshape(shape(source))
        for node, values in movement.run(numbers, back).items():
            if len(values) == 1 and torch.equal(values[0].flatten(), numbers.flatten()):
                stand_in(node, emitter(gm, node)(aten.reshape.default, source, list(shape(node))))
    gm.graph.eliminate_dead_code()


def same_rows(node: Node, source: Node) -> bool:
    """Whether it may hold the same tokens, their channels on the last axis."""
    rows = min(len(shape(node)), len(shape(source))) > 1 and numel(node) == numel(source)
    return rows and shape(node)[-1] == shape(source)[-1]
