"""DART against plain loops."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.dart import dart
from tokcompile.errors import MethodError
from tokcompile.methods.dart import DART, quotas


def compare(taps, where):
    plan, rows, _ = run(DART, taps, where)
    x, keys, hidden = taps["x"][:, where.prefix :], taps["k"][:, :, where.prefix :], taps["normed"][:, where.prefix :]
    for b in range(x.shape[0]):
        expected = dart(keys[b].numpy(), hidden[b].numpy(), where.k, where.options["pivots"])
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize("pivots", [4, 7])
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1), (1, 2)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix, pivots):
    n = length - prefix
    compare(sequence(batch, length, seed=length), site(DART, n, n // 3, prefix, options={"pivots": pivots}))


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_every_count(n):
    for k in range(1, n + 1):
        compare(sequence(2, n, seed=k), site(DART, n, k))


@pytest.mark.parametrize("kind", ["ties", "constant"])
def test_duplicated_tokens_go_to_the_lower_index(kind):
    compare(sequence(3, 40, seed=4, kind=kind), site(DART, 40, 17))


@pytest.mark.parametrize(("total", "pivots", "expected"), [(60, 4, [15] * 4), (10, 4, [3, 3, 2, 2]), (1, 3, [1, 0, 0])])
def test_quotas(total, pivots, expected):
    assert quotas(total, pivots) == expected


def test_no_pivot_is_refused():
    with pytest.raises(MethodError, match="at least one pivot, not 0"):
        run(DART, sequence(1, 8), site(DART, 8, 4, options={"pivots": 0}))
