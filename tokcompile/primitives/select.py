"""Selecting tokens: a fixed count, ties to the lower index, no loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.primitives.combine import gather_rows
from tokcompile.primitives.forms import current_forms


def sortable(score: Tensor) -> Tensor:
    """float32 scores as int64 keys, all different: by score, then the lower index; NaN ranks highest."""
    score = score.float() + 0.0  # negative zero equals zero
    bits = torch.where(score != score, 0x7FFFFFFF, score.view(torch.int32))  # 0/0 gives a NaN whose sign bit is set
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    n = score.shape[-1]
    return key * (1 << 31) + torch.arange(n - 1, -1, -1, device=score.device)


def top_k(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest of score: (B, n), best first, the lower index first among equals: (B, k)."""
    if current_forms().top_k == "key":
        score = sortable(score)
    return torch.topk(score, k, dim=-1, largest=True, sorted=True).indices


def identity(x: Tensor) -> Tensor:
    """Every token of x: (B, n, ...) in its order: (B, n)."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def ascending(index: Tensor) -> Tensor:
    """The same indices in their original order: (B, k)."""
    return torch.sort(index, dim=-1).values


def keep_best(score: Tensor, k: int) -> Tensor:
    """The k best of score: (B, n) in their original order: (B, k)."""
    return ascending(top_k(score, k))


def complement(index: Tensor, n: int) -> Tensor:
    """The n - k tokens that `index`: (B, k) leaves out, ascending: (B, n - k)."""
    ramp = torch.arange(n, 0, -1, device=index.device, dtype=torch.float32).expand(index.shape[0], -1)
    left = ramp.scatter(1, index, torch.zeros_like(index, dtype=torch.float32))
    return torch.topk(left, n - index.shape[1], dim=-1).indices


def first_argmax(x: Tensor) -> Tensor:
    """argmax over the last axis, the lower index among equals: (..., n) -> (...)."""
    return x.argmax(dim=-1)


def farthest_points(distance: Tensor, seed: Tensor, k: int) -> Tensor:
    """Greedy max-min selection: distance: (B, n, n), seed: (B,) first pick -> (B, k) in the order of picking.

    Each step takes the token farthest from all picked ones, the lower index among equals; none is taken twice.
    """
    picks = [seed]
    nearest = torch.full(distance.shape[:2], float("inf"), dtype=distance.dtype, device=distance.device)
    for _ in range(k - 1):
        last = picks[-1][:, None]
        nearest = torch.minimum(nearest, gather_rows(distance, last)[:, 0]).scatter(1, last, float("-inf"))
        picks.append(first_argmax(nearest))
    return torch.stack(picks, dim=1)
