"""The oracles can fail: every kind of mistake in the pass is seen on a model that depends on what is broken."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import BOTH_MASKS
from tests.mistakes import (
    next_token,
    no_coercion,
    no_mask,
    one_key,
    one_of_a_mean,
    one_of_a_product,
    other_sample,
    wrong_recovery,
)
from tests.tiny import Causal, tiny
from tokcompile import oracles
from tokcompile.passes.rules import RULES
from tokcompile.passes.trace import export

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
