"""DivPrune against plain loops."""

import pytest
import torch

from tests.methods.inputs import run, sequence, site
from tests.reference.divprune import divprune
from tokcompile.methods.divprune import DIVPRUNE


def compare(taps, where):
    plan, rows, _ = run(DIVPRUNE, taps, where)
    x = taps["x"][:, where.prefix :]
    for b in range(x.shape[0]):
        expected = sorted(divprune(x[b].numpy(), where.k))
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1), (1, 2)])
@pytest.mark.parametrize(("length", "k"), [(63, 40), (196, 60), (197, 20), (577, 20)])
def test_equals_the_loops(length, k, batch, prefix):
    batch = 1 if length == 577 else batch
    compare(sequence(batch, length, seed=length), site(DIVPRUNE, length - prefix, k, prefix))


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_every_count(n):
    for k in range(1, n + 1):
        compare(sequence(2, n, seed=k), site(DIVPRUNE, n, k))


@pytest.mark.parametrize("kind", ["ties", "constant"])
@pytest.mark.parametrize("k", [2, 9, 30])
def test_a_duplicate_is_never_taken_twice(k, kind):
    compare(sequence(3, 33, seed=2, kind=kind), site(DIVPRUNE, 33, k))
