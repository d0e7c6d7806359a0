"""The oracles can fail: every kind of mistake in the pass is seen on a model that depends on what is broken."""

import json

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import BOTH_MASKS
from tests.models import FAMILIES
from tests.tiny import tiny
from tokcompile import oracles, shaken
from tokcompile.passes.gather import Gatherer
from tokcompile.passes.rules import RULES
from tokcompile.passes.tokens import new_shape, old_shape
from tokcompile.passes.trace import export


def no_coercion(patch):
    """Operands that meet reduced tokens are taken as they are, where their shape allows it (all tokens are kept)."""
    right = Gatherer.coerce
    patch.setattr(Gatherer, "coerce", lambda self, x, have, want, origin: x if old_shape(want) == new_shape(want)
                  else right(self, x, have, want, origin))  # fmt: skip


def next_token(patch):
    """Operands are gathered one position off."""
    right = Gatherer.within
    patch.setattr(Gatherer, "within", lambda self, old, space: self.b.emit(
        torch.ops.aten.roll.default, right(self, old, space), [1], [1]))  # fmt: skip


def other_sample(patch):
    """Operands are gathered by the tokens of another sample of the batch."""
    right = Gatherer.within
    patch.setattr(Gatherer, "within", lambda self, old, space: self.b.emit(
        torch.ops.aten.roll.default, right(self, old, space), [1], [0]))  # fmt: skip


def wrong_recovery(patch):
    """Tokens are given back to their neighbours."""
    right = Gatherer.slots
    patch.setattr(Gatherer, "slots", lambda self, space: self.b.emit(
        torch.ops.aten.roll.default, right(self, space), [1], [1]))  # fmt: skip


def no_mask(patch):
    """Attention forgets its mask."""
    patch.setattr("tokcompile.passes.rules.attention.mask", lambda call, scores: None)


BROKEN = [
    (no_coercion, "timm/beit"),
    (no_coercion, "hf/beit"),
    (no_coercion, "timm/vit_rope"),
    (no_coercion, "timm/eva02"),
    (no_coercion, "hf/dinov3"),
    (no_coercion, "hf/llama"),
    (no_coercion, "torch/einsum_vit"),
    (no_coercion, "timm/vit_relpos"),
    (next_token, "timm/beit"),
    (next_token, "timm/vit_rope"),
    (next_token, "hf/llama"),
    (other_sample, "timm/beit"),
    (other_sample, "hf/dinov3"),
    (wrong_recovery, "timm/vit_features"),
    (wrong_recovery, "hf/depth_anything"),
    (wrong_recovery, "hf/dinov2_backbone"),
    (no_mask, "hf/llama"),
    (no_mask, "timm/naflexvit_masked"),
    (no_mask, "timm/beit"),
]


@pytest.mark.every(2)
@pytest.mark.parametrize(("mistake", "name"), BROKEN, ids=[f"{m.__name__}-{n}" for m, n in BROKEN])
def test_a_broken_pass_is_caught(mistake, name, program, monkeypatch):
    spans = [(5, 30)] if name == "hf/llama" else None
    monkeypatch.setattr(oracles, "ORACLES", (oracles.permutation,))
    given = program(name, 3)
    assert tokcompile.check(given, spans=spans, blocks=[1]).ok
    mistake(monkeypatch)
    check = tokcompile.check(given, spans=spans, blocks=[1])
    assert not check.ok
    permutation = check.results[0]
    assert not permutation.ok
    assert permutation.error is None or permutation.error > 100 * 1e-4


class Causal(nn.Module):
    """Blocks with a causal fused attention and no mask."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x).relu()
        return x


def test_causal_attention_in_another_order_is_caught(monkeypatch):
    model, args = Causal().eval(), (torch.randn(2, 12, 16),)
    assert tokcompile.check(model, args, spans=[(2, 10)]).ok
    monkeypatch.setattr("tokcompile.passes.rules.attention.sorted_tokens", lambda scores: True)
    check = tokcompile.check(model, args, spans=[(2, 10)])
    assert [r.ok for r in check.results if r.oracle == "permutation"][:2] == [False, False]


class Padded(Causal):
    """Causal attention with a mask over it, as kernels of the CPU take it, made from whole numbers among the inputs."""

    def forward(self, x, seen):
        hidden = (1 - seen[:, None, None].float()) * torch.finfo(x.dtype).min
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, hidden, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x).relu()
        return x


@BOTH_MASKS
def test_causal_attention_with_a_mask_over_it_is_both():
    seen = torch.ones(2, 12, dtype=torch.long)
    seen[1, :2] = 0
    check = tokcompile.check(Padded().eval(), (torch.randn(2, 12, 16), seen), spans=[(2, 10)])
    assert check.ok, str(check)
    assert all(r.error < 1e-5 for r in check.results)


@BOTH_MASKS
def test_a_mask_from_whole_numbers_is_no_noise(monkeypatch):
    monkeypatch.setattr("tokcompile.passes.canonicalise.write_causal_masks", lambda gm: False)
    args = (torch.randn(2, 12, 16), torch.ones(2, 12, dtype=torch.long))
    assert not tokcompile.check(Padded().eval(), args, spans=[(2, 10)]).ok


class Sink(Causal):
    """Attention in which each query may also look at nothing: its share is read from the logarithm of the sum of scores."""

    def forward(self, x):
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT + torch.ones(x.shape[1], x.shape[1]).triu(1) * -1e9
            y = scores.softmax(-1) @ v * scores.logsumexp(-1, keepdim=True).sigmoid()
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x).relu()
        return x


def test_what_is_dropped_is_hidden_from_a_sink_too():
    check = tokcompile.check(Sink().eval(), (torch.randn(2, 12, 16),), spans=[(2, 10)])
    assert check.ok, str(check)
    assert all(r.error < 1e-5 for r in check.results)


def doubled(result, call):
    value, label = result
    return call.op(torch.ops.aten.mul.Scalar, value, 1.5), label


def columns(x):
    """Shares among the queries of a key: of one that is hidden they are no numbers."""
    weights = (x @ x.mT).softmax(-1)
    return (weights / weights.sum(1, keepdim=True)) @ x


@pytest.mark.parametrize("between", [
    lambda x: x + x.amin(1, keepdim=True),
    lambda x: x * (x > -2).all(1, keepdim=True),
    lambda x: x * (x > 2).any(1, keepdim=True),
    lambda x: x + (x.log_softmax(1) * 0.1).amax(1, keepdim=True),
    lambda x: x + torch.einsum("bnc,bnd->bcd", x, x).mean(1, keepdim=True),
    lambda x: x + (x @ x.mT).mean((1, 2), keepdim=True) + columns(x),
], ids=["amin", "all", "any", "log_softmax", "einsum", "both-axes"])  # fmt: skip
def test_what_is_dropped_is_hidden_from_all_that_goes_over_tokens(between):
    check = tokcompile.check(*tiny(between), blocks=[0])
    assert check.ok, str(check)


def one_key(patch):
    """A merged token is one key to attention."""
    patch.setattr("tokcompile.passes.rules.attention.log_sizes", lambda *given: None)


def one_of_a_mean(patch):
    """A merged token is one among those of a mean."""
    patch.setattr("tokcompile.passes.rules.reduce.by_share", lambda call, value, *given: value)


def one_of_a_product(patch):
    """A merged token is one among those that a product over tokens adds up."""
    patch.setattr("tokcompile.passes.rules.contract.weigh", lambda call, value, *given: value)


def test_a_broken_size_is_caught_by_copies(monkeypatch):
    program, _ = export(*tiny(lambda x: x + x.mean(1, keepdim=True) + x @ (x.mT @ x).softmax(-1)), {})
    assert tokcompile.check(program, blocks=[0]).ok
    for mistake in (one_key, one_of_a_mean, one_of_a_product):
        with monkeypatch.context() as patch:
            mistake(patch)
            check = tokcompile.check(program, blocks=[0])
        assert [(r.oracle, r.ok) for r in check.results] == [
            ("permutation", True), ("masked keys", True), ("copies", False)], mistake.__doc__  # fmt: skip
        assert check.results[2].error > 1e-2


@pytest.mark.parametrize(("between", "note"), [
    (lambda x: x + x.topk(4, 1).values.mean(1, keepdim=True), "merging is refused: it takes the largest of all tokens"),
    (lambda x: x + ((x @ x.mT).softmax(-1) + torch.eye(12)) @ x, "not compared: a table by position is added"),
], ids=["refused", "table"])  # fmt: skip
def test_a_model_that_copies_cannot_be_compared_in_is_understood(between, note):
    check = tokcompile.check(*tiny(between), blocks=[0])
    assert check.ok, str(check)
    assert check.results[2].error is None
    assert check.results[2].note.startswith(note)


@pytest.mark.parametrize(("op", "name"), [("aten.softmax", "torch/einsum_vit"), ("aten.layer_norm", "timm/vit"),
                                          ("aten.scaled_dot_product_attention", "timm/vit"),
                                          ("aten.mean", "torch/encoder_batch_first")])  # fmt: skip
def test_a_rule_that_changes_values_is_caught_by_two(op, name, program, monkeypatch):
    right = RULES[op]
    monkeypatch.setattr("tokcompile.passes.rewrite.RULES", {**RULES, op: lambda call: doubled(right(call), call)})
    check = tokcompile.check(program(name), blocks=[1])
    assert [r.ok for r in check.results] == [False, False, True]  # it changes those of copies and of merged ones alike
    assert all(r.error > 1e-2 for r in check.results[:2])


def test_keeping_a_dropped_token_is_caught_by_masked_keys(program, monkeypatch):
    """Attention that still sees one dropped token: only the second oracle drops any."""
    right = oracles.subset_index
    off = lambda n, k, batch, seed, sort: (right(n, k, batch, seed, sort) + 1) % n  # noqa: E731
    monkeypatch.setattr(oracles, "constant_recipe", patched(oracles.constant_recipe, monkeypatch, off))
    check = tokcompile.check(program("timm/vit"), blocks=[1])
    assert [(r.oracle, r.ok) for r in check.results] == [
        ("permutation", True), ("masked keys", False), ("copies", True)]  # fmt: skip


def patched(make, monkeypatch, index):
    """The recipe of an oracle, keeping other tokens than the oracle believes."""

    def recipe(name, seed, sort):
        made = make(name, seed, sort)
        if name == "permutation":
            return made

        def plan(tokens, site):
            with monkeypatch.context() as patch:
                patch.setattr(oracles, "subset_index", index)
                return made.plan(tokens, site)

        return tokcompile.Recipe(name, plan)

    return recipe


# -- what check does around the oracles --------------------------------------------------------------------------------


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
