"""FastV against plain loops."""

import pytest
import torch

from tests.methods.inputs import run, sequence, site
from tests.reference.topk import topk
from tokcompile.methods.fastv import FASTV


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize(("batch", "prefix", "n", "k"), [(1, 0, 63, 20), (3, 5, 196, 1), (2, 35, 576, 64)])
def test_equals_the_loops(batch, prefix, n, k, kind):
    taps = sequence(batch, prefix + n + 7, seed=n, kind=kind)
    plan, rows, _ = run(FASTV, taps, site(FASTV, n, k, prefix))
    for b in range(batch):
        expected = sorted(topk(taps["last_attention"][b, :, prefix : prefix + n].numpy(), k))
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], taps["x"][b, prefix : prefix + n][expected])


def test_it_stands_at_layer_2_of_a_language_model():
    assert list(FASTV.steps.at(32, language=True)) == [2]
    assert list(FASTV.steps.at(12, language=False)) == [2]
    assert list(FASTV.steps.at(30, language=False)) == [5]
