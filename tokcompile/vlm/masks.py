"""What the tokens of a prompt may see: causal, through a window, and what an image's tokens see beyond that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.errors import InputError, UnsupportedGraph
from tokcompile.llm.caches import Attention, Masks, eager_attention
from tokcompile.llm.reach import Reach, reach_of
from tokcompile.vlm.observe import Observed

Span = tuple[int, int]


@dataclass(frozen=True)
class Visibility:
    """reaches: of each layer that attends. groups: by reach, a number for each token, (L,): tokens of one
    number see each other whatever their order, such as those of an image, or of a whole prompt. Others have a number of their
    own."""

    reaches: tuple[Reach | None, ...]
    groups: Mapping[Reach | None, Tensor]

    def shortened(self, spans: Sequence[Span], rows: Sequence[int]) -> Visibility:
        """The same over fewer tokens. rows: the old position of each one; those in `spans` stand for any of their span.

        Raises: UnsupportedGraph where it would depend on which ones stay.
        """
        for numbers in self.groups.values():
            for start, stop in spans:
                if numbers[start:stop].unique().numel() not in (1, stop - start):
                    raise UnsupportedGraph(
                        f"some of the tokens {start} to {stop} of this prompt attend both ways and some do not, so that a mask "
                        "cannot be made before it is known which ones stay",
                        hint="reduce inside of the language part instead, with where=[0] or later",
                    )
        return Visibility(self.reaches, {r: numbers[torch.tensor(rows)] for r, numbers in self.groups.items()})

    def widened(self, old: Sequence[int | None], spans: Sequence[Span]) -> Visibility:
        """The same with padding in between. old: which token each one was, None for padding. spans: of the images now."""
        new = {}
        for reach, numbers in self.groups.items():
            wide = torch.tensor([-1 - i if p is None else int(numbers[p]) for i, p in enumerate(old)])
            pad = torch.tensor([p is not None for p in old])[None]
            new[reach] = padded_too(wide, pad, spans)
        return Visibility(self.reaches, new)


def visibility(seen: Observed, attention_mask: Tensor | None, spans: Sequence[Span]) -> Visibility:
    """Reads the masks of one run. spans: of the images. Raises: UnsupportedGraph where one is none that can be made again."""
    reaches = tuple(seen.reaches[i] for i in sorted(seen.reaches))
    groups: dict[Reach | None, Tensor] = {}
    for layer, reach in zip(sorted(seen.reaches), reaches):
        mask = seen.masks[layer].cpu()
        length = mask.shape[-1]
        valid = torch.ones(1, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
        pairs = valid[:, :, None] & valid[:, None]  # what padding sees does not count
        mutual = (mask & mask.mT & pairs).any(0) | torch.eye(length, dtype=torch.bool)
        numbers = mutual.int().argmax(-1)  # the first one that a token sees and is seen by
        if reach in groups and not torch.equal(groups[reach], numbers):
            raise unknown(layer, "differs from that of an earlier layer with the same window")
        groups[reach] = numbers
        seen_by_order = ordered(length, reach, valid.cumsum(-1) - 1)
        wrong = ((seen_by_order | (numbers[:, None] == numbers)) != mask) & pairs
        if wrong.any():
            row, query, key = (int(i) for i in wrong.nonzero()[0])
            raise unknown(layer, f"does not fit the token {query} and the token {key} of sample {row}")
    return Visibility(
        reaches, {r: padded_too(n, attention_mask, spans) for r, n in groups.items() if n.unique().numel() < len(n)}
    )


def padded_too(numbers: Tensor, attention_mask: Tensor | None, spans: Sequence[Span]) -> Tensor:
    """Padding of the example belongs to the group of the text after it: in another prompt it may be text."""
    numbers = numbers.clone()
    if attention_mask is None:
        return numbers
    image = {p for start, stop in spans for p in range(start, stop)}
    for at in range(len(numbers) - 2, -1, -1):
        if not attention_mask[:, at].any() and at + 1 not in image and int((numbers == numbers[at + 1]).sum()) > 1:
            numbers[at] = numbers[at + 1]
    return numbers


def unknown(layer: int, what: str) -> UnsupportedGraph:
    return UnsupportedGraph(
        f"the mask of layer {layer} {what}: it is not causal with a window or chunks, padding and tokens that attend both ways",
        hint="nothing yet; samples of one batch must agree on which tokens attend both ways",
    )


def ordered(length: int, reach: Reach | None, positions: Tensor | None = None) -> Tensor:
    """(1 or B, L, L): each token sees itself and those before it that are in reach. positions: (1 or B, L)."""
    place = torch.arange(length)[None]
    seen = place[:, :, None] >= place[:, None]
    return seen if reach is None else seen & reach.among(place if positions is None else positions)


class PromptMasks(nn.Module):
    """Makes the masks of a prefill, (1 or B, 1, L, L), one for each reach.

    moved: whether positions are not simply those in the sequence (padding, or tokens that were dropped before): reaches
    are then measured in `positions`.
    """

    itself: Tensor

    def __init__(self, length: int, view: Visibility, moved: bool):
        super().__init__()
        self.view, self.moved = view, moved
        for i, reach in enumerate(self.kinds()):
            plain = ordered(length, None if moved else reach)
            self.register_buffer(f"plain_{i}", plain, persistent=False)
            numbers = view.groups.get(reach)
            together = None if numbers is None else numbers[:, None] == numbers
            self.register_buffer(f"together_{i}", together, persistent=False)
        self.register_buffer("itself", torch.eye(length, dtype=torch.bool), persistent=False)

    def kinds(self) -> list[Reach | None]:
        return list(dict.fromkeys(self.view.reaches))

    def masks(self, positions: Tensor | None, attention_mask: Tensor | None) -> Masks:
        """A function from (layer, reach, keys) to its mask. positions, attention_mask: (1 or B, L)."""
        made: dict[Reach | None, Tensor] = {}

        def mask(layer: int, reach: Reach | None, key: Tensor) -> Tensor:
            if reach not in made:
                made[reach] = self.one(reach, positions, attention_mask)
            return made[reach]

        return mask

    def one(self, reach: Reach | None, positions: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        kind = self.kinds().index(reach)
        seen: Tensor = getattr(self, f"plain_{kind}")
        together: Tensor | None = getattr(self, f"together_{kind}")
        if self.moved and reach is not None:
            if positions is None:
                raise InputError(
                    "a position has several numbers in this model, and its sliding windows or chunks count in one\n"
                    "  what to do: keep the prompt as it is: no room for other texts, no vision part that gives fewer features"
                )
            seen = seen & reach.among(positions)
        if together is not None:
            seen = seen | together
        if attention_mask is not None:  # padding sees itself, so that its row is not empty, and has no say in what others get
            real = attention_mask.bool()
            seen = (seen & real[:, None] & real[:, :, None]) | self.itself
        return seen[:, None]


def masked(original: Attention | None, masks: Masks, attention_mask: Tensor | None) -> Attention:
    """An attention function that reads `masks` in place of the mask it is given.

    The keys of padding are zeros: nobody attends to them, and a method that looks for the text with the largest keys finds
    text.
    """
    real = None if attention_mask is None else attention_mask[:, None, :, None]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: Any, **kwargs: Any) -> Any:
        key = key if real is None else key * real.to(key.dtype)
        mask = masks(int(module.layer_idx), reach_of(module, kwargs.get("sliding_window")), key)  # type: ignore[arg-type]
        mask = mask[:, :, -query.shape[2] :]  # layers that keep no keys may be asked for the last token alone
        if original is not None:
            return original(module, query, key, value, mask, **kwargs)
        scores = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        return eager_attention(module)(module, query, key, value, scores, **kwargs)

    return attend


def check_spans(spans: Sequence[Span], length: int) -> None:
    """Raises: InputError for spans outside of the prompt, empty, overlapping or out of order."""
    at = 0
    for start, stop in spans:
        if not at <= start < stop <= length:
            raise InputError(f"the span ({start}, {stop}) does not lie within the {length} tokens, in order and apart")
        at = stop
