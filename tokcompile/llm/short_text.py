"""A short text, decoded in static buffers and computed at once: whether a model decodes as a decode step has it.

A model may count positions from another number than 0, add a bias of its own to the scores, or take the end of a buffer for
its own place in the text. None of it is seen before numbers are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.llm.caches import Collecting, cache_name, config_of
from tokcompile.llm.layout import Layout, Stage
from tokcompile.passes.faithful import relative_error
from tokcompile.passes.unchanged import unchanged

BEFORE = 3  # tokens that are in the cache
TEXTS = 5  # of half precision, where rounding alone may come to 0.3 in one text; what a model does otherwise shows in most
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}  # what logits may be off by, of the largest; of half precision 0.1


def decodes(step: Callable[[nn.Module, Layout], nn.Module], model: nn.Module, plan: Layout) -> bool | None:
    """Whether such a step gives a token the logits that it has without a cache, in most of a few texts. None where that cannot
    be told: the model has no weights (meta), does not run on a few ids, or lets tokens see later ones in a text that is
    computed at once."""
    weight = next(model.parameters())
    if weight.is_meta:
        return None
    count = 1 if plan.dtype in ROUNDING else TEXTS
    ids = torch.tensor(plain_ids(model, BEFORE + count), device=weight.device).expand(plan.batch, -1)
    said = [decodes_text(step, model, plan, text) for text in ids.unfold(1, BEFORE + 1, 1).unbind(1)]
    return next((answer for answer in (True, None) if said.count(answer) * 2 > count), False)


def decodes_text(step: Callable[[nn.Module, Layout], nn.Module], model: nn.Module, plan: Layout, ids: Tensor) -> bool | None:
    """The same of one text; ids: (B, BEFORE + 1)."""
    total, layers = plan.length + plan.room, len(plan.keys)
    short = replace(plan, length=BEFORE, stages=(Stage(0, layers - 1, BEFORE, total),), kept={})
    places = torch.arange(BEFORE + 1, device=ids.device).expand(*plan.axes, plan.batch, -1)
    given = {"position_ids": places} if "position_ids" in plan.inputs else {}
    cache = Collecting()
    with torch.no_grad(), unchanged(model):
        try:
            want = model(input_ids=ids, use_cache=False, **given).logits
            first = {name: value[..., :-1] for name, value in given.items()}
            start = model(input_ids=ids[:, :-1], use_cache=True, **first, **{cache_name(model): cache}).logits
        except Exception:
            return None
        if not close(start[:, -1], want[:, -2], plan):
            return None
        got = step(model, short).eval()(**one_more(short, cache, ids[:, -1:], places))["logits"][:, -1]
    return close(got, want[:, -1], plan)


def close(got: Tensor, want: Tensor, plan: Layout) -> bool:
    return relative_error(got.float(), want.float()) <= ROUNDING.get(plan.dtype, 0.1)


def plain_ids(model: nn.Module, count: int) -> list[int]:
    """So many ids, none of which means padding, an image or the like."""
    configs = [vars(config) for config in (getattr(model, "config", None), config_of(model)) if config is not None]
    special = {value for config in configs for name, value in config.items() if name.endswith(("token_id", "token_index"))}
    return [i for i in range(len(special) + count) if i not in special][:count]


def one_more(short: Layout, cache: Collecting, token: Tensor, places: Tensor) -> dict[str, Any]:
    """The inputs of a step after a short text."""

    def buffers(held: list[Tensor]) -> list[Tensor]:
        return [nn.functional.pad(one, (0, 0, 0, short.room)) for one in held]

    made: dict[str, Any] = {
        "token": token,
        "position_ids": places[..., -1:],
        "step": token.new_zeros(1),
        "keys": buffers(cache.keys),
        "values": buffers(cache.values),
        "states": cache.states or None,
    }
    if short.placed:
        made["positions"] = places[..., :-1]
    if "attention_mask" in short.inputs:
        made["attention_mask"] = token.new_ones(short.batch, BEFORE, dtype=short.inputs["attention_mask"][1])
    return made
