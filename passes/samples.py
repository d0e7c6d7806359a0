"""Samples: which sample of the batch each entry of a head tensor belongs to, so that heads are never taken for samples."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.graph import aten, is_tensor, packet, shape
from tokcompile.passes.movement import POOLS, Movement, moves
from tokcompile.passes.splice import Splice
from tokcompile.passes.tokens import Batch, Label, is_labelled, old

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter

# ops that leave all axes but the channels where they are, along which some of them mix
STAYS = {"aten.linear", "aten.matmul", "aten.addmm", "aten.mm", "aten.layer_norm", "aten.rms_norm", "aten.normalize",
         "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.neg", "aten.pow", "aten.square", "aten.sqrt", "aten.rsqrt",
         "aten.mean", "aten.var", "aten.abs", "aten.clamp", "aten.clamp_min", "aten.to", "aten._to_copy", "aten.type_as",
         "aten.sigmoid", "aten.silu", "aten.gelu", "aten.relu", "aten.tanh", "aten.linalg_vector_norm", "aten.expand",
         "aten.expand_as"}  # fmt: skip


def heads_first(gm: GraphModule, s: Splice, node: Node, label: Label, lead: list[int]) -> bool:
    """Whether the axes before tokens and channels run over the samples for each head, and not over the heads for each sample.

    label: of the node in the new graph; lead: these axes. Raises: UnsupportedGraph where it is neither, or cannot be told.
    """
    found = of_label(label, s.batch) if is_labelled(label) else of_moved(gm, node, s)
    if found is not None:
        others = [d for d in range(found.dim()) if d not in lead]
        order = found.permute(*lead, *others).flatten(len(lead))[..., 0].flatten()
        samples = torch.arange(s.batch)
        each = len(order) // s.batch
        if torch.equal(order, samples.repeat_interleave(each)):
            return False
        if torch.equal(order, samples.repeat(each)):
            return True
    elif len(lead) > 1 and shape(node)[lead[0]] == s.batch:
        return False
    raise UnsupportedGraph(
        f"which samples and heads the leading axes of this tensor ({'x'.join(map(str, shape(node)))}) run over is not clear",
        node,
        "choose a method that does not read attention, such as 'random', 'grid' or 'divprune', or a batch of one",
    )


def samples_first(rw: Rewriter, value: Node, batch: int, tail: Sequence[int], turned: bool) -> Node:
    """A head tensor as (B, H, *tail). turned: whether its entries run over the samples for each head."""
    each = prod(shape(value)) // (batch * prod(tail))
    if not turned:
        return rw.gather.reshape(value, [batch, each, *tail])
    return rw.builder.emit(aten.permute.default, rw.gather.reshape(value, [each, batch, *tail]), [1, 0, 2, 3])


def of_label(label: Label, batch: int) -> Tensor | None:
    """By the label of a tensor: its axis with the batch says it."""
    axes = [d for d, axis in enumerate(label) if Batch(batch) in axis]
    if len(axes) != 1:
        return None
    axis = label[axes[0]]
    at = axis.index(Batch(batch))
    line = torch.arange(batch).repeat_interleave(old(axis[at + 1 :])).repeat(old(axis[:at]))
    return line.reshape([-1 if d == axes[0] else 1 for d in range(len(label))]).expand([old(axis) for axis in label])


def of_moved(gm: GraphModule, node: Node, s: Splice) -> Tensor | None:
    """By the way that a tensor's entries came from what goes into the block; None where that cannot be followed."""
    block = s.tap_block or s.block
    known: dict[Node, Any] = {block.entry: of_stream(block.entry, s)}

    def marks(n: Node) -> Any:
        if n not in known:
            known[n] = None  # for the time being: no way leads through a loop
            if (moves(n) and packet(n) not in POOLS) or n.target is operator.getitem:
                given = {i: marks(i) for i in n.all_input_nodes if i.op != "get_attr"}
                if given and all(v is not None for v in given.values()):
                    known[n] = Movement(gm, n).call(n, given)
            elif is_tensor(n) and packet(n) in STAYS:
                known[n] = of_inputs(n, [m for i in n.all_input_nodes if (m := marks(i)) is not None])
        return known[n]

    return marks(node)


def of_inputs(node: Node, given: list[Any]) -> Tensor | None:
    """Behind an op that leaves all axes but the channels where they are, such as a projection, a norm or a product."""
    lead = shape(node)[:-1]
    fitting = [m[..., :1] for m in given if isinstance(m, Tensor) and m.dim() and tuple(m.shape[:-1]) == lead]
    if not fitting or not all(torch.equal(m, fitting[0]) for m in fitting):
        return None
    return fitting[0].expand(shape(node))


def of_stream(node: Node, s: Splice) -> Tensor | None:
    """In the residual stream itself: (B, L, D), (L, B, D), or (B * L, D)."""
    sizes, axis = shape(node), s.block.batch_axis
    if axis is None or axis >= len(sizes):
        return None
    ids = torch.arange(s.batch)
    if sizes[axis] == s.batch:
        ids = ids.reshape([-1 if d == axis else 1 for d in range(len(sizes))])
    elif axis == 0 and sizes[0] % s.batch == 0:
        ids = ids.repeat_interleave(sizes[0] // s.batch).reshape([-1, *[1] * (len(sizes) - 1)])
    else:
        return None
    return ids.expand(sizes)
