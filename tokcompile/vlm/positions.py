"""Positions of a prompt's tokens, of one axis or three: text goes on by one, an image has its own pattern, padding none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import InputError
from tokcompile.vlm.masks import Span


@dataclass(frozen=True)
class Positions:
    """first: of the first token. offsets: of each image's tokens, (axes, n), from where its position begins. steps: how far
    the text goes on after each image. several: whether positions have an axis in front of the batch."""

    first: int
    offsets: tuple[Tensor, ...]
    steps: tuple[int, ...]
    several: bool

    @staticmethod
    def read(example: Tensor, mask: Tensor, spans: Sequence[Span], after: Tensor) -> Positions | None:
        """The rule behind the positions of an example, (B, L) or (axes, B, L), or None where they follow none that is known.

        mask: (B, L), 0 for padding. after: (B, 1), of the first token that is generated.
        """
        rows, row = (example if example.ndim == 3 else example[None]).cpu(), mask[0].bool().cpu()
        pattern = rows[:, 0]
        where = row.nonzero()[:, 0].tolist()
        starts = dict(spans)
        first = int(pattern[:, where[0]].min())
        now, at, offsets, steps = first, 0, [], []
        while at < len(where):
            place = where[at]
            if place not in starts:
                now, at = now + 1, at + 1
                continue
            stop = starts[place]
            at += stop - place
            then = int(pattern[:, where[at]].min()) if at < len(where) else int(after[0])
            offsets.append(pattern[:, place:stop] - now)
            steps.append(then - now)
            now = then
        made = Positions(first, tuple(offsets), tuple(steps), example.ndim == 3)
        got, following = made(mask.cpu(), spans)
        right = (got == example.cpu()) | (mask.cpu() == 0)
        return made if bool(right.all()) and torch.equal(following, after.cpu()) else None

    def __call__(self, mask: Tensor, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """The positions of a prompt with this padding, and of the token after it, (B, 1). Raises: InputError."""
        real = mask.long()
        for start, stop in spans:
            if not bool(real[:, start:stop].all()):
                raise InputError(
                    f"attention_mask hides some of the image's tokens, {start} to {stop}: only text can be padding"
                )
        step = real.clone()  # how far each token goes on
        for (start, stop), total in zip(spans, self.steps):
            step[:, start:stop] = 0
            step[:, stop - 1] = total
        after = self.first + step.cumsum(-1)
        place = (after - step).clamp(min=self.first)[None].repeat(len(self.offsets[0]) if self.several else 1, 1, 1)
        for (start, stop), offsets in zip(spans, self.offsets):
            place[:, :, start:stop] = place[:, :, start : start + 1] + offsets[:, None].to(place.device)
        return (place if self.several else place[0]), after[:, -1:]

    @property
    def by_one(self) -> bool:
        """Whether positions are one number each, and go on by one through the images too."""
        return not self.several and all(
            torch.equal(offsets, torch.arange(offsets.shape[1])[None]) and step == offsets.shape[1]
            for offsets, step in zip(self.offsets, self.steps)
        )

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "first": self.first,
            "offsets": [o.tolist() for o in self.offsets],
            "steps": list(self.steps),
            "several": self.several,
        }

    @staticmethod
    def from_data(data: dict[str, Any]) -> Positions:
        """Raises: KeyError, ValueError."""
        offsets = tuple(torch.tensor(o, dtype=torch.int64) for o in data["offsets"])
        return Positions(int(data["first"]), offsets, tuple(data["steps"]), bool(data["several"]))
