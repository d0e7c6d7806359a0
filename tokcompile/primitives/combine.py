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


def apply(
    plan: Keep | Merge | Mix, x: Tensor, size: Tensor | None, start: int = 0, n: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """New tokens and sizes: x: (B, L, D) of which the n tokens from `start` on are planned for (all by default), size:
    (B, n) float32 or None -> (B, L - n + k, D), (B, k) or None. What stands before and after passes through."""
    n = x.shape[1] if n is None else n
    if isinstance(plan, Merge):
        size = size if size is not None else torch.ones(x.shape[0], n, device=x.device)
        if current_forms().merge == "rows":
            return merge_rows(plan, x, size, start)
        return around(x, start, n, merge_onehot(plan, x[:, start : start + n], size))
    body = x[:, start : start + n]
    if isinstance(plan, Mix):
        total = None if size is None else (plan.weights @ size[..., None])[..., 0]
        return around(x, start, n, (plan.weights.to(x.dtype) @ body, total))
    kept_size = None if size is None else gather_rows(size, plan.index)
    if plan.extra is None:
        return gather_rows(x, whole(plan.index, start, n, x.shape[1])), kept_size
    kept = plan.index[:, : plan.index.shape[1] - plan.extra.shape[1]]
    rows = torch.cat([gather_rows(body, kept), plan.extra.to(x.dtype) @ body], dim=1)
    return around(x, start, n, (rows, kept_size))


def around(x: Tensor, start: int, n: int, new: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """The new tokens between what stands before and after the n old ones."""
    parts = [x[:, :start]] * (start > 0) + [new[0]] + [x[:, start + n :]] * (start + n < x.shape[1])
    return (torch.cat(parts, 1) if len(parts) > 1 else new[0]), new[1]


def whole(index: Tensor, start: int, n: int, length: int) -> Tensor:
    """Positions in a whole sequence of `length`: what stands before, the chosen ones among the n tokens, what follows."""
    if n == length:
        return index
    b, device = index.shape[0], index.device
    before = [torch.arange(start, device=device).expand(b, -1)] * (start > 0)
    after = [torch.arange(start + n, length, device=device).expand(b, -1)] * (start + n < length)
    return torch.cat([*before, index + start, *after], 1)


def merge_rows(plan: Merge, x: Tensor, size: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of each slot's members, x'_b = (s_b x_b + sum s_a x_a) / (s_b + sum s_a), written as an update
    of the merged rows only, on flat rows throughout: what stands around the tokens is copied in the same gather, and has
    sizes of 1 here so that the same indices serve for both."""
    (b, k), n, length = plan.index.shape, size.shape[1], x.shape[1]
    left, pads = length - n + k, [size.new_ones(b, count) for count in (start, length - start - n)]
    rows, sizes = x.reshape(b * length, -1), size
    if n < length:
        sizes = torch.cat([part for part in (pads[0], size, pads[1]) if part.shape[1]], 1)
    sizes = sizes.reshape(-1)
    index = flat_index(whole(plan.index, start, n, length), length)
    sources = flat_index(plan.sources + start if start else plan.sources, length)
    slots = flat_index(plan.slots + start if start else plan.slots, left)
    kept, joining, weight = rows.index_select(0, index), rows.index_select(0, sources), sizes.index_select(0, sources)
    weight = weight if plan.joins is None else weight * plan.joins.reshape(-1)
    total = sizes.index_select(0, index).index_add(0, slots, weight)
    work = torch.promote_types(x.dtype, torch.float32)  # float64 models keep their precision
    share = weight.to(work) / total.index_select(0, slots).to(work)
    if x.dtype != work:  # a sum in half precision is rounded with each token that joins
        kept, joining = kept.to(work), joining.to(work)
    new = kept.index_add(0, slots, share[:, None] * (joining - kept.index_select(0, slots)))
    new = new.to(x.dtype) if x.dtype != work else new
    return new.reshape(b, left, -1), total.reshape(b, left)[:, start : start + k]


def merge_onehot(plan: Merge, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The mean as a matmul with a one-hot matrix, for runtimes that cannot add while scattering."""
    kept, new_size = gather_rows(x, plan.index), gather_rows(size, plan.index)
    source, weight = gather_rows(x, plan.sources), gather_rows(size, plan.sources)
    weight = weight if plan.joins is None else weight * plan.joins
    to = torch.arange(plan.index.shape[1], device=x.device)[:, None]
    onehot = (plan.slots[:, None, :] == to).to(x.dtype)  # (B, k, r)
    total = new_size + (onehot.float() @ weight[..., None])[..., 0]
    work = torch.promote_types(x.dtype, torch.float32)
    own = new_size.to(work) / total.to(work)
    share = weight.to(work) / gather_rows(total, plan.slots).to(work)  # not sums, which half precision has no room for
    return kept * own[..., None].to(x.dtype) + onehot @ (source * share[..., None].to(x.dtype)), total


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
    if plan.assign is not None:
        return plan.assign
    unit_x = unit(x)
    nearest = (unit_x @ gather_rows(unit_x, plan.index).transpose(1, 2)).argmax(dim=-1)
    return nearest.scatter(1, plan.index, own)


def scatter_slots(index: Tensor, slots: Tensor, n: int) -> Tensor:
    return torch.zeros(index.shape[0], n, dtype=torch.int64, device=index.device).scatter(1, index, slots)
