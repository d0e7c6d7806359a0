"""Groups: reductions over groups of neighbours beside which single tokens (a class token) stand in the same stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from tokcompile.passes.gather import once
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.tokens import Space

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter


def put_back(rw: Rewriter, x: Node, new: Node, start: int, stop: int) -> Node:
    """x: (B, L, D) with `new` in the place of its tokens from start to stop."""
    length, emit = shape(x)[1], rw.builder.emit
    before = [emit(aten.slice.Tensor, x, 1, 0, start)] if start else []
    after = [emit(aten.slice.Tensor, x, 1, stop, length)] if stop < length else []
    return emit(aten.cat.default, [*before, new, *after], 1) if before or after else new


def tokens_of_groups(rw: Rewriter, space: Space, unit: int, parent: Space | None) -> Space:
    """The tokens of reduced groups one by one. parent: those of the groups before this reduction, where it is not the first."""
    emit = rw.builder.emit
    n = space.n if parent else space.root_n
    tokens = Space(f"{space.name}_x{unit}", n * unit, space.k * unit, parent, ordered=space.ordered, renumber=space.renumber)
    tokens.groups, tokens.proportional = space, space.proportional
    index = space.index if parent else rw.gather.within(space.root_n, space)
    assert index is not None
    tokens.index = members(rw, index, unit)
    tokens.assign = once(lambda: members(rw, space.assign() if parent else rw.gather.slots(space), unit))
    tokens.size = emit(aten.repeat_interleave.self_int, space.size, unit, 1) if space.size is not None else None

    def derive(chosen: Callable[[Space], Tensor]) -> Tensor:
        return (chosen(space)[..., None] * unit + torch.arange(unit)).flatten(1)

    tokens.derive = derive
    return tokens


def members(rw: Rewriter, groups: Node, unit: int) -> Node:
    """(B, m) numbers of groups as (B, m * unit) numbers of their tokens."""
    b, emit = rw.builder, rw.builder.emit
    first = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, groups, 2), unit)
    each = emit(aten.add.Tensor, first, b.constant(torch.arange(unit), "members"))
    return emit(aten.reshape.default, each, [shape(groups)[0], shape(groups)[1] * unit])
