"""Batch: views between samples one after the other in one sequence, each with its own tokens left, and a batch of sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from tokcompile.passes.gather import Gatherer, once
from tokcompile.passes.graph import aten
from tokcompile.passes.tokens import Axis, Batch, Label, Seq, Space, make_seq, tokens_of

Run = list[int | Space]


def cut_by_sample(g: Gatherer, label: Label, sizes: tuple[int, ...]) -> Label | None:
    """The label of a view to these sizes that takes tokens of several samples apart, or puts them in line."""
    if label and len(label[0]) == 2 and isinstance(label[0][0], Batch):  # images one after the other, as (B * L, ..)
        label = (label[0][:1], label[0][1:], *label[1:])
    ways = (read(g, label, sizes) for read in (side_by_side, in_line, apart))
    return next((found for found in ways if found is not None), None)


def side_by_side(g: Gatherer, label: Label, sizes: tuple[int, ...]) -> Label | None:
    """The label of (B * L, ..) tokens viewed as (B, L, ..); None where the samples are not cut alike, or keep other numbers."""
    seq = tokens_of(label[0]) if label else None
    if seq is None or len(sizes) < 2 or sizes[0] < 2 or seq.old != sizes[0] * sizes[1]:
        return None
    runs = runs_of(seq, sizes[0])
    if runs is None:
        return None
    columns = [g.stacks[column] if column in g.stacks else stacked(g, column) for column in zip(*runs)]
    g.stacks.update(zip(zip(*runs), columns))
    if any(c is None for c in columns):
        return None
    return (Batch(sizes[0]),), (make_seq(c for c in columns if c is not None),), *label[1:]


def in_line(g: Gatherer, label: Label, sizes: tuple[int, ...]) -> Label | None:
    """The label of (B * W, L, ..) windows or cameras viewed as (B, W * L, ..), those of a sample side by side."""
    many, seq = rows_of(label)
    if seq is None or not sizes or many % sizes[0] or sizes[1:2] != (many // sizes[0] * seq.old,):
        return None
    each = many // sizes[0]
    parts = (part for i in range(each) for part in g.samples_of(seq, range(i, many, each)).parts)
    return (Batch(sizes[0]),), (make_seq(parts),), *label[2:]


def apart(g: Gatherer, label: Label, sizes: tuple[int, ...]) -> Label | None:
    """The label of (B, W * L, ..) viewed as (B * W, L, ..), where its tokens are windows that were once apart."""
    count, seq = rows_of(label)
    if seq is None or not sizes or sizes[0] % count or sizes[1:2] != (seq.old * count // sizes[0],):
        return None
    each, parts = sizes[0] // count, []
    for column in zip(*(runs_of(seq, each) or ())):
        first = column[0]
        if isinstance(first, Space):
            first, _ = g.sampled(first)
            if any(g.sampled(s) != (first, range(i, sizes[0], each)) for i, s in enumerate(column)):
                return None
        parts.append(first)
    return ((Batch(sizes[0]),), (make_seq(parts),), *label[2:]) if parts else None


def rows_of(label: Label) -> tuple[int, Seq | None]:
    """How many samples, windows or the like (B, L, ..) tokens belong to, and the tokens of each; none in other tensors."""
    if len(label) < 2 or len(label[0]) != 1 or not isinstance(label[0][0], Batch):
        return 1, None
    return label[0][0].size, tokens_of(label[1])


def unbatched(g: Gatherer, have: Label, want: Label) -> tuple[Label, Label]:
    """Two labels of which one sees samples one after the other, or tiles, and the other sees a batch, both without a batch."""
    have = ((),) * (len(want) - len(have)) + tuple(have)
    line = lambda axis: samples_in_line(g, flat(g, axis))  # noqa: E731
    lengths = {(1, 2), (2, 1), (2, 2)}
    both = [
        (line(own), line(other)) if own != other and (len(own), len(other)) in lengths and own[0] != other[0] else (own, other)
        for own, other in zip(have, want, strict=True)
    ]
    return tuple(own for own, _ in both), tuple(other for _, other in both)


def samples_in_line(g: Gatherer, axis: Axis) -> Axis:
    """Where an axis is the tokens of a whole batch, one after the other, each sample's become a run of their own."""
    if len(axis) < 2 or not isinstance(axis[0], Batch) or not isinstance(axis[1], Seq):
        return axis
    return (make_seq(part for i in range(axis[0].size) for part in g.samples_of(axis[1], range(i, i + 1)).parts), *axis[2:])


def flat(g: Gatherer, axis: Axis) -> Axis:
    """(B, L) on one axis, of samples that once were side by side in a sequence, as that sequence; others as they are."""
    if len(axis) != 2 or not isinstance(axis[0], Batch) or not isinstance(axis[1], Seq):
        return axis
    stacks = {after: before for before, after in g.stacks.items() if after is not None}
    columns = [(part,) * axis[0].size if isinstance(part, int) else stacks.get(part) for part in axis[1].parts]
    if any(column is None for column in columns):
        return axis
    return (make_seq(part for run in zip(*columns) for part in run),)


def runs_of(seq: Seq, count: int) -> list[Run] | None:
    """The parts of `count` equal runs."""
    length, runs, at = seq.old // count, [Run()], 0
    todo: Run = list(seq.parts)
    while todo:
        part = todo.pop(0)
        size = part if isinstance(part, int) else part.root_n
        if at + size > length:
            if isinstance(part, Space):
                return None
            todo.insert(0, at + size - length)
            part = size = length - at
        runs[-1].append(part)
        at += size
        if at == length and todo:
            runs.append([])
            at = 0
    same = {tuple(p if isinstance(p, int) else (p.root_n, p.k) for p in run) for run in runs}
    return runs if len(runs) == count and len(same) == 1 else None


def stacked(g: Gatherer, column: tuple[int | Space, ...]) -> int | Space | None:
    """The same part of each sample as one part of a batch."""
    spaces = [p for p in column if isinstance(p, Space)]
    if not spaces:
        return column[0]
    first, source = spaces[0], spaces[0].sources[0] if spaces[0].sources else None
    if isinstance(source, Space) and all(g.sampled(s) == (source, range(i, i + 1)) for i, s in enumerate(spaces)):
        return source
    if any(s.index is None or s.index.meta["val"].shape[0] != 1 or g.several(s) is not None for s in spaces):
        return None

    def cat(values: list[Node]) -> Node:
        return g.b.emit(aten.cat.default, values, 0)

    ordered, renumber = all(s.in_order for s in spaces), any(s.renumber for s in spaces)
    space = Space(f"{'_'.join(s.name for s in spaces)}_b", first.root_n, first.k, ordered=ordered, renumber=renumber)
    space.index = cat([g.within(s.root_n, s) for s in spaces])
    space.assign = once(lambda: cat([g.slots(s) for s in spaces]))
    if any(s.size is not None for s in spaces):
        space.size = cat([g.sizes(Seq((s,))) for s in spaces])
    space.proportional = any(s.proportional for s in spaces)
    space.sources = (first,)  # they are as many in each sample

    def derive(chosen: Callable[[Space], Tensor]) -> Tensor:
        return torch.cat([chosen(s) for s in spaces])

    space.derive = derive
    return space
