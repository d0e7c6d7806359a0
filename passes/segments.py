"""Segments: images or windows that stand side by side in one sequence and are reduced alike, as one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from tokcompile.passes.graph import aten, shape
from tokcompile.passes.picks import together
from tokcompile.passes.splice import Splice, body
from tokcompile.passes.tokens import Label, make_seq

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter


def runs(rw: Rewriter, at: Node) -> Iterator[list[Splice]]:
    """The reductions at a node in their order, those together that one module does. Each run is found when those before it
    are written."""
    todo = list(rw.splices.get(at, ()))
    while todo:
        run = [todo.pop(0)]
        while todo and follows(rw, run[-1], todo[0]):
            run.append(todo.pop(0))
        yield run


def follows(rw: Rewriter, one: Splice, other: Splice) -> bool:
    """Whether a segment stands behind one that it is like, with nothing between them, in the stream and in the taps."""
    if kind(one) is None or kind(one) != kind(other) or other.prefix <= one.prefix:
        return False
    label = rw.labels.get(one.at)
    parents = [body(s, label)[0] for s in (one, other)]
    above = [(p.k, p.size is None, p.groups is None) if p else None for p in parents]
    length = one.site.n * (1 if one.aligned else one.unit)
    labels = (label, rw.before.get(one.at, (None, label))[1])
    return above[0] == above[1] and all(begin(one, own) + length == begin(other, own) for own in labels)


def kind(s: Splice) -> tuple[Any, ...] | None:
    """Equal for segments that may go through a plan as one batch; None for one that goes by itself."""
    # text and hidden tokens are counted along the whole sequence
    if s.recipe.together is None or s.language or s.hidden or set(s.recipe.taps) & {"scores", "text_attention"}:
        return None
    site = replace(s.site, prefix=0, suffix=0)
    return s.recipe.together(s.site), id(s.recipe), site, s.block.index, s.unit, s.aligned


def begin(s: Splice, label: Label | None) -> int:
    return make_seq(body(s, label)[1]).new


def folded(rw: Rewriter, value: Node, axis: int, start: int, count: int, length: int) -> Node:
    """`count` segments of `length` along an axis, the first of which begins at `start`, as a batch: (B, .., L, ..) ->
    (B * count, .., length, ..)."""
    emit, stop = rw.builder.emit, start + count * length
    if (start, stop) != (0, shape(value)[axis]):
        value = emit(aten.slice.Tensor, value, axis, start, stop)
    if count == 1:
        return value
    sizes = list(shape(value))
    if axis > 1:
        value = emit(aten.reshape.default, value, [*sizes[:axis], count, length, *sizes[axis + 1 :]])
        order = [0, axis, *range(1, axis), *range(axis + 1, len(sizes) + 1)]
        value = emit(aten.permute.default, value, order)
    return emit(aten.reshape.default, value, [sizes[0] * count, *sizes[1:axis], length, *sizes[axis + 1 :]])


def side_by_side(rw: Rewriter, values: Sequence[Node]) -> Node:
    """(B, n) of each segment as the (B * segments, n) that goes through one reduction."""
    if len(values) == 1:
        return values[0]
    batch, n = shape(values[0])
    return rw.builder.emit(aten.reshape.default, together(rw.builder, values), [batch * len(values), n])
