"""Splice: where in the stream of a block a reduction stands, and what stands around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.crop import Hidden
from tokcompile.passes.find import Block
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.tokens import Label, Seq, Space, is_labelled, seq_on
from tokcompile.recipe import Recipe, Site

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter


@dataclass
class Splice:
    """One reduction about to be spliced in: after node `at`, keeping `k` of the tokens there."""

    recipe: Recipe
    block: Block
    at: Node
    k: int
    site: Site
    prefix: int = 0  # where the tokens start, in the original sequence
    unit: int = 1
    tap_block: Block | None = None
    language: bool = False  # whether text stands around the tokens
    hidden: Hidden = ()  # of each sample, the original tokens that are cut off later

    @property
    def aligned(self) -> bool:
        """Whether the whole token axis can be counted in groups of `unit`, with what stands around the tokens."""
        return self.prefix % self.unit == 0 and shape(self.at)[self.block.token_axis] % self.unit == 0

    @property
    def batch(self) -> int:
        return self.block.batch


def body(s: Splice, label: Label | None) -> tuple[Space | None, list[Any], list[Any]]:
    """(the space to be reduced further or None, the parts before it, the parts after it), in groups of `unit` where these
    can be counted through the whole axis."""
    unit, n = (s.unit, s.site.n) if s.aligned else (1, s.site.n * s.unit)
    axis = label[s.block.token_axis] if label is not None and is_labelled(label) else ()
    seq = seq_on(axis)
    parts: list[Any] = list(seq.parts) if seq else [shape(s.at)[s.block.token_axis] // unit]
    start, at = s.prefix // unit, 0
    for i, part in enumerate(parts):
        width = part if isinstance(part, int) else part.root_n
        if isinstance(part, Space) and at == start:
            if part.k != n:
                raise UnsupportedGraph(
                    f"the plan expects {n} tokens here, but this stream still has {part.k}: it does not come from "
                    "the block that was reduced before",
                    s.at,
                    "reduce within one stack of blocks: where=[...]",
                )
            return part, parts[:i], parts[i + 1 :]
        fits = isinstance(part, int) and at <= start and start + n <= at + width
        if fits and (not s.aligned or start + n + s.site.suffix == shape(s.at)[s.block.token_axis] // unit):
            rest = at + width - start - n
            return None, [*parts[:i], *[start - at] * (start > at)], [*[rest] * (rest > 0), *parts[i + 1 :]]
        at += width
    expected = start + n + s.site.suffix
    if seq is None and s.aligned and expected < parts[0]:
        raise UnsupportedGraph(
            f"the plan expects {expected} tokens here, but all {parts[0]} are there again: they were given back on the way "
            "from the reduction before",
            s.at,
            "reduce at one place only, as with where=[one block], or in blocks that no such place lies between",
        )
    raise UnsupportedGraph(
        f"tokens {s.prefix}.. are not one run of the token axis {parts} here",
        s.at,
        "reduce within one stack of blocks, whose tokens are the same: where=[...]",
    )


def text_ranges(rw: Rewriter, s: Splice, original: bool = False) -> tuple[tuple[int, int], ...]:
    """The (start, stop) of text among the tokens that the taps are read over, or among the original ones; none in a
    vision tower."""
    if not s.language or s.unit > 1:
        return ()
    label = rw.before[s.at][1]
    axis = label[s.block.token_axis] if label is not None and is_labelled(label) else ()
    seq = seq_on(axis) or Seq((shape(s.at)[s.block.token_axis],))
    visual = sorted((t.prefix, t.prefix + t.site.n) for t in rw.splices[s.at])
    ranges, old, new = [], 0, 0
    for part in seq.parts:
        if isinstance(part, int):
            edges = [old, *(min(max(e, old), old + part) for span in visual for e in span), old + part]
            shift = 0 if original else new - old
            ranges += [(a + shift, b + shift) for a, b in zip(edges[::2], edges[1::2]) if b > a]
        old, new = (old + part, new + part) if isinstance(part, int) else (old + part.root_n, new + part.k)
    return tuple(ranges)


def standard(rw: Rewriter, x: Node, block: Block) -> Node:
    """The residual stream as (B, L, D)."""
    if block.batch_axis is None:
        return rw.builder.emit(aten.unsqueeze.default, x, 0)
    return x if block.token_axis == 1 else rw.builder.emit(aten.transpose.int, x, 0, 1)


def native(rw: Rewriter, x: Node, block: Block) -> Node:
    """(B, L, D) back as the model has it."""
    if block.batch_axis is None:
        return rw.builder.emit(aten.squeeze.dims, x, [0])
    return x if block.token_axis == 1 else rw.builder.emit(aten.transpose.int, x, 0, 1)
