"""Several questions about one scene in one sequence: each sees the visual tokens and itself, as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiny_vlm.data import GRID, Question
from benchmarks.tiny_vlm.model import PREFIX

IGNORED = -100


@dataclass
class Pack:
    """ids, positions, targets: (B, T) of the text; target IGNORED where nothing is learnt. seen: (B, 1, P + N + T, P + N + T),
    True where attention may go. place: (B, T), the number of the question that a token belongs to, -1 for padding."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    seen: Tensor
    place: Tensor


def encode(tokenizer: Any, asked: list[Question]) -> list[tuple[list[int], int]]:
    """Ids of question, answer and newline, and how many of them are the question."""
    made = []
    for q in asked:
        text = tokenizer(f"\n{q.text}", add_special_tokens=False).input_ids
        made.append((text + tokenizer(f" {q.answer}\n", add_special_tokens=False).input_ids, len(text)))
    return made


def pack(encoded: list[list[tuple[list[int], int]]], visual_tokens: int) -> Pack:
    """Text of all scenes, padded to one length."""
    head = PREFIX + visual_tokens
    length = max(sum(len(ids) for ids, _ in scene) for scene in encoded)
    ids, positions, targets = (torch.zeros(len(encoded), length, dtype=torch.long) for _ in range(3))
    place = torch.full((len(encoded), length), -1)
    targets += IGNORED
    for row, scene in enumerate(encoded):
        at = 0
        for number, (tokens, asked) in enumerate(scene):
            stop = at + len(tokens)
            ids[row, at:stop] = torch.tensor(tokens)
            positions[row, at:stop] = torch.arange(len(tokens)) + PREFIX + GRID * GRID
            place[row, at:stop] = number
            targets[row, at + asked - 1 : stop - 1] = torch.tensor(tokens[asked:])
            at = stop
    owner = torch.cat([torch.full((len(encoded), head), -2), place], 1)
    order = torch.arange(head + length)
    same = (owner[:, :, None] == owner[:, None]) | (owner[:, None] == -2)
    seen = same & (order[:, None] >= order[None])
    return Pack(ids, positions, targets, seen[:, None], place)


def weights(text: Pack, asked: list[list[Question]], newline: float, counting: float) -> Tensor:
    """(B, T): the weight of each target in the loss; newline: of an answer's last token, counting: of "how many of it"."""
    made = torch.ones(text.targets.shape)
    last = torch.roll(text.place, -1, 1) != text.place  # the token after the last target belongs to the next question
    made[torch.roll(last, -1, 1)] = newline
    for row, scene in enumerate(asked):
        for number, question in enumerate(scene):
            if question.kind == "how many of it":
                made[row, text.place[row] == number] *= counting
    return made


def by_kind(text: Pack, asked: list[list[Question]], right: Tensor) -> dict[str, list[float]]:
    """Whether each whole answer was right, newline included."""
    wanted = text.targets != IGNORED
    rows = torch.arange(len(asked))[:, None].expand_as(text.place)[wanted].tolist()
    scores: dict[tuple[int, int], bool] = {}
    for row, number, good in zip(rows, text.place[wanted].tolist(), right.tolist()):
        scores[row, number] = scores.get((row, number), True) and good
    made: dict[str, list[float]] = {}
    for (row, number), good in scores.items():
        made.setdefault(asked[row][number].kind, []).append(float(good))
    return made
