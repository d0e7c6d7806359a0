"""Caches and attention that a transformers decoder is called with, of any family: it names no model and no library.

A decoder asks its cache for two things: where the query stands, and the keys and values to attend to. Which of them
a query may see is decided here, layer by layer, since layers after a reduction hold fewer keys than those before it. Layers
that mix along the sequence (short convolutions, linear attention) keep a state of one size, however long the prompt was.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.errors import InputError
from tokcompile.llm.reach import Reach, reach_of

Attention = Callable[..., Any]  # as transformers calls it: (module, query, key, value, attention_mask, **kwargs)
Masks = Callable[[int, "Reach | None", Tensor], Tensor]  # (layer, its reach, keys) -> what its query may see of these
SPECIAL = ("softcap", "s_aux", "position_bias")  # arguments that change the scores: left to the model's own attention


class AttendsItself(Exception):
    """What a token may see cannot be said from outside: the model has to make masks and biases itself."""


def cache_name(model: nn.Module) -> str:
    """As what its forward takes a cache: `cache` since transformers 5.24."""
    takes = inspect.signature(model.forward).parameters
    return "cache" if "cache" in takes and "past_key_values" not in takes else "past_key_values"


def last_logits(model: nn.Module) -> dict[str, Any]:
    """What makes a model give the logits of the last token alone, where it can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class Collecting:
    """The cache of a prefill: it keeps every key and value, those outside of a sliding window too.

    A transformers cache cuts a sliding layer to its window, which counts entries; after a reduction the window is counted
    in original positions and may reach back to any entry.
    """

    is_compileable = False
    is_initialized = False

    def __init__(self) -> None:
        self.filled: list[int] = []  # that have keys and values, as they come
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.states: dict[str, Tensor] = {}

    def enter(self, layer: int) -> int:
        """The place of a layer's keys and values."""
        assert layer > max(self.filled, default=-1), "layers fill their caches in order"
        self.filled.append(layer)
        return len(self.filled) - 1

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.enter(layer_idx)
        self.keys.append(key)
        self.values.append(value)
        return key, value

    def owner(self, layer: int, key: Tensor, again: bool) -> int | None:
        """The place of the keys that a layer attends to: these, wherever they came from, or what it made of its own ones.
        again: whether it has attended before, so that its own ones may be those of then."""
        same = next((at for at, one in enumerate(self.keys) if one is key), None)
        return self.filled.index(layer) if same is None and not again and layer in self.filled else same

    def outputs(self, prefix: str = "") -> dict[str, Any]:
        """All that it holds, by the names of a prefill's outputs."""
        made: dict[str, Any] = {f"{prefix}keys": self.keys, f"{prefix}values": self.values}
        return made | ({f"{prefix}states": self.states} if self.states else {})

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(f"conv_{layer_idx}_{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(f"recurrent_{layer_idx}_{state_idx}")

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """What is to be convolved: with the tokens before it, and at least as long as the kernel. (B, channels, length)"""
        before = self.get_conv_state(layer_idx, state_idx)
        size = conv_kernel_size or conv_states.shape[-1] if before is None else before.shape[-1]
        seen = conv_states if before is None else torch.cat([before, conv_states], -1)
        seen = nn.functional.pad(seen, (max(0, size - seen.shape[-1]), 0))
        self.states[f"conv_{layer_idx}_{state_idx}"] = seen[..., -size:].clone()
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.states[f"recurrent_{layer_idx}_{state_idx}"] = recurrent_states
        return recurrent_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Of sparse attention, which is decoded only as far as it chooses all keys: see `decode.check_model`."""
        return indexer_key_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """query: how many there are, or, before transformers 5, their positions."""
        return (query if isinstance(query, int) else len(query)), 0


class Slots(Collecting):
    """The cache of a decode step: buffers of static length, into which one new entry is written at a given slot.

    keys, values: one (B, heads, capacity, width) a layer that attends. slots: (1,) for each, the place of the new entry.
    states: of the other layers, by name.
    """

    is_compileable = True
    is_initialized = True

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], slots: Sequence[Tensor], states: Mapping[str, Tensor]):
        super().__init__()
        self.keys, self.values, self.slots = list(keys), list(values), slots
        self.states = {name: state.clone() for name, state in states.items()}  # models change them in place

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        at = self.enter(layer_idx)
        if at == len(self.keys):
            raise InputError(f"the prefill returns {at} caches, and more layers of this model have one: it is another one")
        self.keys[at] = self.write(self.keys[at], key, at)
        self.values[at] = self.write(self.values[at], value, at)
        return self.keys[at], self.values[at]

    def write(self, buffer: Tensor, new: Tensor, at: int) -> Tensor:
        # ScatterElements without reduction: onnxruntime writes in place where a buffer is bound as input and output
        return buffer.scatter(2, self.slots[at].view(1, 1, 1, 1).expand(new.shape), new)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True


@contextmanager
def replaced_attention(model: nn.Module, make: Callable[[Attention | None], Attention]) -> Iterator[None]:
    """For the duration of the block, the model's attention functions are what `make` gives for each of them (None for the
    one that transformers keeps beside its table, of eager mode). Attention that is no layer's, such as that over the results of
    earlier layers, stays as it is."""
    files = {sys.modules[type(m).__module__] for m in model.modules() if type(m).__module__ in sys.modules}
    tables = {id(t): t for t in (getattr(file, "ALL_ATTENTION_FUNCTIONS", None) for file in files) if t is not None}
    changed = []
    try:
        for table in tables.values():
            for name in {"eager", *table}:
                own = table._local_mapping.get(name)
                changed.append((table, name, own))
                table[name] = of_layers(make(table.get(name)), table.get(name))
        yield
    finally:
        for table, name, own in reversed(changed):
            if own is None:
                del table[name]
            else:
                table[name] = own


def of_layers(made: Attention, original: Attention | None) -> Attention:
    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = made if hasattr(module, "layer_idx") else original or eager_attention(module)
        return own(module, *args, **kwargs)

    return attend


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
        if module.layer_idx is None:
            raise AttendsItself("attention that several layers share does not say in which of them it is called")
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        seen.append(layer)
        mask = masks(layer, reach_of(module, kwargs.get("sliding_window")), key)
        if any(kwargs.get(name) is not None for name in SPECIAL):
            # as the model computes it: only its own function knows what those arguments mean
            bias = kwargs.get("position_bias")
            if bias is not None and bias.shape[-1] != key.shape[2]:
                raise AttendsItself(f"layer {layer} counts distances on its own cache")
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
