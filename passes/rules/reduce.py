"""Reductions over axes: over tokens they run over the kept ones, each weighing as many as it holds."""

from __future__ import annotations

import operator
from math import inf, prod
from typing import Any

from tokcompile.passes.graph import aten, packet
from tokcompile.passes.rules.core import Axis, Call, Label, NeedsFull, has_tokens, old, one_sample, rule, tokens_of
from tokcompile.passes.rules.sizes import SHORT, by_share, is_short, sized, sizes_like, weigh
from tokcompile.passes.tokens import new


def dims_of(call: Call, label: Label) -> list[int]:
    """The axes that an op reduces. Raises: NeedsFull for the batch alone, in which each sample keeps other tokens."""
    dim, rank = call.args.get("dim"), len(label)
    dims = list(range(rank)) if dim is None or dim == [] else [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    one_sample(label, dims)
    return dims


def reduced(label: Label, dims: list[int], keep: bool) -> Label:
    return tuple(() if d in dims else axis for d, axis in enumerate(label) if keep or d not in dims)


@rule("aten.sum", "aten.nansum")
def total(call: Call) -> Any:
    label = call.label("self")
    dims = dims_of(call, label)
    value = call["self"]
    for dim in dims:
        value = weigh(call, value, label, dim)
    return call.emit(reduced(label, dims, bool(call.args.get("keepdim"))), self=value)


@rule("aten.mean")
def mean(call: Call) -> Any:
    label = call.label("self")
    dims = dims_of(call, label)
    out = reduced(label, dims, bool(call.args.get("keepdim")))
    if call.rewriter.weighing.weighted(call.node):  # divided by how many there were
        left = prod(new(label[d]) / old(label[d]) for d in dims if has_tokens(label[d]))
        value = call["self"]
        for dim in dims:
            value = weigh(call, value, label, dim)
        value, _ = call.emit(out, self=value)
        return call.typed(value if left == 1 else call.op(aten.mul.Scalar, value, left), out)
    value = call["self"]
    for dim in (d for d in dims if has_tokens(label[d])):
        value = by_share(call, value, label, dim)
    return call.emit(out, self=value)


@rule("aten.amax", "aten.amin", "aten.all", "aten.any")
def other(call: Call) -> Any:
    """Over tokens: over those that are left."""
    name = call.tensors()[0]
    label = call.label(name)
    return call.emit(reduced(label, dims_of(call, label), bool(call.args.get("keepdim"))))


@rule("aten.logsumexp", "aten.linalg_vector_norm", "aten.norm", "aten.frobenius_norm", "aten.prod")
def sum_within(call: Call) -> Any:
    """Sums of exponentials, powers or logarithms."""
    label, name, order = call.label("self"), packet(call.node), call.args.get("ord", call.args.get("p"))
    dims, order = dims_of(call, label), 2 if order is None else order
    out = reduced(label, dims, bool(call.args.get("keepdim")))
    if any(is_short(call, label[d]) for d in dims) or (order == 0 and any(has_tokens(label[d]) for d in dims)):
        raise NeedsFull(SHORT)
    value = call["self"]
    for dim in (d for d in dims if sized(label[d])):
        size = sizes_like(call, value, label, dim)
        if name == "aten.logsumexp":
            value = call.op(aten.add.Tensor, value, call.op(aten.log.default, size))
        elif name == "aten.prod":
            value = call.op(aten.pow.Tensor_Tensor, value, size)
        elif abs(order) < inf:
            value = call.op(aten.mul.Tensor, value, call.op(aten.pow.Tensor_Scalar, size, 1 / order))
    return call.emit(out, self=value)


@rule("aten.var", "aten.std", "aten.var_mean", "aten.std_mean")
def moments(call: Call) -> Any:
    label = call.label("self")
    dims = dims_of(call, label)
    if any(has_tokens(label[d]) for d in dims):
        raise NeedsFull("its statistics run over all tokens")
    out = reduced(label, dims, bool(call.args.get("keepdim")))
    return call.emit([out, out] if "mean" in str(call.node.target) else out)


@rule("aten.max", "aten.min")
def extremes(call: Call) -> Any:
    if "other" in call.args:
        from tokcompile.passes.rules.pointwise import pointwise

        return pointwise(call)
    label = call.label("self")
    dims = dims_of(call, label)
    out = reduced(label, dims, bool(call.args.get("keepdim")))
    if "dim" not in call.args:
        return call.emit(out)
    read = {u.args[1] for u in call.node.users if u.target is operator.getitem and u.users}
    # behind the blocks tokens are given back at no cost, and the largest is the same
    if any(has_tokens(label[d]) for d in dims) and (read != {0} or call.rewriter.behind_blocks(call.node)):
        raise NeedsFull("it gives positions of tokens")
    return call.emit([out, out])


@rule(
    "aten.argmax",
    "aten.argmin",
    "aten.topk",
    "aten.argsort",
    "aten.cumsum",
    "aten.cumprod",
    "aten.kthvalue",
)
def positions(call: Call) -> Any:
    """Along other axes only: over tokens, positions and running sums would mean something else."""
    label = call.label("self")
    dim = call.args.get("dim")
    if dim is None or (has_tokens(label[dim % len(label)]) and not thresholds(call, label[dim % len(label)])):
        raise NeedsFull("it gives positions of tokens")
    if sized(label[dim % len(label)]):
        raise NeedsFull("it takes the largest of all tokens, of which one now stands for several")
    one_sample(label, [dim])
    value = call.node.meta["val"]
    if isinstance(value, (tuple, list)):
        size = value[0].shape[dim % len(label)]
        out = tuple((size,) if d == dim % len(label) else axis for d, axis in enumerate(label))
        return call.emit([out, out])
    keep = call.args.get("keepdim", True) if "arg" in str(call.node.target) and "sort" not in str(call.node.target) else None
    return call.emit(label if keep is None else reduced(label, [dim % len(label)], bool(keep)))


def thresholds(call: Call, axis: Axis) -> bool:
    """Whether top-k is asked for its values alone, as by attention to the largest scores, and enough tokens are left. Behind
    the blocks tokens are given back at no cost."""
    if packet(call.node) != "aten.topk" or not call.args.get("largest", True) or call.rewriter.behind_blocks(call.node):
        return False
    read = {u.args[1] for u in call.node.users if u.users}
    return read == {0} and tokens_of(axis) is not None and new(axis) >= call["k"]
