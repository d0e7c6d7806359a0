"""Reach: how far back the queries of a layer see, in positions of the original prompt: what was dropped in between counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """A sliding window of `size` positions, or, `chunked`, the chunk of `size` positions that a query stands in."""

    size: int
    chunked: bool = False

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens at one position see those at another, whose order is no matter here."""
        return query // self.size == key // self.size if self.chunked else query - key < self.size

    def among(self, positions: Tensor) -> Tensor:
        """The same for each pair of tokens at positions (..., L): (..., L, L)."""
        return self.sees(positions[..., :, None], positions[..., None, :])


def reach_of(attention: Any, window: int | None) -> Reach | None:
    """Of an attention module of transformers that is called with this sliding window; None where it sees everything."""
    config, layer = getattr(attention, "config", None), int(attention.layer_idx)
    kinds = getattr(config, "layer_types", None) or ()
    if layer < len(kinds) and kinds[layer] == "chunked_attention":
        return Reach(int(config.attention_chunk_size), chunked=True)  # type: ignore[union-attr]
    return None if window is None else Reach(window)
