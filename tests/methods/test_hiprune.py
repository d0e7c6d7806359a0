"""HiPrune against plain loops: anchors, their neighbours, and registers."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.hiprune import hiprune
from tokcompile.errors import MethodError
from tokcompile.methods.hiprune import HIPRUNE


def compare(taps, where, width):
    plan, rows, _ = run(HIPRUNE, taps, where)
    x = taps["x"][:, where.prefix :]
    middle, deep = (taps[name][:, :, where.prefix :] for name in ("earlier_attention", "received_attention"))
    for b in range(x.shape[0]):
        expected = hiprune(middle[b].numpy(), deep[b].numpy(), where.k, where.options["alpha"], width)
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


def draw(batch, length, **given):
    taps = sequence(batch, length, seed=length, **given)
    g = torch.Generator().manual_seed(length)
    return taps | {"earlier_attention": torch.randn(taps["received_attention"].shape, generator=g).softmax(-1)}


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix, alpha):
    n = length - prefix
    width = {196: 14, 576: 24}.get(n, 0)
    compare(draw(batch, length), site(HIPRUNE, n, n // 3, prefix, options={"alpha": alpha}), width)


@pytest.mark.parametrize("k", [64, 128, 192])
def test_the_published_counts_on_a_grid(k):
    compare(draw(2, 577), site(HIPRUNE, 576, k, 1, grid=(24, 24)), 24)
    compare(draw(2, 577), site(HIPRUNE, 576, k, 1, grid=(18, 32)), 32)


@pytest.mark.parametrize("n", [1, 2, 9, 16])
def test_every_count(n):
    for k in range(1, n):
        compare(draw(2, n), site(HIPRUNE, n, k, options={"alpha": 1.0}), {9: 3, 16: 4}.get(n, 1 if n == 1 else 0))


@pytest.mark.parametrize("kind", ["ties", "constant"])
def test_duplicated_tokens_go_to_the_lower_index(kind):
    taps = sequence(3, 36, seed=6, kind=kind)
    compare(taps, site(HIPRUNE, 36, 20, options={"alpha": 0.6}), 6)


@pytest.mark.parametrize(("depth", "layer", "block"), [(24, 1 / 3, 8), (23, 1 / 3, 8), (12, 1 / 3, 4), (12, 7, 7), (4, 0.5, 2)])
def test_the_middle_layer(depth, layer, block):
    assert HIPRUNE.earlier(depth, {"layer": layer}) == block


def test_senseless_options_are_refused():
    for wrong in (12, -1, 1.5, "last"):
        with pytest.raises(MethodError, match="hiprune's layer is one of the 12 blocks"):
            HIPRUNE.earlier(12, {"layer": wrong})
    with pytest.raises(MethodError, match="alpha is a share from 0 to 1"):
        run(HIPRUNE, sequence(1, 8), site(HIPRUNE, 8, 4, options={"alpha": 2}))
