"""Causal: attention that is causal and masked has one mask that says both, and masks that hide what comes later are known."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tokcompile.passes.graph import aten, bind, emitter, get_attr, packet, shape

HIDDEN = -1e4  # a bias below it hides
SAME_MASK = {"aten.expand", "aten.unsqueeze", "aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.alias"}
BOTH = {"aten.bitwise_and", "aten.logical_and", "aten.mul", "aten.add", "aten.minimum"}  # hide what one of two hides
EITHER = {"aten.bitwise_or", "aten.logical_or"}
NOT = {"aten.bitwise_not", "aten.logical_not"}


def write_causal_masks(gm: GraphModule) -> bool:
    """Fused attention with `is_causal` and a mask, which kernels of the CPU take and ONNX does not, gets the mask that says
    both."""
    found = False
    for node in list(gm.graph.nodes):
        if packet(node) != "aten.scaled_dot_product_attention":
            continue
        given, emit = bind(node), emitter(gm, node)
        mask = given["attn_mask"]
        if mask is None or not given["is_causal"]:
            continue
        value = mask.meta["val"]
        sizes = [shape(given["query"])[-2], shape(given["key"])[-2]]
        earlier = emit(aten.tril.default, emit(aten.ones.default, sizes, dtype=torch.bool, device=value.device))
        if value.dtype is torch.bool:
            given["attn_mask"] = emit(aten.logical_and.default, mask, earlier)
        else:
            given["attn_mask"] = emit(aten.where.ScalarOther, earlier, mask, float("-inf"))
        named = ("scale", "enable_gqa")
        node.args = tuple(v for k, v in (given | {"is_causal": False}).items() if k not in named)
        node.kwargs = {k: given[k] for k in named}
        found = True
    return found


def hides_the_future(gm: GraphModule, mask: Any, marks_hidden: bool = False) -> bool:
    """Whether a mask, or a constant that it is joined from, lets no query see a later key, as in a language model.

    marks_hidden: whether true entries are those that are not seen.
    """
    if not isinstance(mask, Node):
        return False
    if mask.op == "get_attr":
        return lower_triangular(get_attr(gm, mask.target), marks_hidden)

    def hides(node: Any, other_way: bool = False) -> bool:
        return hides_the_future(gm, node, marks_hidden != other_way)

    name = packet(mask)
    if name in SAME_MASK:
        return hides(mask.args[0])
    if name in NOT:
        return hides(mask.args[0], True)
    if name in (EITHER if marks_hidden else BOTH):
        return any(map(hides, mask.args[:2]))
    if name == "aten.masked_fill":
        return hides(mask.args[0]) or (hiding(gm, mask.args[2]) and hides(mask.args[1], True))
    if name == "aten.where":
        seen, yes, no = mask.args
        return (hiding(gm, no) and (hides(seen) or hides(yes))) or (hiding(gm, yes) and (hides(seen, True) or hides(no)))
    return False


def hiding(gm: GraphModule, value: Any) -> bool:
    """Whether this is a number that hides."""
    if isinstance(value, Node):
        value = get_attr(gm, value.target) if value.op == "get_attr" and not shape(value) else 0
    return not (isinstance(value, torch.Tensor) and value.is_meta) and float(value) <= HIDDEN


def lower_triangular(value: torch.Tensor, marks_hidden: bool) -> bool:
    sizes = value.shape
    if len(sizes) < 2 or sizes[-1] != sizes[-2] or sizes[-1] < 2 or value.is_meta:
        return False
    return not bool(visible(value, marks_hidden).reshape(-1, *sizes[-2:])[0].triu(1).any())


def visible(mask: torch.Tensor, marks_hidden: bool) -> torch.Tensor:
    """What a mask or bias leaves to be seen; marks_hidden: whether true entries hide."""
    return (mask > HIDDEN if mask.is_floating_point() else mask != 0) ^ marks_hidden
