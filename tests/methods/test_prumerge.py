"""PruMerge+ against plain loops."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.prumerge import prumerge
from tokcompile.errors import MethodError
from tokcompile.methods.prumerge import PRUMERGE, grid_positions
from tokcompile.recipe import Tokens


def compare(taps, where):
    plan, rows, _ = run(PRUMERGE, taps, where)
    even = int((where.k - 1) * where.options["grid"] + 0.5)
    for b in range(rows.shape[0]):
        given = (taps[name][b].numpy() for name in ("q", "k"))
        x = taps["x"][b, where.prefix : where.prefix + where.n].numpy()
        expected, values = prumerge(
            *given, x, where.prefix, where.prefix > 0, where.k - 1 - even, even, where.options["neighbours"]
        )
        assert plan.index[b].tolist() == expected
        torch.testing.assert_close(rows[b].double(), torch.from_numpy(values), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1), (1, 2)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix):
    n = length - prefix
    compare(sequence(1 if length > 200 else batch, length, seed=length), site(PRUMERGE, n, n // 16, prefix))


@pytest.mark.parametrize("grid", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [3, 8])
def test_every_count(n, grid):
    for k in range(2, n):
        compare(sequence(2, n, seed=k), site(PRUMERGE, n, k, options={"grid": grid, "neighbours": 3}))


@pytest.mark.parametrize("prefix", [0, 1])
def test_duplicated_tokens_go_to_the_lower_index(prefix):
    compare(sequence(3, 41, seed=5, kind="ties"), site(PRUMERGE, 41 - prefix, 17, prefix, options={"neighbours": 5}))


def test_tokens_after_the_image_are_attended_to_as_well():
    compare(sequence(2, 50, seed=1), site(PRUMERGE, 40, 9, 1))


def test_the_published_grid():
    assert grid_positions(576, 72) == list(range(4, 575, 8))
    assert grid_positions(10, 0) == []


def test_groups_have_no_class_token_nor_has_a_prompt():
    """Without a whole sequence, and in a language model, the rows are the mean over all queries among the n tokens."""
    taps, where = sequence(1, 30, seed=2), site(PRUMERGE, 30, 9)
    alone = Tokens(x=taps["x"], q=taps["q"], k=taps["k"])
    behind = Tokens(x=alone.x, q=alone.q, k=alone.k, whole=Tokens(**{name: sequence(1, 35)[name] for name in ("x", "q", "k")}))
    want = run(PRUMERGE, taps, where)[0].index.tolist()
    assert PRUMERGE.plan(alone, site(PRUMERGE, 30, 9, 1)).index.tolist() == want
    assert PRUMERGE.plan(behind, site(PRUMERGE, 30, 9, 5, text=((0, 5),))).index.tolist() == want


def test_fewer_key_heads_than_query_heads():
    taps = sequence(2, 30, seed=3, heads=4)
    few = taps | {"k": taps["k"][:, :2]}
    many = taps | {"k": taps["k"][:, [0, 0, 1, 1]]}
    where = site(PRUMERGE, 29, 9, 1)
    assert run(PRUMERGE, few, where)[0].index.tolist() == run(PRUMERGE, many, where)[0].index.tolist()


def test_options_out_of_range_are_refused():
    for wrong in ({"grid": -1}, {"grid": 2}, {"neighbours": 0}):
        with pytest.raises(MethodError, match="a grid share from 0 to 1 and at least one neighbour"):
            run(PRUMERGE, sequence(1, 8), site(PRUMERGE, 8, 4, options=wrong))
