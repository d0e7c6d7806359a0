"""VATP against plain loops."""

import pytest
import torch

from tests.methods.inputs import run, sequence, site
from tests.reference.vatp import vatp
from tokcompile.methods.vatp import VATP


@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
@pytest.mark.parametrize(("batch", "prefix", "n", "k"), [(1, 0, 63, 20), (3, 5, 196, 1), (2, 35, 576, 64)])
@pytest.mark.parametrize("shared", [1, 2])
def test_equals_the_loops(batch, prefix, n, k, kind, shared):
    taps = sequence(batch, prefix + n + 7, seed=n, kind=kind, heads=4)
    taps["v"] = taps["v"][:, ::shared]
    plan, rows, _ = run(VATP, taps, site(VATP, n, k, prefix))
    image = slice(prefix, prefix + n)
    for b in range(batch):
        expected = vatp(taps["last_attention"][b, :, image].numpy(), taps["v"][b, :, image].numpy(), k)
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], taps["x"][b, image][expected])


def test_loud_values_decide_where_attention_is_even():
    taps = sequence(1, 30, seed=1)
    taps["last_attention"] = torch.full_like(taps["last_attention"], 1 / 30)
    plan, _, _ = run(VATP, taps, site(VATP, 30, 5))
    loud = taps["v"].abs().sum((1, 3))[0]
    assert plan.index[0].tolist() == sorted(loud.topk(5).indices.tolist())
