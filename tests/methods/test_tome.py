"""ToMe against plain loops: order, parity and protected tokens, values and sizes."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.tome import tome
from tokcompile.methods.tome import TOME


def compare(taps, where):
    plan, rows, sizes = run(TOME, taps, where)
    for b in range(rows.shape[0]):
        keys, x, size = (taps[name][b].numpy() for name in ("k", "x", "size"))
        index, expected, expected_sizes = tome(keys, x, size, where.prefix, where.n - where.k)
        assert plan.index[b].tolist() == index
        torch.testing.assert_close(rows[b].double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
        assert sizes[b].tolist() == expected_sizes.tolist()
        assert sizes[b].sum() == taps["size"][b, where.prefix :].sum()


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix):
    if length == 577 and (batch, prefix) not in [(1, 0), (3, 1)]:
        batch = 1
    n = length - prefix
    compare(sequence(batch, length, seed=length), site(TOME, n, n - n // 4, prefix))


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [2, 3, 4, 7, 12])
def test_every_count_down_to_half(n, prefix):
    for k in range(n - n // 2, n):
        compare(sequence(2, prefix + n, seed=k), site(TOME, n, k, prefix))


@pytest.mark.parametrize("kind", ["ties", "constant"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_duplicated_tokens_go_to_the_lower_index(prefix, kind):
    compare(sequence(3, prefix + 40, seed=3, kind=kind), site(TOME, 40, 27, prefix))


def test_the_published_clip_is_half_of_the_tokens():
    assert [TOME.least(n, {}) for n in (1, 2, 3, 20, 196)] == [1, 1, 2, 10, 98]


def test_nothing_removed_is_the_identity():
    taps = sequence(2, 9)
    plan, rows, sizes = run(TOME, taps, site(TOME, 9, 9))
    assert plan.index.tolist() == [list(range(9))] * 2
    assert torch.equal(rows, taps["x"])
    assert torch.equal(sizes, taps["size"])


def test_the_order_without_a_class_token_is_by_similarity():
    taps = sequence(1, 64, seed=1)
    first = run(TOME, taps, site(TOME, 64, 50))[0].index[0, :18]
    assert sorted(first.tolist()) != first.tolist()
    assert bool((first % 2 == 0).all())
