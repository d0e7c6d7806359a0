"""FoPru against plain loops: single tokens and whole rows."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.fopru import by_rank, by_row
from tokcompile.errors import MethodError
from tokcompile.methods.fopru import FOPRU


def compare(taps, where):
    plan, rows, _ = run(FOPRU, taps, where)
    x, attention = taps["x"][:, where.prefix :], taps["received_attention"][:, :, where.prefix :]
    for b in range(x.shape[0]):
        given = attention[b].numpy()
        by_rows = where.options["strategy"] == "row"
        expected = by_row(given, where.k, where.grid[1]) if by_rows else by_rank(given, where.k)
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_rank_equals_the_loops(length, batch, prefix, kind):
    compare(sequence(batch, length, seed=length, kind=kind), site(FOPRU, length - prefix, length // 8, prefix))


@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(4, 5), (3, 3), (1, 6), (6, 1)])
def test_rows_at_every_count(grid, prefix, kind):
    n = grid[0] * grid[1]
    for k in range(1, n + 1):
        taps = sequence(3, prefix + n, seed=k, kind=kind)
        compare(taps, site(FOPRU, n, k, prefix, grid=grid, options={"strategy": "row"}))


def test_a_quarter_of_the_rows():
    plan, _, _ = run(FOPRU, sequence(1, 576), site(FOPRU, 576, 144, grid=(24, 24), options={"strategy": "row"}))
    rows = plan.index.unflatten(1, (6, 24))
    assert torch.equal(rows % 24, torch.arange(24).expand(1, 6, -1))
    assert bool((rows // 24 == rows[..., :1] // 24).all())


@pytest.mark.parametrize("grid", [None, (5, 5), (2, 2, 5)])
def test_rows_need_a_grid(grid):
    with pytest.raises(MethodError, match="these 20 tokens are not a whole one"):
        run(FOPRU, sequence(1, 20), site(FOPRU, 20, 10, grid=grid, options={"strategy": "row"}))


def test_an_unknown_strategy_is_refused():
    with pytest.raises(MethodError, match="'rank' or 'row', not 'column'"):
        run(FOPRU, sequence(1, 8), site(FOPRU, 8, 4, options={"strategy": "column"}))
