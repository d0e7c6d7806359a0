"""Choices: where top-k chooses everything (the indexer of a sparse attention over a prompt shorter than what it may keep, a
router with one group), what is written at the chosen places is written everywhere."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from tokcompile.passes.graph import RESHAPES, aten, bind, filled, packet, shape
from tokcompile.passes.memory import CASTS

COPIES = CASTS | RESHAPES | {"aten.clone", "aten.contiguous"}  # of an index, where its shape stays


def write_everywhere(gm: GraphModule) -> bool:
    """Rewrites scatters of a number in place; returns whether there were any."""
    found = [n for n in gm.graph.nodes if packet(n) == "aten.scatter" and n.target is aten.scatter.value and is_whole(n)]
    for node in found:
        filled(gm, node, bind(node)["value"])
    gm.graph.eliminate_dead_code()
    return bool(found)


def is_whole(scatter: Node) -> bool:
    """Whether its index is all places along its axis, in whatever order."""
    a = bind(scatter)
    index = a["index"]
    while packet(index) in COPIES and shape(index) == shape(index.args[0]):
        index = index.args[0]
    if index.target is not operator.getitem or index.args[1] != 1 or packet(index.args[0]) not in ("aten.topk", "aten.sort"):
        return False
    chosen, rank = bind(index.args[0]), len(shape(scatter))
    sizes, axis = shape(chosen["self"]), a["dim"] % rank
    dim = chosen["dim"] if isinstance(chosen.get("dim"), int) else -1
    return sizes == shape(index) == shape(scatter) and dim % rank == axis
