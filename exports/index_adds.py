"""Additions at all positions in their order, which are plain ones: `torch.onnx`'s optimizer takes them for assignments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.passes.canonicalise import IDENTITIES
from tokcompile.passes.graph import aten, get_attr, packet, shape

COPIES = IDENTITIES | {"aten.clone", "aten.to"}


def plain_adds(gm: GraphModule) -> None:
    """Rewrites index_add of a whole axis, in place."""
    for node in list(gm.graph.nodes):
        if packet(node) not in ("aten.index_add", "aten.index_add_") or node.kwargs.get("alpha", 1) != 1:
            continue
        x, dim, index, source = node.args[:4]
        at = constant(gm, index)
        if at is None or not torch.equal(at.cpu(), torch.arange(shape(x)[dim])) or shape(source) != shape(x):
            continue
        node.target = aten.add_.Tensor if packet(node).endswith("_") else aten.add.Tensor
        node.args, node.kwargs = (x, source), {}


def constant(gm: GraphModule, node: Node) -> Tensor | None:
    while packet(node) in COPIES:
        node = node.args[0]
    value = get_attr(gm, str(node.target)) if node.op == "get_attr" else None
    return value if isinstance(value, Tensor) else None
