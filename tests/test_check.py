"""What check does around the oracles: which models, blocks, seeds and precisions it takes, and what it says."""

import json

import pytest
import torch
from torch import nn

import tokcompile
from tests.mistakes import no_coercion
from tests.models import FAMILIES
from tests.tiny import Causal
from tokcompile import oracles, shaken


def test_parameters_are_shaken_on_a_copy():
    model, args, _ = FAMILIES["timm/vit"].build(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tokcompile.check(model, args).ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fresh_zero_tables_are_shaken(program, monkeypatch):
    """On fresh BEiT weights (bias table zero) a missing gather would not show: with shaking it does."""
    model, args, _ = FAMILIES["timm/beit"].build(2)
    table = model.blocks[1].attn.relative_position_bias_table
    assert table.abs().max() == 0
    no_coercion(monkeypatch)
    assert not tokcompile.check(model, args, blocks=[1]).results[0].ok
    monkeypatch.setattr(shaken, "shaken", lambda gm, seed, strength: gm)
    assert tokcompile.check(model, args, blocks=[1]).results[0].ok


def test_a_model_without_blocks_is_told_why():
    check = tokcompile.check(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(1, 3, 4),))
    assert not check.ok
    assert "no softmax between two matrix products" in check.unrecognised[0]
    assert str(check).splitlines()[-1] == "the pass finds nothing to reduce in this model"


class Root(Causal):
    """Square roots of its parameters, which a strong shake makes negative, and an output with infinities on purpose."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.full((12, 16), gain))

    def forward(self, x):
        y = super().forward(x * self.gain.sqrt())
        return y, y.masked_fill(torch.arange(16) > 12, float("-inf"))


def test_parameters_are_shaken_less_where_the_model_would_give_nan():
    args = (torch.randn(2, 12, 16),)
    check = tokcompile.check(Root(0.3).eval(), args, spans=[(2, 10)])
    assert check.ok, str(check)
    with pytest.raises(tokcompile.InputError, match="gives NaN or Inf on these inputs"):
        tokcompile.check(Root(-1.0).eval(), args, spans=[(2, 10)])


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_agree(seed, program):
    check = tokcompile.check(program("timm/dinov3", 3), seed=seed)
    assert check.ok
    assert all(0 <= r.error < 1e-5 for r in check.results)


def test_blocks_are_checked_at_three_depths_or_as_asked(program):
    check = tokcompile.check(program("timm/vit"))
    assert [(r.block, r.oracle) for r in check.results] == [
        (0, "permutation"), (0, "masked keys"), (0, "copies"),
        *((b, oracle) for b in (2, 3) for oracle in ("permutation", "masked keys"))]  # fmt: skip
    assert check.sites == [f"blocks.{i}" for i in range(4)]
    assert {r.block for r in tokcompile.check(program("timm/vit"), blocks=[1]).results} == {1}


def test_a_block_that_cannot_be_checked_is_reported_or_refused(program):
    try:
        check = tokcompile.check(program("timm/swinv2_cr"), blocks=[1])
    except tokcompile.TokcompileError as refusal:
        assert "two axes" in str(refusal)  # noqa: PT017
    else:
        assert not check.ok
        assert "two axes" in check.results[0].note
    with pytest.raises(tokcompile.TokcompileError, match="block 9 is not among the 4 blocks"):
        tokcompile.check(program("timm/vit"), blocks=[9])


def test_the_outcome_prints_and_goes_to_json(program):
    check = tokcompile.check(program("timm/vit"), blocks=[1])
    lines = str(check).splitlines()
    assert lines[0].split() == ["oracle", "block", "error", "result"]
    assert lines[1].startswith("permutation")
    assert lines[4].startswith(f"tolerance: {check.tolerance:.1e}")  # more than 1e-4 on some processors
    assert 1e-4 <= check.tolerance < 1e-3
    assert lines[-1] == "the pass understands this model"
    data = json.loads(check.json())
    assert data["ok"] is True
    assert data["errors"] == []
    assert [r["path"] for r in data["results"]] == ["blocks.1"] * 3


def test_a_failure_names_the_block(program, monkeypatch):
    no_coercion(monkeypatch)
    check = tokcompile.check(program("timm/beit"), blocks=[1])
    assert check.errors[0].startswith("permutation at block 1 (blocks.1): ")
    assert str(check).splitlines()[-1] == "the pass does NOT understand this model"


def test_half_precision_has_a_wider_tolerance():
    model, (image,), _ = FAMILIES["timm/beit"].build(2)
    check = tokcompile.check(model.bfloat16(), (image.bfloat16(),))
    assert check.ok
    assert check.tolerance > max(r.error for r in check.results) > 1e-4
    assert "smaller mistakes cannot be seen" in str(check)


def test_float64_has_a_narrower_one():
    model, (image,), _ = FAMILIES["timm/beit"].build(2)
    check = tokcompile.check(model.double(), (image.double(),))
    assert check.ok
    assert max(r.error for r in check.results) < 1e-12


@pytest.mark.parametrize("spans", [[(5, 30)], [(0, 40)], [(2, 12), (20, 30)]], ids=str)
def test_spans_of_a_prompt(spans, program):
    check = tokcompile.check(program("hf/llama", 3), spans=spans, blocks=[1])
    assert check.ok, str(check)
    assert all(not r.note for r in check.results)


class TwoOutputs(nn.Module):
    """A second output of which no reduction of the tokens can be seen."""

    def __init__(self):
        super().__init__()
        self.tower = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
        )
        self.mean = nn.Linear(16, 16)

    def forward(self, x):
        return self.tower(x).mean(1), self.mean(x.mean(1))


def test_outputs_that_do_not_depend_on_the_reduction_are_not_compared():
    from tokcompile.compiler import analyse, rewrite, settings_for
    from tokcompile.masked import MaskedRun
    from tokcompile.passes.plan import Reduction

    model, x = TwoOutputs().eval(), torch.randn(2, 12, 16)
    analysis = analyse(model, (x,), None)
    out = rewrite(analysis, settings_for("random", {}, outputs="reduced"), [Reduction(0, 12, 6)])
    masked = MaskedRun(
        analysis.graph, out, {space: oracles.subset_index(space.n, space.k, 2, 0, sort=True) for space in out.spaces}
    )
    with torch.no_grad():
        masked.run(x)
    assert masked.clean == [True, False]
