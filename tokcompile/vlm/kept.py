"""Which of a prompt's image tokens the features of a reduced vision part stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import InputError
from tokcompile.passes.plan import Reduction
from tokcompile.vlm.prompt import Prompt


def seen_by(
    prompt: Prompt, made: Mapping[str, Any], indices: Mapping[str, Tensor], reductions: Sequence[Reduction]
) -> dict[str, Any]:
    """The outputs of a vision part, sample by sample: features (B, k, D), deepstack alike, and kept (B, k), among the image's
    tokens, where not all are left. indices: its outputs s0_index and so on. Raises: InputError."""
    batch = prompt.position_ids.shape[-2]
    features, deep = (flat(value, batch) for value in (made["features"], made.get("deepstack", [])))
    kept = kept_of(prompt, features, indices, reductions)
    out: dict[str, Any] = {"features": features}
    if "deepstack" in made:
        out["deepstack"] = [like(prompt, one, kept, features.shape[1], indices, reductions) for one in deep]
    return out | ({"kept": kept} if kept is not None else {})


def flat(value: Any, batch: int) -> Any:
    """(rows, n, D), in the order of the images, as (B, all of a sample's, D)."""
    if isinstance(value, Tensor):
        return value.reshape(batch, -1, value.shape[-1])
    return [flat(one, batch) for one in value]


def kept_of(prompt: Prompt, features: Tensor, indices: Mapping[str, Tensor], reductions: Sequence[Reduction]) -> Tensor | None:
    """(B, k), or None where all are there. Raises: InputError."""
    count, total = features.shape[1], sum(prompt.images)
    if count == total:
        return None
    for blocks in reversed(list(dict.fromkeys(r.block for r in reductions))):
        found = [(f"s{i}_index", n) for i, n in latest(reductions, blocks)]
        if all(name in indices for name, _ in found):
            kept = among_images([(indices[name], n) for name, n in found], features.shape[0], prompt.images)
            if kept is not None and kept.shape[1] == count:
                return kept
    shapes = ", ".join(f"{name} {tuple(index.shape)}" for name, index in indices.items())
    raise InputError(
        f"the vision part gives {count} features of {total}, and its indices do not say which ones they are "
        f"({shapes or 'there are none'})\n  what to do: optimize it with outputs='reduced'; where the tokens of tiles "
        "are arranged anew after the tower, with outputs='keep', which gives dropped tokens back"
    )


def latest(reductions: Sequence[Reduction], block: int) -> list[tuple[int, int]]:
    """(number, tokens at the very start) of each run's last reduction up to a block, in order of the runs."""
    last: dict[int, int] = {}
    tokens: dict[int, int] = {}
    for i, r in enumerate(reductions):
        if r.block <= block:
            last[r.prefix] = i
        tokens.setdefault(r.prefix, r.n)
    return [(last[prefix], tokens[prefix]) for prefix in sorted(last)]


def among_images(found: Sequence[tuple[Tensor, int]], batch: int, images: Sequence[int]) -> Tensor | None:
    """Indices (rows, k) into each run of n tokens as indices among all of a sample's image tokens, (B, sum k)."""
    rows = {index.shape[0] for index, _ in found}
    if len(rows) != 1:
        return None
    each = [(index[row], n) for row in range(rows.pop()) for index, n in found]
    sizes = [n for _, n in each]
    if sizes == [sum(images)] * batch:  # all images of a sample in one run
        return torch.stack([index for index, _ in each])
    if sizes != list(images) * batch:
        return None
    starts = [sum(images[:i]) for i in range(len(images))] * batch
    moved = [index + start for (index, _), start in zip(each, starts)]
    samples = [torch.cat(moved[b * len(images) : (b + 1) * len(images)]) for b in range(batch)]
    return torch.stack(samples) if len({len(s) for s in samples}) == 1 else None


def like(
    prompt: Prompt,
    deep: Tensor,
    kept: Tensor | None,
    count: int,
    indices: Mapping[str, Tensor],
    reductions: Sequence[Reduction],
) -> Tensor:
    """Features that were taken at an earlier layer, of more tokens, at those that are left at the end. Raises: InputError."""
    if kept is None or deep.shape[1] == count:
        return deep
    rows = kept
    there = kept_of(prompt, deep, indices, reductions)
    if there is not None:
        same = kept[:, :, None] == there[:, None]
        if not bool(same.any(-1).all()):
            raise InputError(
                "the vision part keeps tokens at its end that are not among those of its DeepStack features\n"
                "  what to do: choose a method that drops tokens, or where=... after the last of these layers"
            )
        rows = same.int().argmax(-1)
    return deep.gather(1, rows[..., None].expand(-1, -1, deep.shape[-1]))
