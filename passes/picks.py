"""Picks: what one reduction left of many segments, of which each space has its own part, taken as a whole again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from tokcompile.passes.graph import Builder, aten, shape
from tokcompile.passes.tokens import Space

Part = int | Space


def apart(b: Builder, value: Node, count: int) -> list[Node]:
    """A result (B * count, k, ..) as one (B, k, ..) for each segment."""
    if count == 1:
        return [value]
    sizes = shape(value)
    wide = b.emit(aten.reshape.default, value, [sizes[0] // count, count, *sizes[1:]])
    first = b.emit(aten.select.int, wide, 1, 0)
    return [first, *(b.known(first.meta["val"], aten.select.int, wide, 1, i) for i in range(1, count))]


def source(values: Sequence[Node | None]) -> Node | None:
    """(B, segments, k) that `apart` took these from, all of it in order."""
    first = values[0]
    if first is None or first.target is not aten.select.int or not isinstance(wide := first.args[0], Node):
        return None
    same = shape(wide)[1] == len(values)
    return wide if same and all(v is not None and v.args == (wide, 1, i) for i, v in enumerate(values)) else None


def together(b: Builder, values: Sequence[Node]) -> Node:
    """(B, k) of each segment as (B, segments, k)."""
    return source(values) or b.emit(aten.stack.default, list(values), 1)


def end_to_end(b: Builder, wide: Node, starts: Sequence[int] | None = None) -> Node:
    """(B, segments, k) as (B, segments * k). starts: what is added to the values of each segment."""
    if starts is not None:
        wide = b.emit(aten.add.Tensor, wide, b.constant(torch.tensor(starts)[:, None], "starts"))
    return b.emit(aten.reshape.default, wide, [shape(wide)[0], shape(wide)[1] * shape(wide)[2]])


def runs(parts: Sequence[Part], ancestors: Sequence[Part] | None = None) -> Iterator[range]:
    """Where the segments of one reduction stand among parts, of the tokens of such `ancestors`; other parts one by one."""
    at = 0
    while at < len(parts):
        part, count = parts[at], 1
        if isinstance(part, Space) and part.index is not None and part.index.target is aten.select.int:
            count = shape(part.index.args[0])[1]
            above = None if ancestors is None else ancestors[at : at + count]
            count = count if one_run(parts[at : at + count], above) else 1
        yield range(at, at + count)
        at += count


def one_run(parts: Sequence[Part], ancestors: Sequence[Part] | None) -> bool:
    """Whether parts are all that one reduction left, and so those that it was given, up to the root or up to `ancestors`."""
    spaces = [p for p in parts if isinstance(p, Space)]
    if len(spaces) < len(parts) or source([s.index for s in spaces]) is None:
        return False
    parents = [s.parent for s in spaces]
    ends = [a if isinstance(a, Space) else None for a in ancestors] if ancestors else [None] * len(parents)
    if all(p is end for p, end in zip(parents, ends)):
        return True
    above = [p for p, end in zip(parents, ends) if p is not None and p is not end]
    return len(above) == len(parents) and one_run(above, ancestors)


def within(b: Builder, run: Sequence[Part], ancestors: Sequence[Part]) -> Node:
    """(B, segments, k) positions of the tokens of a run among those of its ancestors."""
    spaces = [s for s in run if isinstance(s, Space)]
    own = together(b, [s.index for s in spaces if s.index is not None])
    parents = [s.parent for s, a in zip(spaces, ancestors) if s.parent is not None and s.parent is not a]
    return b.emit(aten.gather.default, within(b, parents, ancestors), 2, own) if parents else own


def slots(b: Builder, run: Sequence[Part]) -> Node:
    """(B, segments, root n) the slot in its space of every root token of a run."""
    spaces = [s for s in run if isinstance(s, Space)]
    own = together(b, [s.assign() for s in spaces])
    parents = [s.parent for s in spaces if s.parent is not None]
    return b.emit(aten.gather.default, own, 2, slots(b, parents)) if parents else own
