"""Which of a prompt's image tokens the features of a reduced vision part stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import InputError
from tokcompile.passes.tokens import Run
from tokcompile.vlm.prompt import Prompt


def seen_by(prompt: Prompt, made: Mapping[str, Any], indices: Mapping[str, Tensor], runs: Mapping[str, Run]) -> dict[str, Any]:
    """The outputs of a vision part, sample by sample: features (B, k, D), deepstack alike, and kept (B, k), among the image's
    tokens, where not all are left. indices: its outputs s0_index and so on, runs: what each is an index of. Raises:
    InputError."""
    batch = prompt.position_ids.shape[-2]
    features, deep = (flat(value, batch) for value in (made["features"], made.get("deepstack", [])))
    kept = kept_of(prompt, features, indices, runs)
    out: dict[str, Any] = {"features": features}
    if "deepstack" in made:
        out["deepstack"] = [like(prompt, one, kept, features.shape[1], indices, runs) for one in deep]
    if kept is None:
        return out
    return in_order(out, kept) if prompt.in_order else out | {"kept": kept}


def in_order(out: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """The same with the features of each sample in the order of the ids."""
    kept, order = kept.sort(1)

    def sorted_too(one: Tensor) -> Tensor:
        return one.gather(1, order[..., None].expand(-1, -1, one.shape[-1]))

    made: dict[str, Any] = {"features": sorted_too(out["features"]), "kept": kept}
    return made | ({"deepstack": [sorted_too(one) for one in out["deepstack"]]} if "deepstack" in out else {})


def flat(value: Any, batch: int) -> Any:
    """(rows, n, D), in the order of the images, as (B, all of a sample's, D)."""
    if isinstance(value, Tensor):
        return value.reshape(batch, -1, value.shape[-1])
    return [flat(one, batch) for one in value]


def kept_of(prompt: Prompt, features: Tensor, indices: Mapping[str, Tensor], runs: Mapping[str, Run]) -> Tensor | None:
    """(B, k), or None where all are there. runs: what each of the indices is an index of. Raises: InputError."""
    found = chosen_of(prompt, features, indices, runs)
    return found[1] if found is not None else None


def chosen_of(
    prompt: Prompt, features: Tensor, indices: Mapping[str, Tensor], runs: Mapping[str, Run]
) -> tuple[list[str], Tensor] | None:
    """The same with the names of the indices that say so. Raises: InputError."""
    count, total = features.shape[1], sum(prompt.images)
    if count == total:
        return None
    names = [name for name in indices if name in runs]
    for first in range(len(names)):
        for last in range(first + 1, len(names) + 1):
            found = [(indices[name], runs[name]) for name in names[first:last]]
            kept = among_images(found, features.shape[0], total)
            if kept is not None and kept.shape[1] == count:
                return names[first:last], kept
    shapes = ", ".join(f"{name} {tuple(index.shape)}" for name, index in indices.items())
    raise InputError(
        f"the vision part gives {count} features of {total}, and its indices do not say which ones they are "
        f"({shapes or 'there are none'})\n  what to do: optimize it with outputs='reduced'; where the tokens of tiles "
        "are arranged anew after the tower, with outputs='keep', which gives dropped tokens back"
    )


def among_images(found: Sequence[tuple[Tensor, Run]], batch: int, total: int) -> Tensor | None:
    """Indices (rows, k) into runs of tokens, which follow each other row by row, as indices among the `total` image tokens
    of each sample, (B, k); None where the runs are no such tokens."""
    rows = {index.shape[0] for index, _ in found}
    if len(rows) != 1 or sum(sum(run) for _, run in found) * max(rows) != batch * total:
        return None
    pieces, start = [], 0
    for row in range(rows.pop()):
        for index, (before, n, after) in found:
            plain = torch.arange(before + n + after, device=index.device)
            pieces += [one + start for one in (plain[:before], index[row] + before, plain[before + n :])]
            start += before + n + after
    positions = torch.cat(pieces)
    samples = [positions[(positions >= b * total) & (positions < (b + 1) * total)] - b * total for b in range(batch)]
    return torch.stack(samples) if len({len(s) for s in samples}) == 1 else None


def like(
    prompt: Prompt, deep: Tensor, kept: Tensor | None, count: int, indices: Mapping[str, Tensor], runs: Mapping[str, Run]
) -> Tensor:
    """Features that were taken at an earlier layer, of more tokens, at those that are left at the end. Raises: InputError."""
    if kept is None or deep.shape[1] == count:
        return deep
    rows = kept
    there = kept_of(prompt, deep, indices, runs)
    if there is not None:
        same = kept[:, :, None] == there[:, None]
        if not bool(same.any(-1).all()):
            raise InputError(
                "the vision part keeps tokens at its end that are not among those of its DeepStack features\n"
                "  what to do: choose a method that drops tokens, or where=... after the last of these layers"
            )
        rows = same.int().argmax(-1)
    return deep.gather(1, rows[..., None].expand(-1, -1, deep.shape[-1]))
