"""Slots: the tokens of a block that a method reduces, from the spans that are named or known and the layout that is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tokcompile.errors import BudgetError, InputError, UnsupportedGraph
from tokcompile.passes.find import Block
from tokcompile.passes.layout import Layout
from tokcompile.passes.stages import Stage
from tokcompile.passes.tokens import seq_on


@dataclass(frozen=True)
class Slot:
    """A place where the method will reduce; `spans`: (start, stop) of the visual tokens in groups of `unit`, counted from
    token `offset` on, `left`: how many of each earlier reductions left. samples: how many become a batch later. language:
    whether text stands around them."""

    block: Block
    place: str
    stage: Stage
    spans: tuple[tuple[int, int], ...]
    left: tuple[int, ...]
    unit: int = 1
    offset: int = 0
    samples: int = 1
    language: bool = False

    @property
    def n(self) -> int:
        return sum(self.left)

    @property
    def drops(self) -> bool:
        """Whether all of them may go, since text is left."""
        return self.language and self.unit == 1 and sum(stop - start for start, stop in self.spans) < self.stage.length

    def token(self, group: int) -> int:
        """The position of a group's first token."""
        return self.offset + group * self.unit


def named_spans(spans: Any) -> list[tuple[int, int]]:
    """What the user named. Raises: InputError for what is no list of spans, and for an empty one, which names nothing."""
    listed = list(spans) if isinstance(spans, Iterable) else [spans]
    if not all(isinstance(s, (tuple, list)) and len(s) == 2 and all(isinstance(at, int) for at in s) for s in listed):
        raise InputError(f"spans={spans!r} is no list of (start, stop): write [(5, 30)]")
    if not listed:
        raise InputError("spans=[] names no visual tokens: leave spans out, or write [(start, stop)]")
    return [(start, stop) for start, stop in listed]


def make_slot(block: Block, place: str, spans: Sequence[tuple[int, int]] | None, layout: Layout) -> Slot:
    stage, unit = block.stage, layout.unit
    language = stage.text or (spans is not None and (block.language or not stage.visual))
    refuse_others(spans or (), stage)
    spans = list(spans or stage.spans) or [(stage.prefix, stage.length - stage.suffix)]
    offset = spans[0][0] % unit if layout.regrouped else 0
    at = 0
    for start, stop in spans:
        if not at <= start < stop <= stage.length:
            raise BudgetError(
                f"span ({start}, {stop}) does not lie within the {stage.length} tokens of block {block.index}, "
                "or spans overlap or are out of order"
            )
        if (start - offset) % unit or (stop - offset) % unit or (stage.length % unit and not layout.regrouped):
            raise UnsupportedGraph(f"tokens {start} to {stop} of {stage.length} are not whole groups of {unit}", block.mid)
        at = stop
    pieces: list[tuple[int, int]] = []
    for start, stop in spans:
        first, last = (start - offset) // unit, (stop - offset) // unit
        edges = [first, *(c for c in layout.cuts if first < c < last), last]
        pieces += list(zip(edges, edges[1:]))
    sizes = tuple(stop - start for start, stop in pieces)
    samples = sum(sizes) // layout.sample if layout.sample else 1
    samples = samples if samples * layout.sample == sum(sizes) and same_in_each(sizes, samples) else 1
    return Slot(block, place, stage, tuple(pieces), sizes, unit, offset, samples, language)


def refuse_others(spans: Sequence[tuple[int, int]], stage: Stage) -> None:
    """Raises: InputError for a span that the user names and that holds text, where the graph knows what is an image's."""
    known = {at for start, stop in stage.spans for at in range(start, stop)}
    for start, stop in spans:
        others = [at for at in range(start, stop) if at not in known]
        if others and known:
            raise InputError(
                f"the span ({start}, {stop}) holds token {others[0]}, which is none of the image features: those stand at "
                f"{list(stage.spans)}\n  what to do: leave spans out, or name tokens among these"
            )


def same_in_each(sizes: Sequence[int], samples: int) -> bool:
    """Whether segments are so many runs of the same sizes."""
    return list(sizes) == list(sizes[: len(sizes) // samples]) * samples


def after_others(slot: Slot, labels: Mapping[Any, Any], spans: Sequence[tuple[int, int]] | None = None) -> Slot:
    """The slot with what earlier reductions left of its spans, in their groups and cut where those are cut.

    Raises: UnsupportedGraph.
    """
    label = labels.get(slot.block.entry)
    axis = label[slot.block.token_axis] if label is not None else ()
    seq = seq_on(axis)
    if seq is None:
        return slot
    rows = prod(a for a in axis if isinstance(a, int))
    unit = max(rows, *(s.unit for s in seq.spaces))
    if unit != slot.unit:
        slot = make_slot(slot.block, slot.place, spans, Layout(unit, (), True))
    pieces, left, at = [], [], 0
    for part in seq.parts:
        end = at + rows * (part if isinstance(part, int) else part.root_n)
        tokens = [(slot.token(start), slot.token(stop)) for start, stop in slot.spans]
        inside = [(max(start, at), min(stop, end)) for start, stop in tokens if start < end and stop > at]
        if not isinstance(part, int) and inside not in ([], [(at, end)]):
            raise UnsupportedGraph(
                f"the tokens {slot.spans} are not those that were reduced before, {at} to {end}",
                slot.block.mid,
                "leave spans out, or name the same ones",
            )
        pieces += [((start - slot.offset) // unit, (stop - slot.offset) // unit) for start, stop in inside]
        left += [(stop - start) // unit if isinstance(part, int) else (part.groups or part).k for start, stop in inside]
        at = end
    samples = slot.samples if same_in_each(left, slot.samples) else 1
    return replace(slot, spans=tuple(pieces), left=tuple(left), samples=samples)
