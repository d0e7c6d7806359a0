"""FasterVLM against plain loops."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.topk import topk
from tokcompile.methods.fastervlm import FASTERVLM


def compare(taps, where):
    plan, rows, _ = run(FASTERVLM, taps, where)
    x, attention = taps["x"][:, where.prefix :], taps["cls_attention"][:, :, where.prefix :]
    for b in range(x.shape[0]):
        expected = sorted(topk(attention[b].numpy(), where.k))
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix, kind):
    compare(sequence(batch, length, seed=length, kind=kind), site(FASTERVLM, length - prefix, length // 10, prefix))


@pytest.mark.parametrize("n", [1, 2, 9])
def test_every_count(n):
    for k in range(1, n + 1):
        compare(sequence(2, n, seed=k), site(FASTERVLM, n, k))


def test_it_stands_at_the_last_block():
    assert FASTERVLM.place == "block"
    assert list(FASTERVLM.steps.at(24, language=False)) == [23]
    assert list(FASTERVLM.steps.at(1, language=False)) == [0]
