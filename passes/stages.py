"""Stages: runs of blocks over the same tokens, and where these were laid out, read off the graph."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch.fx import Node

from tokcompile.passes.graph import packet, shape
from tokcompile.passes.origin import PATCHES, origin
from tokcompile.passes.placeholders import APART, SPANS, WRITES


@dataclass
class Stage:
    """A run of blocks over the same tokens: `length` in all, of which `n` between prefix and suffix are visual.

    text: whether it is the stream of a language model; spans: where image features were written into it, if anywhere; apart:
    how samples differ in that, in words, if they do.
    """

    length: int
    prefix: int
    suffix: int
    grid: tuple[int, ...] | None
    visual: bool
    text: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    apart: str = ""

    @property
    def n(self) -> int:
        return self.length - self.prefix - self.suffix


def make_stage(
    entry: Node, axis: int, length: int, dependent: set[Node], upstream: set[Node], queries: bool, features: bool = False
) -> Stage:
    """The stage whose tokens come in at `entry`. dependent: what depends on the inputs; upstream: what of it comes before;
    queries: whether the tokens are weights that look at image features, as in a decoder, and no patches; features: whether
    they become image features in a prompt."""
    spans = placeholder_spans(upstream, length)
    if spans:
        return Stage(length, spans[0][0], length - spans[-1][1], None, visual=False, text=True, spans=spans)
    found = origin(entry, axis, dependent)
    fits = found.grid is not None and length - found.prefix - found.suffix == prod(found.grid)
    above = {packet(n) for n in upstream}
    # in a language model that image features were written into, nothing says which positions are visual
    text = packet(found.node) == "aten.embedding" or bool(above & WRITES)
    visual = not text and not queries and (features or bool(above & PATCHES))
    apart = max((n.meta[APART] for n in upstream if APART in n.meta and shape(n)[-2] == length), default="")
    return Stage(length, found.prefix, found.suffix, found.grid if fits else None, visual, text, apart=apart)


def placeholder_spans(upstream: set[Node], length: int) -> tuple[tuple[int, int], ...]:
    """The places of image features in a prompt of that length, from all writes that lie before."""
    written = [n for n in upstream if SPANS in n.meta and shape(n)[-2] == length]
    return tuple(sorted({span for n in written for span in n.meta[SPANS]}))
