"""Top-K against plain loops."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.topk import topk
from tokcompile.methods.topk import TOPK


def compare(taps, where):
    plan, rows, _ = run(TOPK, taps, where)
    x, attention = taps["x"][:, where.prefix :], taps["cls_attention"][:, :, where.prefix :]
    for b in range(x.shape[0]):
        expected = sorted(topk(attention[b].numpy(), where.k))
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix):
    n = length - prefix
    compare(sequence(batch, length, seed=length), site(TOPK, n, n // 2, prefix))


@pytest.mark.parametrize("kind", ["ties", "constant"])
@pytest.mark.parametrize("k", [1, 13, 40])
def test_duplicated_tokens_go_to_the_lower_index(k, kind):
    compare(sequence(3, 40, seed=7, kind=kind), site(TOPK, 40, k))


def test_the_published_counts():
    assert [TOPK.steps.rate(196, 196, 0.7, step) for step in range(3)] == [137, 96, 67]
