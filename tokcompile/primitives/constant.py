"""Numbers that are known when a model is compiled, as tensors on its device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def constant(values: Sequence[Any], like: Tensor) -> Tensor:
    """torch.tensor(values) on the device of `like`; nested sequences of numbers of one type.

    On a GPU it is copied from the host once: a CUDA graph may not hold such a copy, and each one waits for the device.
    """
    if like.device.type == "cpu" or isinstance(like, FakeTensor):
        return torch.tensor(values, device=like.device)
    return on_device(hashable(values), like.device)


@torch.compiler.assume_constant_result
def on_device(values: tuple[Any, ...], device: torch.device) -> Tensor:
    return copied(values, device)


@functools.lru_cache(maxsize=1024)
def copied(values: tuple[Any, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be read outside of the mode that it was first asked for in
        return torch.tensor(values, device=device)


def hashable(values: Any) -> Any:
    return tuple(map(hashable, values)) if isinstance(values, Sequence) else values
