"""A prompt with images: where their tokens are, which positions all tokens have, and what is left of it after a reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import InputError
from tokcompile.recipe import methods
from tokcompile.vlm.masks import Span
from tokcompile.vlm.positions import Positions


@dataclass(frozen=True)
class Prompt:
    """full: spans of the image placeholders in the ids. spans: those of the features in what the language part takes, of
    `length` tokens. position_ids: (B, L) or (axes, B, L), of the whole example. next_position: (B, 1). rule: behind these
    positions, where they follow one. renumber: whether the tokens that are left have positions without gaps. in_order: whether
    features stand in the order of the ids, whatever order a method left them in, for layers that mix along the sequence."""

    image_token: int
    full: tuple[Span, ...]
    spans: tuple[Span, ...]
    full_length: int
    length: int
    position_ids: Tensor
    next_position: Tensor
    mask: Tensor
    rule: Positions | None
    renumber: bool = False
    in_order: bool = False

    @staticmethod
    def of(ids: Tensor, token: int, spans: Sequence[Span], positions: Tensor, mask: Tensor | None) -> Prompt:
        """Of example ids (B, L)."""
        length, after = ids.shape[1], following(positions, mask)
        mask = torch.ones_like(ids) if mask is None else mask
        rule = Positions.read(positions, mask, spans, after)
        return Prompt(token, tuple(spans), tuple(spans), length, length, positions, after, mask, rule)

    @property
    def room(self) -> list[int]:
        """How many tokens of text there are before, between and after the images."""
        edges = [0, *(edge for span in self.full for edge in span), self.full_length]
        return [stop - start for start, stop in zip(edges[::2], edges[1::2])]

    def lay_out(self, texts: Sequence[Sequence[int]], padded: bool) -> tuple[Tensor, Tensor]:
        """Ids and attention mask (1, L) of a prompt. texts: before, between and after the images; each is padded on its left,
        so that the images stay where they are. Raises: InputError."""
        if len(texts) != len(self.room):
            raise InputError(
                f"the prompt has {len(texts) - 1} image(s), and this model was made for {len(self.full)}: write one "
                f"placeholder (id {self.image_token}) for each"
            )
        ids, mask = [], []
        for i, (text, room) in enumerate(zip(texts, self.room)):
            where = "before the image" if i == 0 else f"after image {i}"
            if len(text) > room:
                raise InputError(
                    f"the text {where} has {len(text)} tokens, and this model was made with room for {room}\n"
                    "  what to do: a shorter text; or split and export again with more room (--room)"
                )
            if len(text) < room and not padded:
                raise InputError(
                    f"the text {where} has {len(text)} tokens, and this model takes exactly {room}, since it was made without "
                    "padding\n  what to do: split and export again with room=[...]"
                )
            empty = room - len(text)
            ids += [0] * empty + [int(token) for token in text]
            mask += [0] * empty + [1] * len(text)
            if i < len(self.images):
                ids += [self.image_token] * self.images[i]
                mask += [1] * self.images[i]
        return torch.tensor([ids]), torch.tensor([mask])

    def texts_of(self, ids: Sequence[int]) -> list[list[int]]:
        """The texts before, between and after the runs of placeholders in a prompt; one stands for a whole image."""
        texts: list[list[int]] = [[]]
        for i, token in enumerate(ids):
            if token != self.image_token:
                texts[-1].append(token)
            elif i == 0 or ids[i - 1] != self.image_token:
                texts.append([])
        return texts

    def with_room(self, room: Sequence[int]) -> tuple[Prompt, list[int | None]]:
        """The same with more room for text, padded on the left of each text, and which old token each new one is (None:
        padding). Raises: InputError."""
        if self.rule is None:
            raise InputError("the example's positions follow no rule that is known: text of other lengths cannot be placed")
        if len(room) != len(self.room) or any(new < old for new, old in zip(room, self.room)):
            raise InputError(
                f"room={list(room)}, and the example has {self.room} tokens of text before, between and after its images: give "
                "as many numbers, none of them smaller"
            )
        old: list[int | None] = []
        spans, at = [], 0
        for i, (new, have) in enumerate(zip(room, self.room)):
            old += [None] * (new - have) + list(range(at, at + have))
            at += have
            if i < len(self.images):
                spans.append((len(old), len(old) + self.images[i]))
                old += range(at, at + self.images[i])
                at += self.images[i]
        columns = torch.tensor([0 if p is None else p for p in old])
        real = torch.tensor([p is not None for p in old]).long()
        mask = self.mask[:, columns] * real.to(self.mask)
        positions, after = self.rule(mask, spans)
        made = Prompt(self.image_token, tuple(spans), tuple(spans), len(old), len(old), positions, after, mask, self.rule)
        return made, old

    def check_pivots(self, mask: Tensor | None, method: str, options: Mapping[str, Any]) -> None:
        """Methods that read some tokens of the text must find that many, and not padding. Raises: InputError."""
        recipe = methods().get(method)
        anywhere = recipe is not None and "text_embeds" in recipe.taps  # else after the image
        wanted, start = int(options.get("text_pivots", 0) or 0), self.full[-1][1]
        mask = self.mask if mask is None else mask
        images = sum(self.images) if anywhere else 0
        real = int(mask[:, 0 if anywhere else start :].sum(-1).min()) - images
        room = sum(self.room) if anywhere else self.full_length - start
        if real < min(wanted, room):
            where = "" if anywhere else " after the image"
            raise InputError(
                f"{method} reads {wanted} tokens of the text{where}, and this prompt has {real}\n"
                f"  what to do: a longer text; or optimize the language part with text_pivots={real}"
            )

    def data(self) -> dict[str, Any]:
        """For JSON."""
        rule = {"rule": self.rule.data()} if self.rule is not None else {"position_ids": self.position_ids.tolist()}
        return {
            "image_token": self.image_token, "placeholders": list(self.full), "spans": list(self.spans),
            "length_of_ids": self.full_length, "length": self.length, "attention_mask": self.mask.tolist(), **rule,
            "next_position": self.next_position.tolist(), "renumber": self.renumber, "in_order": self.in_order,
        }  # fmt: skip

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Prompt:
        """Raises: KeyError, TypeError, ValueError."""
        full, spans = (tuple((int(a), int(b)) for a, b in data[name]) for name in ("placeholders", "spans"))
        mask = torch.tensor(data["attention_mask"])
        rule = Positions.from_data(data["rule"]) if "rule" in data else None
        positions = rule(mask, full)[0] if rule is not None else torch.tensor(data["position_ids"])
        return Prompt(
            int(data["image_token"]), full, spans, int(data["length_of_ids"]), int(data["length"]), positions,
            torch.tensor(data["next_position"]), mask, rule, bool(data.get("renumber", False)),
            bool(data.get("in_order", False)),
        )  # fmt: skip

    def positions(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The positions of a prompt that is padded like this, and of the token after it, (B, 1). Raises: InputError."""
        if mask is None or torch.equal(mask.to(self.mask), self.mask):
            return self.position_ids, self.next_position
        if self.rule is None:
            raise InputError(
                "the positions of the example follow no rule that is known, so that those of a prompt with other padding are "
                "not known either\n  what to do: pass position_ids, or the example's attention_mask"
            )
        return self.rule(mask, self.full)

    @property
    def images(self) -> list[int]:
        """How many tokens each span has in the ids."""
        return [stop - start for start, stop in self.full]

    def shortened(self, kept: Tensor | None, renumber: bool = False) -> Prompt:
        """With as many tokens in each span as are kept. kept: (B, k). Raises: InputError."""
        if renumber and not (self.rule is not None and self.rule.by_one):
            raise InputError(
                "renumber=True, and the positions of this prompt do not go on by one token by token: an image has rows and "
                "columns, or an order of its own\n  what to do: leave renumber out, tokens then keep their positions"
            )
        if kept is None:
            return self
        edges = [sum(self.images[:i]) for i in range(len(self.images) + 1)]
        each = [int(((kept[0] >= a) & (kept[0] < b)).sum()) for a, b in zip(edges, edges[1:])]
        for row in kept:
            if [int(((row >= a) & (row < b)).sum()) for a, b in zip(edges, edges[1:])] != each:
                raise InputError(
                    "the vision part keeps other numbers of tokens in each sample: they do not fit one static prompt"
                )
        spans, removed = [], 0
        for (start, stop), left in zip(self.full, each):
            spans.append((start - removed, start - removed + left))
            removed += stop - start - left
        return replace(self, spans=tuple(spans), length=self.full_length - removed, renumber=renumber)

    def check(self, input_ids: Tensor) -> Tensor:
        """Raises: InputError for ids whose placeholders are elsewhere."""
        batch = self.position_ids.shape[-2]
        if tuple(input_ids.shape) != (batch, self.full_length):
            raise InputError(f"input_ids are {tuple(input_ids.shape)}, and the parts were made for {(batch, self.full_length)}")
        there = torch.zeros(self.full_length, dtype=torch.bool, device=input_ids.device)
        for start, stop in self.full:
            there[start:stop] = True
        wrong = ((input_ids == self.image_token) != there).nonzero()
        if len(wrong):
            row, at = (int(i) for i in wrong[0])
            raise InputError(
                f"input_ids[{row}, {at}] is {int(input_ids[row, at])}, and the parts were made for image placeholders "
                f"(id {self.image_token}) at {list(self.full)} only"
            )
        return input_ids

    def rows(self, kept: Tensor | None) -> Tensor:
        """The place in the ids of each token that the language part takes, (1 or B, length). kept: (B, k), among the image's
        tokens; without it the first ones of each span."""
        parts, at, used, base = [], 0, 0, 0
        batch, device = (1, None) if kept is None else (kept.shape[0], kept.device)
        for (start, stop), (first, last) in zip(self.full, self.spans):
            count = last - first
            parts.append(torch.arange(at, start, device=device).expand(batch, -1))
            chosen = torch.arange(count)[None] + base if kept is None else kept[:, used : used + count]
            parts.append(chosen - base + start)
            at, used, base = stop, used + count, base + stop - start
        return torch.cat([*parts, torch.arange(at, self.full_length, device=device).expand(batch, -1)], 1)

    def assemble(
        self, embeds: Tensor, seen: Mapping[str, Any], position_ids: Tensor, attention_mask: Tensor | None,
        ids: Tensor | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The inputs of the language part. embeds: (B, L, D) of all ids. seen: features (B, k, D), deepstack, kept. ids:
        (B, L), where it takes them too."""
        features, kept = seen["features"], seen.get("kept")
        wanted = sum(stop - start for start, stop in self.spans)
        if features.shape[:2] != (embeds.shape[0], wanted):
            raise InputError(
                f"the vision part gives {tuple(features.shape[:2])} features, and the prompt has room for "
                f"{(embeds.shape[0], wanted)}\n  what to do: pass one placeholder for each feature; after a reduction in the "
                "vision part take parts.after(vision)"
            )
        pieces, at, used = [], 0, 0
        for (start, stop), (first, last) in zip(self.full, self.spans):
            pieces += [embeds[:, at:start], features[:, used : used + last - first].to(embeds.dtype)]
            at, used = stop, used + last - first
        made: dict[str, Any] = {
            "inputs_embeds": torch.cat([*pieces, embeds[:, at:]], 1),
            "position_ids": self.placed(position_ids, kept),
        }
        if ids is not None:
            made["input_ids"] = self.chosen(ids, kept)
        if attention_mask is not None:  # methods that look for the largest embeddings must not find padding
            made["attention_mask"] = self.chosen(attention_mask, kept)
            made["inputs_embeds"] = made["inputs_embeds"].masked_fill(made["attention_mask"][..., None] == 0, 0)
        return made | ({"deepstack": list(seen["deepstack"])} if "deepstack" in seen else {})

    def inputs(
        self, embeds: Tensor, seen: Mapping[str, Any], attention_mask: Tensor | None, padded: bool, ids: Tensor | None = None
    ) -> dict[str, Any]:
        """The inputs of a language part, which takes padding or not, ids or not. Raises: InputError."""
        if attention_mask is not None and not padded and not bool(attention_mask.all()):
            raise InputError(
                "this language part takes no padding, and attention_mask hides some tokens\n"
                "  what to do: split with padded=True"
            )
        mask = self.mask if attention_mask is None else attention_mask
        return self.assemble(embeds, seen, self.positions(mask)[0], mask if padded else None, ids)

    def placed(self, positions: Tensor, kept: Tensor | None) -> Tensor:
        """The positions of the tokens that are left: their own; or without gaps, so that the text after the images keeps its
        own and all before moves up."""
        if not self.renumber:
            return self.chosen(positions, kept)
        left = [last - first for first, last in self.spans]
        gone = [n - k for n, k in zip(self.images, left)]
        counts = [*(c for text, k in zip(self.room, left) for c in (text, k)), self.room[-1]]
        moves = [sum(gone[i // 2 :]) for i in range(len(counts))]  # by how much each text and each image moves up
        return self.chosen(positions, None) + torch.tensor(moves).repeat_interleave(torch.tensor(counts)).to(positions)

    def chosen(self, values: Tensor, kept: Tensor | None) -> Tensor:
        """(..., B, L) over the ids at the tokens that are left."""
        if self.length == self.full_length:
            return values
        rows = self.rows(kept).expand(*values.shape[:-1], -1)
        return values.gather(-1, rows)


def following(positions: Tensor, mask: Tensor | None) -> Tensor:
    """One after the largest position of each sample, (B, 1); padding does not count."""
    if mask is not None:
        positions = positions.masked_fill(mask == 0, -1)
    largest = positions.amax(-1, keepdim=True)
    return (largest.amax(0) if largest.ndim == 3 else largest) + 1
