"""Unchanged: a model after a run is what it was before, whatever its forward left on its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Takes back the tensors that a forward leaves on its modules (position offsets, tables), in their dictionaries and in
    those of objects they hold: tracing leaves fake ones."""
    places = [place for m in model.modules() for place in (m.__dict__, m._buffers)]
    for _ in range(2):
        inner = [d for place in places for v in place.values() if (d := names_in(v)) is not None]
        places = list({id(place): place for place in (*places, *inner)}.values())
    before = [dict(place) for place in places]
    try:
        yield
    finally:
        for place, old in zip(places, before):
            for name in [n for n, v in place.items() if holds_tensors(v) and old.get(n) is not v]:
                if name in old:
                    place[name] = old[name]
                else:
                    del place[name]


def names_in(value: Any) -> dict[Any, Any] | None:
    """What a dictionary, or an object that is no module, has by names."""
    if isinstance(value, dict):
        return value
    plain = not isinstance(value, (torch.nn.Module, torch.Tensor, type)) and not callable(getattr(value, "__get__", None))
    inside = getattr(value, "__dict__", None) if plain else None
    return inside if isinstance(inside, dict) else None


def holds_tensors(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in (value if isinstance(value, (tuple, list)) else (value,)))
