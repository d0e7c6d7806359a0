"""Pooling: a product with a matrix of weights per position, in which each row is the mean of tokens of its own, is written as
that: the tokens in another order, and means of neighbours.

Such a matrix may follow from where each patch lies, which is among the inputs (Gemma 4): it is fixed, with a check on later
calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.passes.fixed import Fixed, program_of, read_by, value_of
from tokcompile.passes.graph import aten, bind, buffer, emitter, get_attr, packet, shape, stand_in, user_dependent
from tokcompile.passes.memory import CASTS


def write_poolings(gm: GraphModule, inputs: Sequence[Any]) -> list[Fixed]:
    """Writes each product that is a pooling as one, in place."""
    fixed = []
    exact, dependent = from_whole_numbers(gm), user_dependent(gm.graph)
    for node in list(gm.graph.nodes):
        if packet(node) not in ("aten.matmul", "aten.bmm", "aten.mm"):
            continue
        weights, tokens = node.args
        if (weights in dependent and weights not in exact) or shape(node)[:-2] != shape(tokens)[:-2]:
            continue
        mask = padding_of(tokens)
        programs = [program_of(gm, n) for n in (weights, mask) if n is weights or n in exact]
        values = [v for program in programs if (v := value_of(program, inputs)) is not None]
        order = order_of(*values) if len(values) == len(programs) else None
        if order is None:
            continue
        write(gm, node, order)
        texts = f"{order.numel()} tokens are pooled to {len(order)} by where they lie", "padding is where it is"
        held = zip(programs, values, texts)
        fixed += [Fixed(program, value, text) for program, value, text in held if value.any() and read_by(program, inputs)]
    return fixed


def from_whole_numbers(gm: GraphModule) -> set[Node]:
    """What is computed from inputs of whole numbers, as places are, and from no weight."""
    out: set[Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr":
            value = get_attr(gm, node.target)
        given = node.all_input_nodes
        if (isinstance(value, Tensor) and not value.is_floating_point()) if not given else all(n in out for n in given):
            out.add(node)
    return out


def padding_of(tokens: Node) -> Node | None:
    """The mask of tokens that have just been set to zero."""
    while packet(tokens) in CASTS:
        tokens = tokens.args[0]
    filled = packet(tokens) == "aten.masked_fill" and bind(tokens)["value"] == 0
    return bind(tokens)["mask"] if filled and shape(bind(tokens)["mask"])[-1] == 1 else None


def order_of(weights: Tensor, padding: Tensor | None = None) -> Tensor | None:
    """(rows, tokens of each) which tokens each row is the mean of; None where it is another sum, or not the same for all
    samples. Padding, which is zero and so adds nothing to any row, fills the rows that have no tokens.

    weights: (..., rows, n); padding: (..., n, 1).
    """
    rows, n = weights.shape[-2:]
    samples = weights.reshape(-1, rows, n)
    gone = torch.zeros(1, n, dtype=torch.bool) if padding is None else padding.expand(*padding.shape[:-2], n, 1).reshape(-1, n)
    if bool((samples != samples[0]).any() | (gone != gone[0]).any()) or n % rows or n == rows:
        return None
    members = (samples[0] != 0) & ~gone[0]
    counts = members.sum(1)
    if bool((counts[counts > 0] != n // rows).any() | (members.sum(0) != ~gone[0]).any()):
        return None
    means = torch.full((), rows / n, dtype=weights.dtype)
    if not torch.allclose(samples[0][members], means, rtol=1e-3):
        return None
    order = torch.empty(rows, n // rows, dtype=torch.int64)
    order[counts > 0] = members.nonzero()[:, 1].reshape(-1, n // rows)
    order[counts == 0] = gone[0].nonzero().reshape(-1, n // rows)
    return order


def write(gm: GraphModule, node: Node, order: Tensor) -> None:
    """The tokens in order, and the mean of each row."""
    tokens, emit = node.args[1], emitter(gm, node)
    index = buffer(gm, f"_pooled_by_{node.name}", order.flatten().to(node.meta["val"].device), node, persistent=False)
    sizes = shape(tokens)
    moved = emit(aten.index_select.default, tokens, len(sizes) - 2, index)
    groups = emit(aten.reshape.default, moved, [*sizes[:-2], *order.shape, sizes[-1]])
    stand_in(node, emit(aten.mean.dim, groups, [len(sizes) - 1]))
