"""AIM against plain loops: merging where no attention comes before, and pruning by PageRank after it."""

import dataclasses

import pytest
import torch

from tests.methods.inputs import run, sequence, site, tokens
from tests.reference.aim import importance as by_loops
from tests.reference.aim import merge_to, prune
from tokcompile.errors import MethodError
from tokcompile.methods.aim import AIM, counts, importance
from tokcompile.primitives import apply


@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
@pytest.mark.parametrize(("batch", "n", "k"), [(1, 63, 40), (3, 40, 20), (2, 41, 10), (2, 196, 49), (1, 5, 1), (2, 2, 1)])
def test_merging_equals_the_loops(batch, n, k, kind):
    taps = sequence(batch, n, seed=n, kind=kind)
    given = dataclasses.replace(tokens(AIM, taps), scores=None)
    plan = AIM.plan(given, site(AIM, n, k))
    rows = apply(plan, given.x, None)[0]
    for b in range(batch):
        expected, places = merge_to(taps["x"][b].numpy(), k)
        if kind == "normal" or n - k <= n // 2:  # means of later rounds round, and ties with them
            assert plan.index[b].tolist() == places
            torch.testing.assert_close(rows[b].double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


def causal(batch, length, seed, heads=2):
    scores = torch.randn(batch, heads, length, length, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))


@pytest.mark.parametrize(("batch", "prefix", "n", "k"), [(1, 0, 30, 10), (3, 5, 25, 1), (2, 3, 61, 40)])
def test_pruning_equals_the_loops(batch, prefix, n, k):
    taps = sequence(batch, prefix + n + 4, seed=n) | {"scores": causal(batch, prefix + n + 4, n)}
    for options in ({}, {"tau": 1.0, "rounds": 2}):
        where = site(AIM, n, k, prefix, options=options)
        plan, rows, _ = run(AIM, taps, where)
        for b in range(batch):
            given = taps["scores"][b].tolist(), prefix, n, k, where.options["tau"], where.options["rounds"]
            expected = prune(*given)
            assert plan.index[b].tolist() == expected
            assert torch.equal(rows[b], taps["x"][b, prefix : prefix + n][expected])


def test_importance_equals_the_loops():
    scores = causal(1, 20, 1)
    expected = torch.from_numpy(by_loops(scores[0].tolist(), 0.1, 5))
    torch.testing.assert_close(importance(scores, 0.1, 5)[0].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "final", "steps", "expected"), [
    (1440, 1, 9, [360, 315, 270, 225, 180, 135, 90, 45, 1]),
    (1440, 0, 9, [360, 315, 270, 225, 180, 135, 90, 45, 0]),  # as published
    (196, 98, 4, [98, 98, 98, 98]),
    (40, 4, 3, [10, 7, 4]),
    (40, 7, 1, [7]),
])  # fmt: skip
def test_counts(n, final, steps, expected):
    assert list(counts(n, final, steps)) == expected


def test_the_published_layers():
    assert list(AIM.steps.at(28, language=True)) == [0, *range(15, 23)]


def test_senseless_options_are_refused():
    for wrong in ({"tau": 0}, {"rounds": 0}):
        with pytest.raises(MethodError, match="a temperature above 0 and at least one round"):
            run(AIM, sequence(1, 8), site(AIM, 8, 4, options=wrong))
    with pytest.raises(MethodError, match="keeps them in groups"):
        AIM.plan(dataclasses.replace(tokens(AIM, sequence(1, 8)), whole=None), site(AIM, 8, 4))
