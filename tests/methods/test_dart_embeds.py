"""DART on embeddings against plain loops."""

import dataclasses

import pytest
import torch

from tests.methods.inputs import run, sequence, site, tokens
from tests.reference.dart_embeds import dart_embeds
from tokcompile.errors import MethodError
from tokcompile.methods.dart_embeds import DART_EMBEDS


@pytest.mark.parametrize(("pivots", "text_pivots"), [(4, 4), (2, 5), (4, 0), (1, 20)])
@pytest.mark.parametrize(("batch", "n", "text"), [(1, 63, 9), (2, 196, 30), (3, 40, 3)])
def test_equals_the_loops(batch, n, text, pivots, text_pivots):
    given = tokens(DART_EMBEDS, sequence(batch, n, seed=n))
    words = torch.randn(batch, text, 16, generator=torch.Generator().manual_seed(n))
    where = site(DART_EMBEDS, n, n // 3, options={"pivots": pivots, "text_pivots": text_pivots})
    plan = DART_EMBEDS.plan(dataclasses.replace(given, text_embeds=words), where)
    for b in range(batch):
        expected = dart_embeds(given.x[b].numpy(), words[b].numpy(), where.k, pivots, text_pivots)
        assert plan.index[b].tolist() == expected


@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
def test_without_text_and_with_ties(kind):
    taps = sequence(2, 40, seed=3, kind=kind)
    for k in range(1, 40):
        plan, rows, _ = run(DART_EMBEDS, taps, site(DART_EMBEDS, 40, k))
        for b in range(2):
            expected = dart_embeds(taps["x"][b].numpy(), [], k, 4, 4)
            assert plan.index[b].tolist() == expected
            assert torch.equal(rows[b], taps["x"][b, expected])


def test_no_pivot_is_refused():
    for wrong in ({"pivots": 0}, {"text_pivots": -1}):
        with pytest.raises(MethodError, match="at least one pivot and no negative number of text pivots"):
            run(DART_EMBEDS, sequence(1, 8), site(DART_EMBEDS, 8, 4, options=wrong))
