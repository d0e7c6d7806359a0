"""Caches and attention that a transformers decoder is called with, of any family: it names no model and no library.

A decoder asks its cache for two things only: where the query stands, and the keys and values to attend to. Which of them
a query may see is decided here, layer by layer, since layers after a reduction hold fewer keys than those before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Attention = Callable[..., Any]  # as transformers calls it: (module, query, key, value, attention_mask, **kwargs)
Masks = Callable[[int, "int | None"], Tensor]  # (layer, sliding window) -> what its query may see: (B or 1, 1, 1, capacity)
SPECIAL = ("softcap", "s_aux", "position_bias")  # arguments that change the scores: left to the model's own attention


class Collecting:
    """The cache of a prefill: it keeps every key and value, those outside of a sliding window too.

    A transformers cache cuts a sliding layer to its window, which counts entries; after a reduction the window is counted
    in original positions and may reach back to any entry.
    """

    is_compileable = False
    is_initialized = False

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert layer_idx == len(self.keys), "layers fill their caches in order"
        self.keys.append(key)
        self.values.append(value)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class Slots(Collecting):
    """The cache of a decode step: buffers of static length, into which one new entry is written at a given slot.

    keys, values: one (B, heads, capacity, width) a layer. slots: (1,) a layer, the place of the new entry.
    """

    is_compileable = True
    is_initialized = True

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], slots: Sequence[Tensor]):
        self.keys, self.values, self.slots = list(keys), list(values), slots

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[layer_idx] = self.write(self.keys[layer_idx], key, layer_idx)
        self.values[layer_idx] = self.write(self.values[layer_idx], value, layer_idx)
        return self.keys[layer_idx], self.values[layer_idx]

    def write(self, buffer: Tensor, new: Tensor, layer: int) -> Tensor:
        # ScatterElements without reduction: onnxruntime writes in place where a buffer is bound as input and output
        return buffer.scatter(2, self.slots[layer].view(1, 1, 1, 1).expand(new.shape), new)


@contextmanager
def replaced_attention(model: nn.Module, make: Callable[[Attention | None], Attention]) -> Iterator[None]:
    """For the duration of the block, the model's attention functions are what `make` gives for each of them (None for the
    one that transformers keeps beside its table, of eager mode)."""
    files = {sys.modules[type(m).__module__] for m in model.modules() if type(m).__module__ in sys.modules}
    tables = {id(t): t for t in (getattr(file, "ALL_ATTENTION_FUNCTIONS", None) for file in files) if t is not None}
    changed = []
    try:
        for table in tables.values():
            for name in {"eager", *table}:
                own = table._local_mapping.get(name)
                changed.append((table, name, own))
                table[name] = make(table.get(name))
        yield
    finally:
        for table, name, own in reversed(changed):
            if own is None:
                del table[name]
            else:
                table[name] = own


@contextmanager
def attention_over(model: nn.Module, masks: Masks) -> Iterator[list[int]]:
    """The model's attention, over one query token, reads `masks` instead of the mask it is given.

    Gives the list of layers that came by, by which one sees whether the model's attention can be reached at all.
    """
    seen: list[int] = []
    with replaced_attention(model, lambda original: attention(original, masks, seen)):
        yield seen


def attention(original: Attention | None, masks: Masks, seen: list[int]) -> Attention:
    """An attention function as transformers calls it, for one query token."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        seen.append(layer)
        mask = masks(layer, kwargs.get("sliding_window"))
        if any(kwargs.get(name) is not None for name in SPECIAL):
            # as the model computes it: only its own function knows what those arguments mean
            own = eager_attention(module, original)
            scores = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
            return own(module, query, key, value, scores, **{**kwargs, "dropout": 0.0})[0], None
        batch, heads, length, width = query.shape
        # the queries of a group are rows over its one key head: nothing is repeated
        rows = query.reshape(batch, key.shape[1], heads // key.shape[1] * length, width)
        out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
        return out.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None

    return attend


def eager_attention(module: nn.Module, other: Attention | None = None) -> Attention:
    """The attention function in a model's own file, which takes all arguments that the model gives it."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", other)
    assert own is not None
    return own


def passing_mask() -> Any:
    """A mask that every model hands through to its attention: transformers takes one of four axes as ready."""
    return torch.zeros(1, 1, 1, 1)


def config_of(model: Any) -> Any:
    """The configuration of the text decoder."""
    config = getattr(model, "config", SimpleNamespace())
    return config.get_text_config() if hasattr(config, "get_text_config") else config
