"""Sizes: how many tokens those of an axis hold, and whether a sum over them has all."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.passes.batch import samples_in_line
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.rules.core import Axis, Call, Label, NeedsFull, has_batch, has_tokens, old
from tokcompile.passes.tokens import Batch, Seq, spaces_on

SHORT = "it adds up all tokens, and some are gone"


def weigh(call: Call, value: Node, label: Label, dim: int) -> Node:
    """What is to be summed along an axis of tokens, each of which weighs as many as it holds.

    Raises: NeedsFull where tokens are gone that the sum has to have.
    """
    if not has_tokens(label[dim]) or call.rewriter.weighted(call.node):
        return value
    if is_short(call, label[dim]):
        raise NeedsFull(SHORT)
    if not sized(label[dim]):
        return value
    return call.op(aten.mul.Tensor, value, sizes_like(call, value, label, dim))


def sized(axis: Axis) -> bool:
    """Whether tokens on an axis were merged, and know how many they hold."""
    return any(space.size is not None for space in spaces_on(axis))


def is_short(call: Call, axis: Axis) -> bool:
    """Whether a sum over an axis, outside of the blocks, would miss tokens that are gone, and is no share of one that does."""
    gone = any(space.short for space in spaces_on(axis))
    return gone and call.node not in call.rewriter.structure.inside and not call.rewriter.divided(call.node)


def sizes_like(call: Call, value: Node, label: Label, dim: int) -> Node:
    """`sizes_along` in the dtype of what they are multiplied with; whole numbers for truths, which are counted."""
    dtype = value.meta["val"].dtype
    return call.op(aten.to.dtype, sizes_along(call, label, dim), torch.int64 if dtype is torch.bool else dtype)


def sizes_along(call: Call, label: Label, dim: int, log: bool = False) -> Node:
    """How many tokens those along axis `dim` hold, or the log of it, laid out so that it broadcasts against the label."""
    # over all samples at once, as over the windows of an image that are a batch elsewhere
    like = tuple(samples_in_line(call.gather, axis) for axis in label)
    value = call.gather.sizes(next(a for a in like[dim] if isinstance(a, Seq)))
    return laid_out(call, call.op(aten.log.default, value) if log else value, like, dim)


def laid_out(call: Call, value: Node, like: Label, dim: int) -> Node:
    """(B, tokens) so that it broadcasts against a label with these tokens on axis `dim`."""
    dim = dim % len(like)
    axis = like[dim]
    if has_batch(axis):
        raise NeedsFull("samples and their tokens lie on one axis with others")
    at = next(i for i, a in enumerate(axis) if isinstance(a, Seq))
    if rows := axis[at + 1 :]:  # groups of rows share their token's size
        value = call.op(aten.repeat_interleave.self_int, value, old(rows), 1)
    if copies := axis[:at]:
        value = call.op(aten.repeat.default, value, [1, old(copies)])
    sizes = [1] * len(like)
    sizes[dim] = shape(value)[1]
    samples = next((d for d, one in enumerate(like) if d != dim and has_batch(one)), None)
    if samples is not None:
        value = for_each_head(call, value, like[samples])
        sizes[samples] = shape(value)[0]
        if samples > dim:
            value = call.op(aten.transpose.int, value, 0, 1)
    return call.op(aten.reshape.default, value, sizes)


def for_each_head(call: Call, value: Node, samples: Axis) -> Node:
    """Sizes (B, n) over an axis of all samples, or of the heads of all of them, (B * H, n)."""
    if len(samples) == 1:
        return value
    heads = old(samples) // shape(value)[0]
    if isinstance(samples[0], Batch):
        return call.op(aten.repeat_interleave.self_int, value, heads, 0)
    if isinstance(samples[-1], Batch):
        return call.op(aten.repeat.default, value, [heads, 1])
    raise NeedsFull("its samples stand between other axes")
