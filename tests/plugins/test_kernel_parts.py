"""The kernels that methods are made of: selection, gathering and merging, each alone."""

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.kernels import HALF, TYPES, Guarded, library, pointer
from tokcompile.primitives import apply, top_k
from tokcompile.recipe import Keep, Merge


def select(scores, k, is_sorted):
    b, n = scores.shape
    index = Guarded((b, k), torch.int64)
    space = Guarded((library().tc_select_workspace(b, n, k),), torch.uint8)
    code = library().tc_select(b, n, k, is_sorted, pointer(scores), pointer(index.tensor), pointer(space.tensor), None)
    index.check()
    space.check()
    assert code == 0
    return index.tensor


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan])
SCORES = st.lists(SPECIAL | st.floats(width=32), min_size=1, max_size=80)


@settings(max_examples=150, deadline=None)
@given(SCORES, st.data())
def test_select_is_top_k(values, data):
    """For any floats: -0 equals 0, NaN of either sign ranks highest, equal scores go to the lower index."""
    scores = torch.tensor([values])
    if data.draw(st.booleans()):
        scores = torch.where(scores.isnan(), -scores, scores)
    k = data.draw(st.integers(1, len(values)))
    best = top_k(scores, k)
    assert torch.equal(select(scores, k, 0), best)
    assert torch.equal(select(scores, k, 1), best.sort(-1).values)


@pytest.mark.parametrize(("n", "k"), [(4097, 4096), (16384, 5000), (65536, 100), (1, 1), (5000, 5000)])
@pytest.mark.parametrize("levels", [3, 1 << 24])
def test_select_many(n, k, levels):
    """Above TensorRT's own limit of 3,840, with few different scores and with many."""
    scores = torch.randint(-levels, levels, (2, n)).float()
    best = top_k(scores, k)
    if n * k < 10**8:
        assert torch.equal(select(scores, k, 0), best)
    assert torch.equal(select(scores, k, 1), best.sort(-1).values)


def tensors(batch, n, k, widths, dtypes):
    x = [torch.randn(batch, n, w).to(d) for w, d in zip(widths, dtypes)]
    out = [Guarded((batch, k, w), d) for w, d in zip(widths, dtypes)]
    kinds = (ctypes.c_int32 * len(x))(*(TYPES.index(d) for d in dtypes))
    sizes = (ctypes.c_int32 * len(x))(*widths)
    both = [(ctypes.c_void_p * len(x))(*(t.data_ptr() for t in ts)) for ts in (x, [o.tensor for o in out])]
    return x, out, (len(x), batch, n, k, kinds, sizes), both


def test_gather_moves_several_tensors():
    x, out, lead, (given_, wanted) = tensors(3, 29, 12, (1, 6, 64, 7), (*TYPES, torch.float16))
    index = torch.stack([torch.randperm(29)[:12] for _ in range(3)])
    assert library().tc_gather(*lead, given_, pointer(index), wanted, None) == 0
    for t, o in zip(x, out):
        o.check()
        assert torch.equal(o.tensor, t.gather(1, index[..., None].expand(-1, -1, t.shape[2])))


@pytest.mark.parametrize("sized", [True, False])
def test_merge_is_the_weighted_mean(sized):
    n, k = 37, 9
    x, out, lead, (given_, wanted) = tensors(3, n, k, (5, 48, 8), TYPES)
    order = torch.stack([torch.randperm(n) for _ in range(3)])
    index, sources = (t.contiguous() for t in order.split([k, n - k], 1))
    slots = torch.randint(0, k, sources.shape)
    size = torch.randint(1, 6, (3, n)).float() if sized else None
    new_size = torch.full((3, k), -1.0)
    arguments = [pointer(t) for t in (size, index, sources, slots)]
    assert library().tc_merge(*lead, given_, *arguments, wanted, pointer(new_size), None) == 0
    for t, o in zip(x, out):
        o.check()
        want, want_size = apply(Merge(index, sources, slots), t.double(), size)
        assert torch.equal(new_size, want_size.float())
        scale = want.abs().max().item() * {torch.float32: 1e-5, **HALF}[t.dtype]
        torch.testing.assert_close(o.tensor.double(), want, rtol=0, atol=scale)


def test_gather_keeps_wild_indices_inside():
    x, out, lead, (given_, wanted) = tensors(1, 5, 3, (4,), TYPES[:1])
    index = torch.tensor([[-7, 2, 2**40]])
    assert library().tc_gather(*lead, given_, pointer(index), wanted, None) == 0
    assert torch.equal(out[0].tensor, apply(Keep(torch.tensor([[0, 2, 4]])), x[0], None)[0])
