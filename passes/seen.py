"""Seen: which text of a prompt its mask leaves to be seen. What it hides is padding, which is no text to a method."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tokcompile.passes.causal import HIDDEN, visible
from tokcompile.passes.fixed import program_of, read_by, value_of
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.last_token import masks_in
from tokcompile.passes.memory import ancestors_of, reachable_from
from tokcompile.passes.splice import Splice, text_ranges

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter


def masks_of(rw: Rewriter, s: Splice) -> list[tuple[Node, bool]]:
    """The masks of a block's attention that may hide padding, see `masks_in`: those that inputs make, or that do hide some."""
    moving, length = reachable_from({s.block.entry}), shape(s.at)[s.block.token_axis]
    found: dict[Node, bool] = {}
    for attention in s.block.attentions:
        for mask, marks_hidden in masks_in(rw.old, attention.mask if attention.fused else attention.node.args[0], moving):
            if len(shape(mask)) < 2 or shape(mask)[-1] != length or shape(mask)[-2] not in (1, length):
                continue
            program = program_of(rw.old, mask)
            value = None if read_by(program, rw.inputs) else value_of(program, rw.inputs)
            if value is None or not bool(itself(visible(value, marks_hidden)).all()):
                found[mask] = marks_hidden
    return list(found.items())


def itself(mask: torch.Tensor) -> torch.Tensor:
    """How each query sees its own key, which a window or a causal mask never hides."""
    return mask.diagonal(0, -2, -1) if mask.shape[-2] > 1 else mask[..., 0, :]


def seen(rw: Rewriter, s: Splice) -> Node | None:
    """(B or 1, L) float32: 1 for the original tokens that are to be seen, 0 for those that a mask hides; None without one."""
    emit, out = rw.builder.emit, None
    for mask, marks_hidden in masks_of(rw, s):
        needed = ancestors_of({mask}).union(rw.old.graph.find_nodes(op="placeholder"))
        for node in sorted(needed, key=rw.structure.order.__getitem__):
            rw.step(node)  # a block's mask may be made behind its entrance; inputs stay in their order
        value, length = rw.env[mask], shape(mask)[-1]
        dtype = value.meta["val"].dtype
        if dtype is not torch.bool:
            value = emit(aten.gt.Scalar, value, HIDDEN) if dtype.is_floating_point else emit(aten.ne.Scalar, value, 0)
        value = emit(aten.to.dtype, emit(aten.logical_not.default, value) if marks_hidden else value, torch.float32)
        if shape(value)[-2] > 1:
            value = emit(aten.mul.Tensor, value, rw.builder.constant(torch.eye(length), "itself"))
        lead = shape(value)[:-2]
        samples = s.batch if lead and lead[0] % s.batch == 0 else 1
        value = rw.gather.reshape(value, [samples, prod(shape(value)) // samples // length, length])
        value = emit(aten.amax.default, value, [1])
        out = value if out is None else emit(aten.mul.Tensor, out, value)
    return out


def text_seen(rw: Rewriter, s: Splice) -> Node | None:
    """(B or 1, T) the same of all text, in its order."""
    ranges, value = text_ranges(rw, s, original=True), seen(rw, s) if text_ranges(rw, s) else None
    if value is None:
        return None
    parts = [rw.builder.emit(aten.slice.Tensor, value, 1, *span) for span in ranges]
    return parts[0] if len(parts) == 1 else rw.builder.emit(aten.cat.default, parts, 1)


def without_hidden_text(rw: Rewriter, s: Splice, keys: Node) -> Node:
    """Keys (B, H, L, d) over the tokens that are left, in which text that is hidden has no norm."""
    text, at, done, parts = text_seen(rw, s), 0, 0, []
    if text is None:
        return keys
    emit, samples, length = rw.builder.emit, shape(text)[0], shape(keys)[2]
    for start, stop in text_ranges(rw, s):
        if start > done:
            parts.append(rw.builder.constant(torch.ones(samples, start - done), "seen"))
        parts.append(emit(aten.slice.Tensor, text, 1, at, at + stop - start))
        at, done = at + stop - start, stop
    if length > done:
        parts.append(rw.builder.constant(torch.ones(samples, length - done), "seen"))
    value = rw.gather.reshape(emit(aten.cat.default, parts, 1), [samples, 1, length, 1])
    return emit(aten.mul.Tensor, keys, emit(aten.to.dtype, value, keys.meta["val"].dtype))
