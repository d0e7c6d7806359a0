"""PiToMe against plain loops, in both variants, and which block uses which."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.pitome import pitome
from tokcompile.errors import MethodError
from tokcompile.methods.pitome import PITOME, variant


def compare(taps, where, margin, which):
    plan, rows, sizes = run(PITOME, taps, where)
    for b in range(rows.shape[0]):
        keys, x, size = taps["k"][b, :, where.prefix :], taps["x"][b, where.prefix :], taps["size"][b, where.prefix :]
        index, expected, expected_sizes = pitome(
            keys.numpy(), x.numpy(), size.numpy(), where.n - where.k, margin, where.options["alpha"], which
        )
        assert plan.index[b].tolist() == index
        torch.testing.assert_close(rows[b].double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
        assert sizes[b].tolist() == expected_sizes.tolist()


def crowded(batch, length):
    """Tokens that share one direction more or less, so that no two energies come near each other."""
    taps = sequence(batch, length, seed=length)
    g = torch.Generator().manual_seed(length)
    strength = 4 * torch.rand(batch, 1, length, 1, generator=g)
    return taps | {"k": taps["k"] + strength * torch.randn(16, generator=g)}


@pytest.mark.parametrize("which", ["P", "B"])
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1), (1, 2)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix, which):
    batch = 1 if length == 577 else batch
    n = length - prefix
    where = site(PITOME, n, n - n // 10, prefix, options={"variant": which, "margin": 0.4})
    compare(crowded(batch, length), where, 0.4, which)


@pytest.mark.parametrize("which", ["P", "B"])
@pytest.mark.parametrize("n", [3, 4, 8, 9])  # the energies of two tokens are always equal
def test_every_count_down_to_half(n, which):
    for k in range(n - n // 2, n):
        compare(sequence(2, n, seed=k), site(PITOME, n, k, options={"variant": which}), 0.75, which)


@pytest.mark.parametrize("kind", ["ties", "constant"])
@pytest.mark.parametrize("which", ["P", "B"])
def test_duplicated_tokens_go_to_the_lower_index(which, kind):
    # without the exponential tail the energies are exact too
    where = site(PITOME, 40, 27, options={"variant": which, "margin": 0.25, "alpha": 0.0})
    compare(sequence(3, 40, seed=5, kind=kind), where, 0.25, which)


@pytest.mark.parametrize(("name", "halves"), [("deit", "BBBPP"), ("mae", "PPPBB"), ("P", "PPPPP"), ("B", "BBBBB")])
def test_the_variant_of_each_block(name, halves):
    sites = [site(PITOME, 9, 8, options={"variant": name}, block=b, depth=5) for b in range(5)]
    assert "".join(variant(s) for s in sites) == halves


def test_an_unknown_variant_is_refused():
    with pytest.raises(MethodError, match="one of deit, mae, P, B, not 'C'"):
        variant(site(PITOME, 9, 8, options={"variant": "C"}))


def test_the_margin_decays_with_depth():
    where = site(PITOME, 30, 25, options={"variant": "P"}, block=3, depth=12)
    compare(sequence(1, 30), where, 0.75 - 0.75 * 3 / 12, "P")


def test_the_published_ratio_is_rounded_down():
    assert [PITOME.steps.rate(n, n, ratio, 0) for n, ratio in [(196, 0.9125), (577, 0.95), (50, 0.9)]] == [179, 549, 45]
