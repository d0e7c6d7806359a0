"""Clustering with a fixed number of clusters: density peaks, k nearest neighbours (DPC-KNN)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.primitives.combine import gather_rows
from tokcompile.primitives.select import first_argmax, identity, top_k


def distances(x: Tensor) -> Tensor:
    """Euclidean distances over sqrt(D): x: (B, n, D) -> (B, n, n), float32, symmetric and zero on the diagonal."""
    x = x.float()
    product = x @ x.transpose(1, 2)
    product = (product + product.transpose(1, 2)) / 2  # a kernel may round the two halves differently; mutual neighbours tie
    square = torch.diagonal(product, dim1=1, dim2=2)
    gap = (square[:, :, None] + square[:, None] - 2 * product).clamp_min(0)
    return (gap * (1 - torch.eye(x.shape[1], device=x.device)) / x.shape[2]).sqrt()


def density_peaks(x: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Centres (B, count), best first, and the cluster of every token (B, n): x: (B, n, D).

    A centre has many near neighbours and is far from any token that has more: density exp(-mean of the squared distances to
    the nearest `neighbours` tokens, itself among them) times the distance to the nearest denser one. Of equally dense
    tokens the lower index counts as denser; the densest of all comes first. Each token joins its nearest centre.
    """
    apart = distances(x)
    near = torch.topk(apart, neighbours, dim=-1, largest=False).values
    sparse = (near * near).mean(-1)  # compared as it is: exp would round neighbouring densities to the same
    ramp = torch.arange(x.shape[1], device=x.device)
    above = sparse[:, None] < sparse[:, :, None]
    denser = above | ((sparse[:, None] == sparse[:, :, None]) & (ramp[None] < ramp[:, None]))
    beyond = apart.amax((1, 2), keepdim=True) + 1
    centres = top_k(torch.where(denser, apart, beyond).amin(-1) * (-sparse).exp(), count)
    slots = first_argmax(-gather_rows(apart, centres).transpose(1, 2))
    return centres, slots.scatter(1, centres, identity(centres))


def members(slots: Tensor, count: int) -> Tensor:
    """Who is in which cluster, as ones and zeros: slots: (B, n) -> (B, count, n), float32."""
    return (slots[:, None] == torch.arange(count, device=slots.device)[:, None]).float()
