"""M3 against plain loops and against average pooling."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from tests.methods.inputs import run, sequence, site
from tests.reference.m3 import m3
from tokcompile.methods.grid import sub_grid
from tokcompile.methods.m3 import M3
from tokcompile.primitives import apply
from tokcompile.recipe import Tokens


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4), (7, 9), (5, 3), None])
def test_equals_the_loops_at_every_count(shape, prefix):
    n = shape[0] * shape[1] if shape else 23
    taps = sequence(3, prefix + n)
    for k in range(1, n):
        plan, rows, _ = run(M3, taps, site(M3, n, k, prefix, grid=shape))
        cut = sub_grid(*shape, k) if shape else None
        for b in range(3):
            x = taps["x"][b, prefix:].numpy()
            expected = m3(x, shape, *cut) if cut else m3(x, (1, n), 1, k)
            torch.testing.assert_close(rows[b].double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
        lends = plan.weights.gather(2, plan.index[..., None])
        assert bool((lends > 0).all())  # a token's position is that of one of its members


@pytest.mark.parametrize("k", [144, 36, 9, 1])
def test_a_share_of_the_squares_is_average_pooling(k):
    taps, p = sequence(2, 576, seed=1), int((576 / k) ** 0.5)
    _, rows, _ = run(M3, taps, site(M3, 576, k, grid=(24, 24)))
    expected = avg_pool2d(taps["x"].transpose(1, 2).unflatten(2, (24, 24)), p).flatten(2).transpose(1, 2)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


def test_a_coarser_level_is_the_mean_of_a_finer_one():
    taps = sequence(1, 256, seed=2)
    _, fine, _ = run(M3, taps, site(M3, 256, 64, grid=(16, 16)))
    again = M3.plan(Tokens(x=fine), site(M3, 64, 16, grid=(8, 8)))
    _, coarse, _ = run(M3, taps, site(M3, 256, 16, grid=(16, 16)))
    torch.testing.assert_close(apply(again, fine, None)[0], coarse, rtol=0, atol=1e-5)


def test_a_grid_of_another_size_is_not_believed():
    taps = sequence(1, 16)
    plan, _, _ = run(M3, taps, site(M3, 16, 4, grid=(5, 5)))
    assert plan.index.tolist() == [[1, 5, 9, 13]]
