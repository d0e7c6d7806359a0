"""Sizes: how many tokens those of an axis hold, and whether a sum over them has all."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.passes.batch import samples_in_line
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.rules.core import Axis, Call, Label, NeedsFull, has_batch, has_tokens, old, plain, tokens_of
from tokcompile.passes.tokens import Batch, Seq, new, spaces_on
from tokcompile.passes.weighted import averaged

SHORT = "it adds up all tokens, and some are gone"


def weigh(call: Call, value: Node, label: Label, dim: int) -> Node:
    """What is to be summed along an axis of tokens, each of which weighs as many as it holds.

    Raises: NeedsFull where tokens are gone that the sum has to have.
    """
    if not has_tokens(label[dim]):
        return value
    if call.rewriter.weighing.weighted(call.node):
        single = weighs(label[dim]) and call.rewriter.weighing.one_by_one(call.node)
        return call.op(aten.mul.Tensor, value, sizes_like(call, value, label, dim)) if single else value
    if is_short(call, label[dim]):
        if call.rewriter.behind_blocks(call.node) or not averaged(call.node, old(label[dim])):
            raise NeedsFull(SHORT)
        call.rewriter.averaged.add(call.node)  # a mean, and so one of those that are left
        return call.op(aten.mul.Scalar, by_share(call, value, label, dim), old(label[dim]) / new(label[dim]))
    if not sized(label[dim]):
        return value
    return call.op(aten.mul.Tensor, value, sizes_like(call, value, label, dim))


def by_share(call: Call, value: Node, label: Label, dim: int) -> Node:
    """What a mean over tokens is taken of: each weighs by its share of all that are held, unless means are to be plain ones."""
    if not sized(label[dim]) or not call.rewriter.size_weighted_mean:
        return value
    dtype = value.meta["val"].dtype
    size = call.op(aten.to.dtype, sizes_along(call, label, dim), torch.promote_types(dtype, torch.float32))
    share = call.op(aten.div.Tensor, size, call.op(aten.mean.dim, size, [dim], True))
    return call.op(aten.mul.Tensor, value, call.op(aten.to.dtype, share, dtype) if dtype.is_floating_point else share)


def sized(axis: Axis) -> bool:
    """Whether tokens on an axis were merged, and know how many they hold."""
    return any(space.size is not None for space in spaces_on(axis))


def weighs(axis: Axis) -> bool:
    """Whether a softmax gives tokens on an axis the weights of all that they hold."""
    return any(space.size is not None and space.proportional for space in spaces_on(axis))


def each(call: Call, value: Node, label: Label, dim: int) -> Node:
    """Of weights that a softmax has given to merged tokens along an axis, what one of those that they hold gets."""
    return call.op(aten.div.Tensor, value, sizes_like(call, value, label, dim))


def reaches(table: Node, label: Label, dim: int) -> bool:
    """Whether a table without reduced tokens has a number for each token on an axis of a label, aligned from the right."""
    at = dim - len(label) + len(shape(table))
    return at >= 0 and shape(table)[at] == old(label[dim]) != 1


def mean_of_each(call: Call, table: Node, label: Label, dim: int) -> tuple[Node, Label]:
    """A table at the tokens of a label, on axis `dim` its mean over all that a token holds, such as its share of a diagonal."""
    seq, rank = tokens_of(label[dim]), len(label)
    slots, batched = call.gather.assign(seq) if seq else None, label[0][:1] == label[0] and has_batch(label[0])
    if seq is None or slots is None or dim != rank - 1 or (shape(slots)[0] > 1 and not (batched and rank > 2)):
        raise NeedsFull("it adds a table by position to weights that a softmax has made one")
    value = call.coerce_node(call.given(table), plain(shape(table)), (*label[:dim], (seq.old,)))
    value = call.gather.reshape(value, [1] * (rank - len(shape(value))) + list(shape(value)))
    numbers = call.rewriter.builder.constant(torch.arange(seq.new), "slots")
    mine = call.op(aten.eq.Tensor, call.op(aten.unsqueeze.default, slots, 2), numbers)
    held = call.op(aten.to.dtype, mine, value.meta["val"].dtype)
    means = call.op(aten.div.Tensor, held, call.op(aten.sum.dim_IntList, held, [1], True))
    samples, *sizes = shape(means)
    value = call.op(aten.matmul.default, value, call.gather.reshape(means, [samples, *[1] * (rank - 3), *sizes][-rank:]))
    lead = (axis if size == new(axis) else plain((size,))[0] for size, axis in zip(shape(value), label[:dim]))
    return value, (*lead, label[dim])


def is_short(call: Call, axis: Axis) -> bool:
    """Whether a sum over an axis would miss tokens that are gone, and is no share of one that does."""
    return any(space.short for space in spaces_on(axis)) and not call.rewriter.weighing.divided(call.node)


def sizes_like(call: Call, value: Node, label: Label, dim: int) -> Node:
    """`sizes_along` in the dtype of what they are multiplied with; whole numbers for truths, which are counted."""
    dtype = value.meta["val"].dtype
    return call.op(aten.to.dtype, sizes_along(call, label, dim), torch.int64 if dtype is torch.bool else dtype)


def sizes_along(call: Call, label: Label, dim: int, log: torch.dtype | None = None) -> Node:
    """How many tokens those along axis `dim` hold, or the log of it for values of a type; it broadcasts against the label."""
    # over all samples at once, as over the windows of an image that are a batch elsewhere
    like = tuple(samples_in_line(call.gather, axis) for axis in label)
    value = call.gather.sizes(next(a for a in like[dim] if isinstance(a, Seq)))
    if log is torch.float64:
        value = call.op(aten.to.dtype, value, log)
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
