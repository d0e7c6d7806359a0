"""ToDRE's first stage against plain loops."""

import pytest
import torch

from tests.methods.inputs import run, sequence, site
from tests.reference.divprune import divprune
from tests.reference.todre import todre
from tokcompile.errors import MethodError
from tokcompile.methods.todre import TODRE

OBJECTIVES = {"sum": sum, "min": min}


def compare(taps, where):
    plan, rows, _ = run(TODRE, taps, where)
    x = taps["x"][:, where.prefix :]
    for b in range(x.shape[0]):
        summary = taps["x"][b, 0].numpy() if where.prefix else None
        expected = sorted(todre(x[b].numpy(), summary, where.k, OBJECTIVES[where.options["objective"]]))
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1), (1, 2)])
@pytest.mark.parametrize(("length", "k"), [(63, 40), (197, 20), (577, 12)])
def test_equals_the_loops(length, k, batch, prefix, objective):
    taps = sequence(1 if length == 577 else batch, length, seed=length)
    compare(taps, site(TODRE, length - prefix, k, prefix, options={"objective": objective}))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("n", [2, 3, 8])
def test_every_count(n, objective):
    for k in range(1, n):
        compare(sequence(2, n + 1, seed=k), site(TODRE, n, k, 1, options={"objective": objective}))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("kind", ["ties", "constant"])
def test_a_duplicate_is_never_taken_twice(kind, prefix, objective):
    for k in (2, 9, 30):
        compare(sequence(3, 33 + prefix, seed=2, kind=kind), site(TODRE, 33, k, prefix, options={"objective": objective}))


def test_without_a_class_token_the_smallest_distance_is_divprunes():
    taps = sequence(2, 50, seed=4)
    for prefix in (0, 5):  # of a prompt, whose first word is no class token
        where = site(TODRE, 50 - prefix, 20, prefix, text=((0, prefix),) * (prefix > 0), options={"objective": "min"})
        assert run(TODRE, taps, where)[0].index.tolist() == [sorted(divprune(x.numpy(), 20)) for x in taps["x"][:, prefix:]]


def test_an_unknown_objective_is_refused():
    with pytest.raises(MethodError, match="'sum' or 'min', not 'max'"):
        run(TODRE, sequence(1, 8), site(TODRE, 8, 4, options={"objective": "max"}))
