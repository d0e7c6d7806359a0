"""PPE against plain loops: clusters, their means, and the positions of their members."""

import pytest
import torch

from tests.methods.inputs import run, sequence, site
from tests.reference.clusters import density_peaks as by_loops
from tests.reference.ppe import ppe
from tokcompile.errors import MethodError
from tokcompile.methods.ppe import PPE
from tokcompile.primitives import density_peaks


def compare(taps, where):
    plan, rows, _ = run(PPE, taps, where)
    x = taps["x"][:, where.prefix :]
    for b in range(x.shape[0]):
        expected, places = ppe(x[b].numpy(), where.k, *((where.options["positions"], 5) if where.step == 0 else (1, 3)))
        torch.testing.assert_close(rows[b].double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
        assert plan.index[b].tolist() == [many[0] for many in places]
        got = plan.index[b, :, None] if plan.positions is None else plan.positions[b]
        assert got.tolist() == [many[: got.shape[1]] for many in places]


@pytest.mark.parametrize("positions", [8, 1, 3])
@pytest.mark.parametrize(("batch", "prefix", "n", "k"), [(1, 0, 63, 28), (3, 5, 100, 45), (2, 1, 196, 20), (2, 0, 9, 4)])
def test_equals_the_loops(batch, prefix, n, k, positions):
    compare(sequence(batch, prefix + n, seed=n), site(PPE, n, k, prefix, options={"positions": positions}))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_every_count(n):
    for k in range(1, n):
        compare(sequence(2, n, seed=k), site(PPE, n, k, options={"positions": 2}))


@pytest.mark.parametrize("kind", ["ties", "constant"])
@pytest.mark.parametrize("k", [2, 5, 15])
def test_duplicated_tokens_go_to_the_lower_index(kind, k):
    compare(sequence(3, 33, seed=4, kind=kind), site(PPE, 33, k))


def test_a_later_reduction_hands_on_the_positions_of_one_member():
    taps = sequence(2, 30, seed=2)
    where = site(PPE, 30, 12, step=1, steps=2)
    compare(taps, where)
    assert run(PPE, taps, where)[0].positions is None
    for k in range(1, 6):
        compare(taps, site(PPE, 30, k, step=1, steps=2))


def test_density_peaks_find_the_clusters():
    g = torch.Generator().manual_seed(0)
    middles = 10 * torch.randn(1, 4, 16, generator=g)
    x = (middles.repeat(1, 9, 1) + torch.randn(1, 36, 16, generator=g))[:, torch.randperm(36, generator=g)]
    centres, slots = density_peaks(x, 4, 5)
    want, groups = by_loops(x[0].numpy(), 4, 5)
    assert centres[0].tolist() == want
    assert sorted(map(len, groups)) == [9] * 4
    assert [[j for j in range(36) if slots[0, j] == i] for i in range(4)] == groups


def test_senseless_options_are_refused():
    for wrong in (16, "16,24,24", (16, -1), (0,)):
        with pytest.raises(MethodError, match="sections are how many frequencies each axis has"):
            run(PPE, sequence(1, 8), site(PPE, 8, 4, options={"sections": wrong}))
    with pytest.raises(MethodError, match="at least one position, not 0"):
        run(PPE, sequence(1, 8), site(PPE, 8, 4, options={"positions": 0}))
