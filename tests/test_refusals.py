"""Graphs that the pass refuses rather than guess: the op, its place in the model, and the way out."""

import json

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import run
from tests.models import FAMILIES
from tests.tiny import LENGTH, WIDTH, Tiny, optimize, tiny
from tokcompile.errors import (
    TokcompileError,
    UnsupportedGraph,
)

# -- graphs the pass refuses -------------------------------------------------------------------------------------------

torch.library.define("tokcompile_tests::swirl", "(Tensor x) -> Tensor")
torch.library.impl("tokcompile_tests::swirl", "CompositeExplicitAutograd", lambda x: x * 1.5)


def swirl(x):
    return torch.ops.tokcompile_tests.swirl(x)


def test_an_op_without_a_rule_is_named_with_its_place():
    with pytest.raises(UnsupportedGraph) as refusal:
        optimize(tiny(swirl), where=0)
    message = str(refusal.value)
    assert message.startswith("an op over reduced tokens cannot be rewritten: there is no rule for it (")
    assert "[1, Seq(s0:12->6), 16]" in message
    assert "node: swirl = tokcompile_tests.swirl.default(1x12x16)" in message
    assert "module: blocks.1" in message
    assert "tiny.py:" in message
    assert "what to do: tell the pass what it does: tokcompile.register_rule('tokcompile_tests.swirl', rule)" in message
    assert "recover='anywhere'" in message


def test_register_rule_makes_the_op_known(monkeypatch):
    monkeypatch.setattr("tokcompile.passes.rules.core.RULES", rules := dict(tokcompile.passes.rules.RULES))
    monkeypatch.setattr("tokcompile.passes.rewrite.RULES", rules)
    tokcompile.register_rule("tokcompile_tests::swirl", lambda call: call.emit(call.label("x")))
    model, args = tiny(swirl)
    assert tokcompile.check(model, args).ok
    reduced = tokcompile.optimize(model, args, method="random", where=0)
    assert reduced.report.recoveries == []
    by_hand = tokcompile.optimize(tiny_with_weights_of(model, lambda x: x * 1.5), args, method="random", where=0)
    assert torch.equal(run(reduced, *args), run(by_hand, *args))


def tiny_with_weights_of(model, between):
    other = Tiny(between).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_a_rule_must_be_callable():
    with pytest.raises(TokcompileError, match=r"the rule for 'my\.op' must be callable, not str"):
        tokcompile.register_rule("my::op", "pointwise")


def test_a_rule_with_a_wrong_label_is_caught_at_its_node(monkeypatch):
    rules = {**tokcompile.passes.rules.RULES, "tokcompile_tests.swirl": lambda call: call.emit(((1,), (5,), (16,)))}
    monkeypatch.setattr("tokcompile.passes.rewrite.RULES", rules)
    with pytest.raises(
        UnsupportedGraph, match=r"the rule for this op gives \(1, 6, 16\), its label says \(1, 5, 16\)[\s\S]*swirl"
    ):
        optimize(tiny(swirl), where=0)


@pytest.mark.every(2)
@pytest.mark.parametrize(("between", "op"), [
    (lambda x: x.cumsum(1), "aten.cumsum"),
    (lambda x: x.flip(1), "aten.flip"),
    (lambda x: x.roll(1, 1), "aten.roll"),
    (lambda x: x.sort(1).values, "aten.sort"),
    (lambda x: x + x.var(1, keepdim=True), "aten.var"),
    (lambda x: nn.functional.conv1d(x.transpose(1, 2), torch.ones(WIDTH, WIDTH, 3), padding=1).transpose(1, 2), "aten.conv1d"),
], ids=lambda v: v[5:] if isinstance(v, str) else "op")  # fmt: skip
def test_ops_that_need_all_tokens_inside_the_blocks(between, op):
    """Refused with the way out, which then works."""
    with pytest.raises(UnsupportedGraph) as refusal:
        optimize(tiny(between), where=0)
    message = str(refusal.value)
    for part in (
        f"= {op}.",
        "module: blocks.1",
        "source: ",
        "pass recover='anywhere'",
        "reduce only after it (where=[later blocks])",
    ):
        assert part in message
    with pytest.raises(UnsupportedGraph, match="cannot be rewritten"):
        optimize(tiny(between), where=0, recover="never")
    recovered = optimize(tiny(between), where=0, recover="anywhere")
    assert [(r["inside"], r["op"]) for r in recovered.report.recoveries] == [(True, op)]
    assert optimize(tiny(between), where=2).report.recoveries == []


def test_a_second_reduction_of_tokens_that_were_given_back(family):
    model, args, kwargs = family("hf/vitdet")  # block 1 ends in convolutions over the grid
    where = {"method": "random", "recover": "anywhere"}
    with pytest.raises(tokcompile.UnsupportedGraph, match=r"30 tokens here, but all 49 are there again.*\n.*\n.*layer.2"):
        tokcompile.optimize(model, args, kwargs, budget=tokcompile.Schedule({1: 30, 2: 20}), **where)
    assert tokcompile.optimize(model, args, kwargs, budget=tokcompile.Schedule({1: 30}), **where).report.blocks[1]["left"] == 30


def test_never_recovering_refuses_even_the_end():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Tiny()

        def forward(self, x):
            return self.body(x).cumsum(1)

    head = (Head().eval(), (torch.randn(1, LENGTH, WIDTH),))
    assert [r["inside"] for r in optimize(head).report.recoveries] == [False]
    with pytest.raises(UnsupportedGraph, match=r"it gives positions of tokens[\s\S]*cumsum"):
        optimize(head, recover="never")


def test_samples_joined_after_the_last_block_get_their_tokens_back():
    """Features of two depths share a head by being joined along the batch (ZoeDepth): samples keep other tokens."""

    class Joined(Tiny):
        def forward(self, x):
            features = []
            for block in self.blocks:
                x = block(x)
                features.append(x)
            first, last = torch.cat(features[1:]).tanh().split(len(x))
            return first.mean(1), last[:2]

    model, args = Joined().eval(), (torch.randn(3, LENGTH, WIDTH),)
    check = tokcompile.check(model, args, blocks=[0, 1])
    assert check.ok, str(check)
    recoveries = optimize((model, args), where=0).report.recoveries
    assert [(r["op"], r["inside"]) for r in recoveries] == [("aten.cat", False)]
    with pytest.raises(UnsupportedGraph, match=r"it puts samples together[\s\S]*where=\[later blocks\]"):
        optimize((tiny(lambda x: torch.cat([x, x])[: len(x)])[0], args), where=0)


@pytest.mark.parametrize("join", [torch.stack, lambda features: torch.cat(features, -1).unflatten(-1, (3, -1)).movedim(2, 0)])
def test_features_of_several_depths_keep_the_tokens_that_they_have(join):
    class Depths(Tiny):
        def forward(self, x):
            return join([x := block(x) for block in self.blocks])

    model, (x,) = Depths().eval(), (torch.randn(2, LENGTH, WIDTH),)
    fast, want = tokcompile.optimize(model, (x,), method="random", where=[1]), model(x)
    torch.testing.assert_close(fast(x)[0], want[0])
    assert [r["reason"][:40] for r in fast.report.recoveries] == ["it puts features of several depths side "]
    reduced = tokcompile.optimize(model, (x,), method="random", where=[1], outputs="reduced")(x)
    rows = reduced.kept["s0_index"][..., None].expand(-1, -1, WIDTH)
    torch.testing.assert_close(reduced.output[0], want[0].gather(1, rows))


@pytest.mark.parametrize("method", ["random", "tome"])
@pytest.mark.parametrize("join", [lambda a, b, c: torch.stack([a, c]), lambda a, b, c: a + b - c])
def test_maps_of_several_depths_keep_the_weights_that_they_have(join, method):
    class Maps(Tiny):
        def forward(self, x):
            streams = [x, *(x := block(x) for block in self.blocks)]
            return join(*((x @ x.mT).softmax(-1) for x in streams[:3]))

    model, (x,) = Maps().eval(), (torch.randn(2, LENGTH, WIDTH),)
    fast = tokcompile.optimize(model, (x,), method=method, budget=0.75, where=[0, 1])
    got, want = run(fast, x), run(model, x)
    torch.testing.assert_close(got.sum(-1), want.sum(-1), rtol=0, atol=1e-6)  # nothing is lost of what sums to one
    if want.dim() == 4:
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)


def across_time(x):
    """Attention of each token to the tokens at its place in the other samples, as video models write it."""
    y = x.transpose(0, 1)
    return nn.functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0].transpose(0, 1)


@pytest.mark.every(2)
@pytest.mark.parametrize("between", [
    lambda x: x + across_time(x),
    lambda x: x + ((x.transpose(0, 1) @ x.permute(1, 2, 0)).softmax(-1) @ x.transpose(0, 1)).transpose(0, 1),
    lambda x: x - torch.einsum("bnd,cnd->cnd", x, x),
    lambda x: x - x.mean(0, keepdim=True),
    lambda x: x - x.amax(0),
    lambda x: x + x.index_select(0, torch.tensor([1, 2, 0])),
    lambda x: x + x.gather(0, torch.tensor([1, 2, 0])[:, None, None].expand_as(x)),
    lambda x: x - x.cumsum(0),
    lambda x: x - x.topk(3, 0).values,
    lambda x: x - x.sort(0).values,
    lambda x: x - x.scatter(0, torch.zeros(1, LENGTH, WIDTH, dtype=torch.int64), 1.0),
], ids=["attention", "matmul", "einsum", "mean", "amax", "index", "gather", "cumsum", "topk", "sort", "set"])  # fmt: skip
def test_samples_that_keep_other_tokens_are_not_mixed(between):
    """Token by token, along the batch: VideoPrism and ViViT attend to the same patch of other frames."""
    model, args = tiny(between)[0], (torch.randn(3, LENGTH, WIDTH),)
    with pytest.raises(UnsupportedGraph, match="it mixes samples that keep other tokens"):
        optimize((model, args), where=0)
    check = tokcompile.check(model, args, blocks=[0])
    assert check.ok, str(check)
    assert "only with recover='anywhere'" in check.results[0].note


@pytest.mark.parametrize("between", [lambda x: x + torch.rand_like(x), lambda x: nn.functional.dropout(x, 0.5, True),
                                     lambda x: x + torch.randn(1, LENGTH, WIDTH),
                                     lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)],
                         ids=["rand_like", "dropout", "randn", "attention"])  # fmt: skip
def test_random_ops_are_refused(between):
    with pytest.raises(UnsupportedGraph, match=r"the model draws random numbers at inference\n  node: \w+ = aten\.[\s\S]*"
                       r"what to do: optimize the part of the model after the random step"):  # fmt: skip
        optimize(tiny(between))


def aliased(x):
    y = x * 1
    z = y.transpose(1, 2)
    z.add_(1)
    return y


def test_in_place_on_shared_memory_is_refused():
    with pytest.raises(UnsupportedGraph, match=r"an in-place op changes memory that other values share\n  node: add__?\w* = aten.add_"  # noqa: E501
                       r"[\s\S]*module: blocks.1[\s\S]*what to do: write it out of place"):  # fmt: skip
        optimize(tiny(aliased))


def autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ torch.ones(WIDTH, WIDTH)


def test_autocast_inside_is_refused():
    with pytest.raises(
        UnsupportedGraph, match=r"turns autocast on inside its forward[\s\S]*convert the model's weights and inputs"
    ):
        optimize(tiny(autocast))


def test_a_method_that_reads_attention_before_the_first_block():
    with pytest.raises(TokcompileError, match=r"reads the attention[\s\S]*place it later: where=\[1\] or higher"):
        optimize(tiny(), method="dart", where=0)
    assert [r.block for r in optimize(tiny(), method="dart").plan.reductions] == [1]


def test_a_method_that_reads_attention_in_the_only_block_of_a_stage():
    class Halved(Tiny):
        def forward(self, x):
            return self.blocks[2](self.blocks[1](self.blocks[0](x))[:, ::2])

    with pytest.raises(TokcompileError, match=r"comes before block 2[\s\S]*choose a method that does not read attention"):
        optimize((Halved().eval(), tiny()[1]), method="dart", where=2)


def test_blocks_of_two_stages_do_not_go_together():
    model, args, _ = FAMILIES["timm/pit"].build(1)
    with pytest.raises(
        UnsupportedGraph,
        match=r"hold \[\d+, \d+\] tokens: one method works within one stage[\s\S]*choose one stage: where=",
    ):
        tokcompile.optimize(model, args, method="random", where=[0, 2])


def test_check_reports_what_it_cannot_check():
    check = tokcompile.check(*tiny(swirl))
    assert check.ok
    assert "only with recover='anywhere'" in check.results[0].note
    assert "there is no rule for it" in check.results[0].note
    text = str(check)
    assert "the pass understands this model" in text
    assert json.loads(check.json())["ok"] is True
