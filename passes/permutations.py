"""Permutations: an order of all tokens that follows from numbers among the inputs, as the sizes of images are, becomes a
constant with a check on later calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.passes.fixed import Fixed, program_of, read_by, value_of
from tokcompile.passes.graph import aten, bind, buffer, emitter, shape, stand_in


def fix_permutations(gm: GraphModule, inputs: Sequence[Any]) -> list[Fixed]:
    """Writes each `x[order]` that takes all tokens once by a plain constant, in place."""
    fixed = []
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.index.Tensor)):
        index = computed_index(node)
        if index is None:
            continue
        program = program_of(gm, index)
        read = read_by(program, inputs)
        order = value_of(program, inputs) if whole_numbers(read) else None
        if order is None or not is_permutation(order):
            continue
        by_constant(gm, node, order)
        if read:
            fixed.append(Fixed(program, order, f"all {order.numel()} tokens are taken in an order of their own"))
    return fixed


def computed_index(node: Node) -> Node | None:
    """The index of `x[index]` where it names as many tokens as there are and is not a plain constant already."""
    x, indices = bind(node)["self"], bind(node)["indices"]
    if len(indices) != 1 or x.op == "get_attr":
        return None
    index = indices[0].meta["val"]
    plain = indices[0].op == "get_attr" and index.dim() == 1
    return None if plain or index.dtype is torch.bool or not 1 < index.numel() == shape(x)[0] else indices[0]


def whole_numbers(values: Sequence[Any]) -> bool:
    """Whether none of them is an image, or another tensor that changes from call to call."""
    return all(isinstance(v, Tensor) and not v.is_floating_point() for v in values)


def is_permutation(order: Tensor) -> bool:
    return torch.equal(order.flatten().long().sort()[0], torch.arange(order.numel()))


def by_constant(gm: GraphModule, node: Node, order: Tensor) -> None:
    """`x[order]` with the order as a buffer of one dimension."""
    x, emit = bind(node)["self"], emitter(gm, node)
    constant = buffer(gm, f"_order_of_{node.name}", order.flatten().to(x.meta["val"].device), node)
    constant.meta["val"] = bind(node)["indices"][0].meta["val"].flatten()
    made = emit(aten.reshape.default, emit(aten.index.Tensor, x, [constant]), [*order.shape, *shape(x)[1:]])
    stand_in(node, made)
