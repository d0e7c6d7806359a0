"""New axes of complex numbers (rotary tables), which `torch.onnx` gives to real ones only: their pairs get them."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from tokcompile.passes.graph import aten, emitter, packet


def real_views(gm: GraphModule) -> None:
    """Rewrites unsqueeze of complex tensors, in place."""
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        if packet(node) != "aten.unsqueeze" or not isinstance(value, Tensor) or not value.is_complex():
            continue
        x, axis = node.args
        emit = emitter(gm, node)
        pairs = emit(aten.unsqueeze.default, emit(aten.view_as_real.default, x), axis % value.dim())
        node.replace_all_uses_with(emit(aten.view_as_complex.default, pairs))
        gm.graph.erase_node(node)
