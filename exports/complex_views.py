"""New axes of complex numbers (rotary tables), which `torch.onnx` gives to real ones only: their pairs get them."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.passes.graph import aten, packet


def real_views(gm: GraphModule) -> None:
    """Rewrites unsqueeze of complex tensors, in place."""
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        if packet(node) != "aten.unsqueeze" or not isinstance(value, Tensor) or not value.is_complex():
            continue
        x, axis = node.args
        with gm.graph.inserting_before(node):
            made: Node = gm.graph.call_function(aten.view_as_real.default, (x,))
            made = gm.graph.call_function(aten.unsqueeze.default, (made, axis % value.dim()))
            made = gm.graph.call_function(aten.view_as_complex.default, (made,))
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
