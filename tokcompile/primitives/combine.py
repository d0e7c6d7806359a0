"""Turning a plan into new tokens: gather, size-weighted merge, or weighted sums."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.primitives.forms import current_forms
from tokcompile.primitives.score import unit
from tokcompile.recipe import Keep, Merge, Mix


def flat_index(index: Tensor, n: int) -> Tensor:
    """index: (B, k) into n rows each, as (B*k,) into B*n rows."""
    if index.shape[0] == 1:
        return index.reshape(-1)
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * n).reshape(-1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, n, ...), index: (B, k) -> (B, k, ...)."""
    b, n, *rest = x.shape
    if current_forms().gather == "elements":
        return torch.gather(x, 1, index.reshape(*index.shape, *(1,) * len(rest)).expand(*index.shape, *rest))
    if b == 1:
        return x.index_select(1, index.reshape(-1))
    return x.reshape(b * n, *rest).index_select(0, flat_index(index, n)).reshape(b, index.shape[1], *rest)


def apply(plan: Keep | Merge | Mix, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """New tokens and sizes: x: (B, n, D), size: (B, n) float32 or None -> (B, k, D), (B, k) or None."""
    if isinstance(plan, Merge):
        return merge(plan, x, size if size is not None else torch.ones(x.shape[:2], device=x.device))
    if isinstance(plan, Mix):
        total = None if size is None else (plan.weights @ size[..., None])[..., 0]
        return (plan.weights.to(x.dtype) @ x), total
    if plan.extra is None:
        return gather_rows(x, plan.index), None if size is None else gather_rows(size, plan.index)
    kept = plan.index[:, : plan.index.shape[1] - plan.extra.shape[1]]
    rows = torch.cat([gather_rows(x, kept), plan.extra.to(x.dtype) @ x], dim=1)
    return rows, None if size is None else gather_rows(size, plan.index)


def merge(plan: Merge, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of each slot's members: x'_b = (s_b x_b + sum s_a x_a) / (s_b + sum s_a)."""
    if current_forms().merge == "onehot":
        return merge_onehot(plan, x, size)
    # the same mean, written as an update of the merged rows only, on flat rows throughout
    (b, k), n = plan.index.shape, x.shape[1]
    rows, sizes = x.reshape(b * n, -1), size.reshape(-1)
    index, sources, slots = flat_index(plan.index, n), flat_index(plan.sources, n), flat_index(plan.slots, k)
    kept, weight = rows.index_select(0, index), sizes.index_select(0, sources)
    total = sizes.index_select(0, index).index_add(0, slots, weight)
    share = weight / total.index_select(0, slots)
    update = share[:, None].to(x.dtype) * (rows.index_select(0, sources) - kept.index_select(0, slots))
    return kept.index_add(0, slots, update).reshape(b, k, -1), total.reshape(b, k)


def merge_onehot(plan: Merge, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The mean as a matmul with a one-hot matrix, for runtimes that cannot add while scattering."""
    kept, new_size = gather_rows(x, plan.index), gather_rows(size, plan.index)
    source, weight = gather_rows(x, plan.sources), gather_rows(size, plan.sources)
    to = torch.arange(plan.index.shape[1], device=x.device)[:, None]
    onehot = (plan.slots[:, None, :] == to).to(x.dtype)  # (B, k, r)
    total = new_size + (onehot.float() @ weight[..., None])[..., 0]
    summed = kept * new_size[..., None].to(x.dtype) + onehot @ (source * weight[..., None].to(x.dtype))
    return summed / total[..., None].to(x.dtype), total


def assignment(plan: Keep | Merge | Mix, x: Tensor) -> Tensor:
    """The new token that each old one went to, for dense outputs: (B, n).

    Merged tokens go to their group; dropped ones to the kept token most like them (cosine of x: (B, n, D)).
    """
    b, n, _ = x.shape
    own = torch.arange(plan.index.shape[1], device=x.device).expand(b, -1)
    if isinstance(plan, Merge):
        return scatter_slots(torch.cat([plan.index, plan.sources], 1), torch.cat([own, plan.slots], 1), n)
    if isinstance(plan, Mix):
        return plan.weights.argmax(dim=1)
    unit_x = unit(x)
    nearest = (unit_x @ gather_rows(unit_x, plan.index).transpose(1, 2)).argmax(dim=-1)
    return nearest.scatter(1, plan.index, own)


def scatter_slots(index: Tensor, slots: Tensor, n: int) -> Tensor:
    return torch.zeros(index.shape[0], n, dtype=torch.int64, device=index.device).scatter(1, index, slots)
