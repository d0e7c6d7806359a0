"""Words of a visual vocabulary: ids that a model embeds otherwise than its table does, beside an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.vlm.checks import CLOSE
from tokcompile.vlm.masks import Span
from tokcompile.vlm.observe import Observed, begun
from tokcompile.vlm.parts import Embeddings


def words_of(
    model: nn.Module, seen: Observed, inputs: Mapping[str, Any], table: Embeddings, spans: Sequence[Span]
) -> dict[int, Tensor]:
    """Ids that the model embeds otherwise beside an image than its table does, as Ovis 2 those around it, and how: (D,). Where
    the example has any, all are tried that the configuration names, at two places and with two images."""
    ids, pixels = inputs["input_ids"], seen.source.pixels
    image = {p for span in spans for p in range(*span)}
    text = torch.tensor([p for p in range(ids.shape[1]) if p not in image], device=ids.device)
    size, words = table.table.weight.shape[0], {}
    assert seen.embeds is not None
    if seen.embeds.shape[:2] != ids.shape or not len(text) or near(seen.embeds[:, text], table(ids[:, text]), seen.embeds):
        return {}
    named = sorted(i for i in named_ids(config_dict(model)) - {table.image_token} if 0 <= i < size)
    for at in range(0, len(named), len(text)):
        some = torch.tensor(named[at : at + len(text)]).to(ids)
        met = []
        for places, values in ((text, inputs[pixels]), (text.roll(1), inputs[pixels].flip(-2))):
            prompt = ids.index_copy(1, places[: len(some)], some.expand(len(ids), -1))
            try:
                with torch.no_grad():
                    embeds = begun(model, seen, {**inputs, pixels: values, "input_ids": prompt})
            except Exception:  # it wants a video or a sound for one of these ids
                return {}
            met.append(embeds[0, places[: len(some)]])
        for word, plain, one, other in zip(some, table(some[None])[0], *met):
            if torch.equal(one, other) and not near(one, plain, seen.embeds):
                words[int(word)] = one
    return words


def near(a: Tensor, b: Tensor, embeds: Tensor) -> bool:
    return bool((a - b).abs().max() <= CLOSE * embeds.abs().max())


def config_dict(model: nn.Module) -> dict[str, Any]:
    return getattr(getattr(model, "config", None), "to_dict", dict)()


def named_ids(config: Mapping[str, Any]) -> set[int]:
    """The ids of special tokens in a configuration, in nested ones too."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= named_ids(value)
        elif "token_i" in str(name):
            found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found
