"""Table look-ups and indexing."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from tokcompile.passes.crop import joint_hidden
from tokcompile.passes.graph import get_attr, shape
from tokcompile.passes.groups import tokens_of_groups
from tokcompile.passes.order import CutOff, permuted
from tokcompile.passes.rules.core import Axis, Call, Label, NeedsFull, has_tokens, old, one_sample, plain, rule, tokens_of
from tokcompile.passes.rules.join import grouped
from tokcompile.passes.tokens import make_seq


@rule("aten.embedding")
def embedding(call: Call) -> Any:
    """Each index becomes a row."""
    if any(has_tokens(a) for a in call.label("weight")):
        raise NeedsFull("it looks reduced tokens up by position")
    return call.emit((*call.label("indices"), plain(call.old_shape[-1:])[0]))


@rule("aten.one_hot")
def one_hot(call: Call) -> Any:
    """Each index becomes an axis of its own."""
    return call.emit((*call.label("self"), plain(call.old_shape[-1:])[0]))


@rule("aten.index_select")
def index_select(call: Call) -> Any:
    label = list(call.label("self"))
    dim = call["dim"] % len(label)
    if has_tokens(label[dim]):
        return in_order(call, dim, call.old_args["index"])
    if call.labelled("index"):
        raise NeedsFull("it reorders tokens by position")
    one_sample(tuple(label), [dim])
    label[dim] = plain(call.old_shape[dim : dim + 1])[0]
    return call.emit(tuple(label))


def in_order(call: Call, dim: int, index: Node) -> Any:
    """Tokens put in another order by a constant: windows undone, rows of a mosaic."""
    label = call.label("self")
    order = get_attr(call.rewriter.old, index.target) if index.op == "get_attr" else None
    label = (*label[:dim], one_by_one(call, label[dim]), *label[dim + 1 :])
    if order is None or order.is_meta or order.dim() != 1 or tokens_of(label[dim]) is None:
        raise NeedsFull("it picks tokens by position")
    if any(len(axis) > 1 for axis in label):
        raise NeedsFull("it picks tokens by position, and other axes are folded into each other")
    atoms = [axis[0] if axis else 1 for axis in label]
    order = order.long().cpu() % max(old(label[dim]), 1)
    try:
        found = permuted(call.gather, call["self"], atoms, dim, order, call.node)
    except CutOff as cut:
        call.rewriter.hidden = joint_hidden(call.rewriter.hidden, cut.hidden)
        raise NeedsFull("it picks some tokens by position") from cut
    if found is None:
        raise NeedsFull("it picks few tokens, or some of them twice, by position")
    value, seq = found
    return call.typed(value, (*label[:dim], (seq,), *label[dim + 1 :]))


def one_by_one(call: Call, axis: Axis) -> Axis:
    """An axis of groups as the tokens in them."""
    seq, unit = grouped(axis)
    if seq is None or unit == 1:
        return axis
    parts = [p * unit if isinstance(p, int) else tokens_of_groups(call.rewriter, p, unit, None) for p in seq.parts]
    return (make_seq(parts),)


@rule("aten.index")
def advanced_index(call: Call) -> Any:
    """Plain index tensors on axes without tokens; a single labelled index into a plain table."""
    label, indices = call.label("self"), call.old_args["indices"]
    given = [(d, i) for d, i in enumerate(indices) if isinstance(i, Node)]
    if len(given) == 1 and has_tokens(label[given[0][0]]):
        return in_order(call, *given[0])
    if any(has_tokens(label[d]) or any(not isinstance(a, int) for a in label[d]) for d, _ in given):
        raise NeedsFull("it picks tokens by position")
    dims = [d for d, _ in given]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        raise NeedsFull("an index with gaps between its axes")
    joined = call.join(call.label_of(i) for _, i in given)
    values = [
        call.coerce_node(call.rewriter.env[i], call.label_of(i), joined) if isinstance(i, Node) else None for i in indices
    ]
    out = (*label[: dims[0]], *joined, *label[dims[-1] + 1 :])
    return call.emit(out, indices=values)


@rule("aten.gather", "aten.take_along_dim")
def gather(call: Call) -> Any:
    """Along an axis without tokens, self and index over the same tokens elsewhere."""
    index = "index" if "index" in call.args else "indices"
    label, other = call.label("self"), call.label(index)
    dim = call["dim"] % len(label)
    if has_tokens(label[dim]) or has_tokens(other[dim]):
        raise NeedsFull("it picks tokens by position")
    one_sample(label, [dim])
    mine, want = joined_beside(call, dim, label, other)
    return call.emit(want, **{"self": call.coerce("self", mine), index: call.coerce(index, want)})


def joined_beside(call: Call, dim: int, label: Label, other: Label) -> tuple[Label, Label]:
    """Both labels over the same tokens along all axes but `dim`."""
    rest = call.join([one[:dim] + ((),) + one[dim + 1 :] for one in (label, other)])
    return (*rest[:dim], label[dim], *rest[dim + 1 :]), (*rest[:dim], other[dim], *rest[dim + 1 :])


@rule("aten.scatter", "aten.scatter_add")
def scatter(call: Call) -> Any:
    """Along an axis without tokens, self, index and source over the same tokens elsewhere."""
    label, other = call.label("self"), call.label("index")
    dim = call["dim"] % len(label)
    elsewhere = [(label[d], other[d]) for d in range(len(label)) if d != dim]
    if has_tokens(label[dim]) or has_tokens(other[dim]) or any(old(mine) != old(its) for mine, its in elsewhere):
        return writes(call)
    one_sample(label, [dim])
    into, index = joined_beside(call, dim, label, other)
    source = {"src": call.coerce("src", index)} if call.is_tensor("src") else {}
    return call.emit(into, **{"self": call.coerce("self", into), "index": call.coerce("index", index), **source})


@rule("aten.index_put")
def index_put(call: Call) -> Any:
    """One number at constant places of an axis without tokens, such as logits of words that are never said."""
    label = call.label("self")
    places = [d for d, index in enumerate(call.old_args["indices"]) if index is not None]
    one = len(places) == 1 and len(shape(call.old_args["indices"][places[0]])) == 1 and call.is_tensor("values")
    if not one or has_tokens(label[places[0]]) or prod(shape(call.old_args["values"])) != 1:
        return writes(call)
    if call.labelled("values") or call.rewriter.is_labelled(call.old_args["indices"][places[0]]):
        return writes(call)
    return call.emit(label)


@rule("aten.masked_scatter", "aten.index_add", "aten.index_copy")
def writes(call: Call) -> Any:
    raise NeedsFull(f"it writes at positions of a tensor of shape {shape(call.node)}")
