"""PyramidDrop against plain loops; that it looks ahead is tested in test_language_models.py."""

import pytest
import torch

from tests.methods.inputs import run, sequence, site
from tests.reference.topk import topk
from tokcompile.methods.pyramiddrop import PYRAMIDDROP


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize(("batch", "prefix", "n", "k"), [(1, 0, 63, 20), (3, 5, 196, 1), (2, 35, 576, 288)])
def test_equals_the_loops(batch, prefix, n, k, kind):
    taps = sequence(batch, prefix + n + 7, seed=n, kind=kind)
    plan, rows, _ = run(PYRAMIDDROP, taps, site(PYRAMIDDROP, n, k, prefix))
    for b in range(batch):
        expected = sorted(topk(taps["last_attention"][b, :, prefix : prefix + n].numpy(), k))
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], taps["x"][b, prefix : prefix + n][expected])


def test_the_published_stages_and_counts():
    assert list(PYRAMIDDROP.steps.at(32, language=True)) == [8, 16, 24]
    counts, n = [], 576
    for i in range(3):
        counts.append(PYRAMIDDROP.steps.rate(n, 576, 0.5, i))
        n = counts[-1]
    assert counts == [288, 144, 72]
    assert list(PYRAMIDDROP.steps.counts(576, 72, 3)) == [288, 144, 72]
