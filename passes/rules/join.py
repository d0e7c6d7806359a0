"""Ops that put token axes together or take them apart: cat, stack, slice, select, split, unbind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch.fx import Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.batch import samples_in_line
from tokcompile.passes.gather import samples
from tokcompile.passes.graph import aten, bind, packet, shape
from tokcompile.passes.rules.core import Batch, Call, Label, NeedsFull, has_batch, has_tokens, old, plain, rule, tokens_of
from tokcompile.passes.tokens import Axis, Seq, Space, extent, make_seq, new_shape, normal, spaces_on


@rule("aten.cat")
def cat(call: Call) -> Any:
    rank = len(call.old_shape)
    dim = call["dim"] % rank
    labels, values = [in_line(call, one, dim) for one in call.labels("tensors")], call["tensors"]
    if not any(has_tokens(one[dim]) for one in labels) and (batch := put_back(call, labels, dim)) is not None:
        return call.typed(call.op(aten.cat.default, values, dim), batch)
    if any(has_batch(one[dim]) for one in labels):
        raise NeedsFull("it puts samples together")
    joined = call.join([with_axis(one, dim, ()) for one in labels])
    keep_depths(call, [with_axis(one, dim, ()) for one in labels], joined)
    if not any(has_tokens(one[dim]) for one in labels):
        out = with_axis(joined, dim, plain(call.old_shape[dim : dim + 1])[0])
    else:
        parts: list[Any] = []
        unit = next(grouped(one[dim])[1] for one in labels if has_tokens(one[dim]))
        for one in labels:
            seq, own = grouped(one[dim])
            if (seq is None and has_tokens(one[dim])) or (seq is not None and own != unit) or old(one[dim]) % unit:
                raise NeedsFull("it joins groups of tokens end to end")
            parts += seq.parts if seq else [old(one[dim]) // unit]
        out = with_axis(joined, dim, normal((make_seq(parts), unit)))
    operands = [call.coerce_node(v, one, with_axis(joined, dim, one[dim])) for v, one in zip(values, labels)]
    return call.emit(out, tensors=[widened(call, v, joined, dim) for v in operands])


def keep_depths(call: Call, labels: Sequence[Label], joined: Label) -> None:
    """Raises: NeedsFull behind the blocks where features of several depths are put side by side, and the first ones still have
    tokens that are given back at the end: each is given back those that it lacks."""
    rw = call.rewriter
    if rw.outputs != "keep" or rw.recover == "never" or not rw.behind_blocks(call.node):
        return
    for node, label in zip(call.old_args["tensors"], labels):
        earlier = any(has_tokens(want) and old(own) == old(want) and own != want for own, want in zip(label, joined))
        if earlier and (rw.is_labelled(node) or node in rw.reduced_later):
            raise NeedsFull("it puts features of several depths side by side, of which the first have more tokens")


def put_back(call: Call, labels: Sequence[Label], dim: int) -> Label | None:
    """The label of samples that are joined along the batch as they stood in it; None for others."""
    firsts = labels[0]
    if len(labels) < 2 or any(
        list(map(old, with_axis(one, dim, ()))) != list(map(old, with_axis(firsts, dim, ()))) for one in labels
    ):
        return None
    spaces = [[s for d, axis in enumerate(one) if d != dim for s in spaces_on(axis)] for one in labels]
    if not spaces[0] or any(len(one) != len(spaces[0]) for one in spaces):
        return None
    whole: dict[Space, Space] = {}
    for column in zip(*spaces):
        found = [call.gather.sampled(space) for space in column]
        if any(base is space for (base, _), space in zip(found, column)) or len({base for base, _ in found}) > 1:
            return None
        base, rows = found[0][0], [i for _, rows in found for i in rows]
        if rows != list(range(samples(Seq((base,))))) or any(len(r) != old(one[dim]) for (_, r), one in zip(found, labels)):
            return None
        whole[column[0]] = base
    parts = lambda a: Seq(tuple(whole.get(p, p) if isinstance(p, Space) else p for p in a.parts))  # noqa: E731
    out = [tuple(parts(a) if isinstance(a, Seq) else a for a in axis) for axis in firsts]
    return with_axis(tuple(out), dim, (Batch(sum(old(one[dim]) for one in labels)),))


def widened(call: Call, value: Any, joined: Label, dim: int) -> Any:
    """An operand that gained the batch is as wide as the others; one that did not may still have to be repeated."""
    sizes = [shape(value)[d] if d == dim else size for d, size in enumerate(new_shape(joined))]
    return value if list(shape(value)) == sizes else call.op(aten.expand.default, value, sizes)


def is_batch(axis: Axis) -> bool:
    return len(axis) == 1 and isinstance(axis[0], Batch)


def with_axis(label: Label, dim: int, axis: Axis) -> Label:
    return (*label[:dim], axis, *label[dim + 1 :])


@rule("aten.stack")
def stack(call: Call) -> Any:
    label = call.join(call.labels("tensors"))
    keep_depths(call, call.labels("tensors"), label)
    operands = [call.coerce_node(v, one, label) for v, one in zip(call["tensors"], call.labels("tensors"))]
    dim = call["dim"] % (len(label) + 1)
    out = (*label[:dim], plain((len(operands),))[0], *label[dim:])
    return call.emit(out, tensors=[widened(call, v, label, -1) for v in operands])


@rule("aten.slice", "aten.narrow")
def slice_(call: Call) -> Any:
    dim = (call["dim"] or 0) % len(call.label("self"))
    label = in_line(call, call.label("self"), dim)
    size = old(label[dim])
    if "length" in call.args:
        start, stop, step = call["start"] % size, call["start"] % size + call["length"], 1
    else:
        start, stop, step = slice(call["start"], call["end"], call["step"]).indices(size)
    if (start, stop, step) == (0, size, 1):
        return call["self"], label
    if has_batch(label[dim]):
        return some_samples(call, label, dim, start, stop)
    if not has_tokens(label[dim]):
        return call.emit(with_axis(label, dim, plain(call.old_shape[dim : dim + 1])[0]))
    value, axis = cut(call, call["self"], label, dim, start, stop, step, siblings(call.old_args["self"], dim, size))
    return call.typed(value, with_axis(label, dim, axis))


def siblings(source: Node, dim: int, size: int) -> list[int]:
    """Where slices of one tensor begin and end along an axis."""
    slices = [bind(user) for user in source.users if packet(user) == "aten.slice"]
    same = [a for a in slices if (a["dim"] or 0) % len(shape(source)) == dim]
    return [edge for a in same for edge in slice(a["start"], a["end"]).indices(size)[:2]]


def cut(
    call: Call, value: Any, label: Label, dim: int, start: int, stop: int, step: int = 1, edges: Sequence[int] = ()
) -> tuple[Any, Axis]:
    """Old positions start:stop of a token axis, where that cuts between parts (and between groups of rows). edges: all
    positions at which the op cuts, which are noted at once where one of them is within reduced tokens."""
    seq, unit = grouped(label[dim])
    if seq is None or step != 1 or start % unit or stop % unit:
        raise NeedsFull("it takes every other token, or a slice of grouped ones")
    start, stop = start // unit, stop // unit
    parts, new_start, new_length, at = [], 0, 0, 0
    for part in seq.parts:
        width, kept = extent(part)
        lo, hi = max(start, at), min(stop, at + width)
        whole = isinstance(part, Space)
        if lo < hi:
            if isinstance(part, Space) and (lo, hi) != (at, at + width):
                if not kept:
                    raise nothing_left(call)
                shift = 0 if part.start is None else part.start - at  # what stood before was cut off, or joined since
                places = {start, stop, *(e // unit for e in edges if e % unit == 0)} - {0, seq.old}
                call.rewriter.cuts |= {place + shift for place in places}
                raise NeedsFull("it cuts through the reduced tokens")
            parts.append(part if whole else hi - lo)
            new_length += kept if whole else hi - lo
            new_start += 0 if whole else lo - at
        elif at + width <= start:
            new_start += kept
        at += width
    if parts and not new_length:
        raise nothing_left(call)
    axis = normal((make_seq(parts), unit)) if parts else ()
    return call.op(aten.slice.Tensor, value, dim, new_start * unit, (new_start + new_length) * unit), axis


def nothing_left(call: Call) -> UnsupportedGraph:
    return UnsupportedGraph(
        "it takes tokens of which none is left: all of them were dropped",
        call.node,
        "leave what is read later, such as the last token of a prompt, out of the spans",
    )


def in_line(call: Call, label: Label, dim: int) -> Label:
    """A label with the samples of one axis in line."""
    return with_axis(label, dim, samples_in_line(call.gather, label[dim]))


def one_sample(call: Call, value: Any, label: Label, dim: int, index: int) -> Any:
    """Sample `index` of the batch that axis `dim` is."""
    rest = label[:dim] + label[dim + 1 :]
    row = range(index, index + 1)
    alone = [tuple(call.gather.samples_of(a, row) if isinstance(a, Seq) else a for a in axis) for axis in rest]
    return call.typed(call.op(aten.select.int, value, dim, index), tuple(alone))


def some_samples(call: Call, label: Label, dim: int, start: int, stop: int) -> Any:
    """Samples start:stop of the batch."""
    if not is_batch(label[dim]):
        raise NeedsFull("it takes some of the samples")
    if stop - start != 1:
        rows = range(start, stop)
        some = [tuple(call.gather.samples_of(a, rows) if isinstance(a, Seq) else a for a in axis) for axis in label]
        value = call.op(aten.slice.Tensor, call["self"], dim, start, stop)
        return call.typed(value, with_axis(tuple(some), dim, (Batch(len(rows)),)))
    value, alone = one_sample(call, call["self"], label, dim, start)
    return call.typed(call.op(aten.unsqueeze.default, value, dim), (*alone[:dim], (), *alone[dim:]))


def grouped(axis: Axis) -> tuple[Seq | None, int]:
    """The tokens of an axis of tokens, or of groups of `unit` rows each."""
    if len(axis) == 2 and isinstance(axis[0], Seq) and isinstance(axis[1], int):
        return axis[0], axis[1]
    return tokens_of(axis), 1


@rule("aten.select")
def select(call: Call) -> Any:
    label = call.label("self")
    dim = call["dim"] % len(label)
    index = call["index"] % old(label[dim])
    if is_batch(label[dim]):
        return one_sample(call, call["self"], label, dim, index)
    if not has_tokens(label[dim]):
        if has_batch(label[dim]):
            raise NeedsFull("it picks one of several rows of each sample")
        return call.emit(label[:dim] + label[dim + 1 :])
    value, axis = cut(call, call["self"], label, dim, index, index + 1)
    if any(isinstance(a, Seq) for a in axis):
        raise NeedsFull("it picks one of the reduced tokens")
    return call.typed(call.op(aten.select.int, value, dim, 0), label[:dim] + label[dim + 1 :])


@rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split",
    "aten.unsafe_chunk",
    "aten.unsafe_split",
    "aten.hsplit",
    "aten.vsplit",
    "aten.dsplit",
)
def split(call: Call) -> Any:
    dim = call.args.get("dim", 0) % len(call.label("self"))
    label = in_line(call, call.label("self"), dim)
    pieces = [v.shape for v in call.node.meta["val"]]
    if has_batch(label[dim]):
        starts = [sum(p[dim] for p in pieces[:i]) for i in range(len(pieces))]
        return [some_samples(call, label, dim, at, at + piece[dim]) for at, piece in zip(starts, pieces)]
    if not has_tokens(label[dim]):
        return call.emit([with_axis(label, dim, plain((piece[dim],))[0]) for piece in pieces])
    out, at, edges = [], 0, list(accumulate(piece[dim] for piece in pieces))
    for piece in pieces:
        value, axis = cut(call, call["self"], label, dim, at, at + piece[dim], edges=edges)
        out.append(call.typed(value, with_axis(label, dim, axis)))
        at += piece[dim]
    return out


@rule("aten.unbind")
def unbind(call: Call) -> Any:
    label = call.label("self")
    dim = call["dim"] % len(label)
    if is_batch(label[dim]):
        return [one_sample(call, call["self"], label, dim, i) for i in range(old(label[dim]))]
    if has_tokens(label[dim]) or has_batch(label[dim]):
        raise NeedsFull("it handles each token by itself")
    return call.emit([label[:dim] + label[dim + 1 :]] * old(label[dim]))


@rule("aten.slice_scatter")
def slice_scatter(call: Call) -> Any:
    """base with base[start:end] = src: where tokens are cut between parts, a join of what is left and what is written."""
    label, source = call.label("self"), call.label("src")
    dim = call["dim"] % len(label)
    if not has_tokens(label[dim]) and not has_tokens(source[dim]):
        rest = call.join([with_axis(label, dim, ()), with_axis(source, dim, ())])
        out = with_axis(rest, dim, label[dim])
        return call.emit(out, self=call.coerce("self", out), src=call.coerce("src", with_axis(rest, dim, source[dim])))
    raise NeedsFull("it writes into part of the token axis")
