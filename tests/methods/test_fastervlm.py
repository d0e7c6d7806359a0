"""FasterVLM and VTC-CLS against plain loops: what one reads head by head, the other reads layer by layer."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.topk import topk
from tokcompile.methods.fastervlm import FASTERVLM
from tokcompile.methods.vtc_cls import VTC_CLS

BOTH = pytest.mark.parametrize("recipe", [FASTERVLM, VTC_CLS], ids=lambda recipe: recipe.name)


def compare(recipe, taps, where):
    plan, rows, _ = run(recipe, taps, where)
    x, attention = taps["x"][:, where.prefix :], taps[recipe.taps[1]][:, :, where.prefix :]
    for b in range(x.shape[0]):
        expected = sorted(topk(attention[b].numpy(), where.k))
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@BOTH
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix, kind, recipe):
    compare(recipe, sequence(batch, length, seed=length, kind=kind), site(recipe, length - prefix, length // 10, prefix))


@BOTH
@pytest.mark.parametrize("n", [1, 2, 9])
def test_every_count(n, recipe):
    for k in range(1, n + 1):
        compare(recipe, sequence(2, n, seed=k), site(recipe, n, k))


@BOTH
def test_it_stands_at_the_last_block(recipe):
    assert recipe.place == "block"
    assert list(recipe.steps.at(24, language=False)) == [23]
    assert list(recipe.steps.at(1, language=False)) == [0]
