"""Similarities, always in float32: half precision reorders near ties."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of x: (..., d) scaled to length one, in float32."""
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities a: (B, n, d), b: (B, m, d) -> (B, n, m), float32."""
    return unit(a) @ unit(b).transpose(-1, -2)
