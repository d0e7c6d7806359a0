"""The canonical graph: bit for bit the same values, functional, without constants to compute, no-ops and asserts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import leaves
from tests.passes.graphs import TABLE, Function, X, canonical, ops, run, same
from tests.passes.test_fold import rotary, written_mask
from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.graph import copy_graph
from tokcompile.passes.trace import trace

# -- no-ops ------------------------------------------------------------------------------------------------------------


def test_other_names_of_ops_are_the_names_that_rules_know():
    def fn(x):
        y = torch.multiply(x, 3).subtract(1).divide(2)
        y.multiply_(2)
        return torch.concat([y.clip(0), y.negative().absolute()])

    assert {op.split(".")[0] for op in ops(same(fn, X))} <= {"mul", "sub", "div", "cat", "clamp", "neg", "abs"}


@pytest.mark.parametrize(("fn", "left"), [
    (lambda x: F.dropout(x.to(torch.float32), 0.5, False) * 2, ["mul.Tensor"]),
    (lambda x: torch.ops.aten.alias(x[:][:, :, :]) * 2, ["mul.Tensor"]),
    (lambda x: torch.cat([x * 2]), ["mul.Tensor"]),
    (lambda x: torch.cat([torch.empty(2, 0, 8), x * 2], 1), ["mul.Tensor"]),
    (lambda x: x.detach() * 2, ["mul.Tensor"]),
    (lambda x: (x * 2, x * 3)[0], ["mul.Tensor"]),
    (lambda x: x.type_as(TABLE) * 2, ["mul.Tensor"]),
], ids=["dropout-cast", "whole-slice", "cat-of-one", "cat-with-empty", "detach", "unused", "type-as"])  # fmt: skip
def test_what_does_nothing_is_dropped(fn, left):
    assert ops(same(fn, X)) == left


@pytest.mark.parametrize("fn", [
    lambda x: x.to(torch.float64) * 2,
    lambda x: x[:, :5] * 2,
    lambda x: x[:, ::2] * 2,
    lambda x: torch.cat([x, x[:, :1]], 1),
], ids=["cast", "slice", "step", "cat"])  # fmt: skip
def test_what_does_something_stays(fn):
    assert len(ops(same(fn, X))) == 2


def test_equal_views_become_one():
    gm = same(lambda x: (x.transpose(1, 2) * 2, x.transpose(1, 2) * 3, x.view(2, 48) + 1, x.view(2, 48) + 2), X)
    assert sorted(ops(gm)) == ["add.Tensor"] * 2 + ["mul.Tensor"] * 2 + ["reshape.default", "transpose.int"]


def test_what_was_a_view_copies_what_lies_otherwise_in_memory():
    gm = same(lambda x: (x + 1).view(2, 48), X)
    assert torch.equal(gm(X.transpose(0, 2).contiguous().transpose(0, 2))[0], (X + 1).view(2, 48))


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            x = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            return self.linear(x) * 2


def test_regions_are_inlined():
    gm = same(Regions(), X)
    assert ops(gm) == ["linear.default", "linear.default", "mul.Tensor"]


def test_asserts_are_dropped():
    def fn(x):
        torch._assert_async((x < 1e6).all(), "large")
        torch._check(x.shape[0] == 2)
        return x * 2

    assert ops(same(fn, X)) == ["mul.Tensor"]


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "stays"), [
    (torch.ones(6, 6, dtype=torch.bool), False),
    (torch.zeros(6, 6), False),
    (torch.ones(6, 6, dtype=torch.bool).tril(), True),
    (torch.zeros(6, 6).index_fill(1, torch.tensor([2]), -1.0), True),
], ids=["all-true", "zero", "causal", "bias"])  # fmt: skip
@pytest.mark.parametrize("place", ["positional", "keyword"])
def test_a_mask_that_hides_nothing_becomes_none(mask, stays, place):
    def positional(x):
        return F.scaled_dot_product_attention(x, x, x, mask.clone())

    def keyword(x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.clone(), scale=0.3)

    fn = positional if place == "positional" else keyword
    gm = canonical(fn, X)
    torch.testing.assert_close(run(gm, X)[0], fn(X), rtol=0, atol=1e-6)
    fused = next(n for n in gm.graph.nodes if "scaled_dot" in str(n.target))
    masks = [n for n in fused.all_input_nodes if n.op == "get_attr"]
    assert bool(masks) == stays


def test_what_only_has_the_shape_of_an_input_is_a_constant():
    x = torch.randn(2, 3, 4)

    def fn(x):
        kinds = torch.zeros_like(x)[:, :, 0]
        return x * (kinds[..., None] == kinds[:, None, 0:1]) + torch.ones_like(x)

    gm = canonical(fn, x)
    assert "zeros_like.default" not in ops(gm)
    assert "ones_like.default" in ops(gm)  # as large as x itself, and with its tokens
    assert torch.equal(gm(x)[0], fn(x))


def test_such_a_constant_is_read_at_places_that_the_inputs_say():
    """As GIT's mask is, in a decode step."""

    def fn(x):
        table = torch.zeros_like(x)[:, :3]
        return table[torch.tensor([0, 1]), x[:, 0, 0].long().clamp(0, 2)] + x[:, 1]

    same(fn, X)


def test_what_has_the_shape_and_the_strides_of_an_input_stays():
    def fn(x):
        x = x.transpose(1, 2)
        return torch.zeros_like(x)[:, :2].transpose(1, 2).reshape(2, 6) + x.sum()

    x = torch.randn(2, 3, 4)
    assert torch.equal(canonical(fn, x)(x)[0], fn(x))


def test_a_mask_from_the_inputs_stays():
    padding = torch.ones(2, 6, dtype=torch.bool)
    gm = same(lambda x, m: F.scaled_dot_product_attention(x, x, x, m[:, None].expand(2, 6, 6)), X, padding)
    assert len(next(n for n in gm.graph.nodes if "scaled_dot" in str(n.target)).all_input_nodes) == 2


# -- what is refused, what is left alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [lambda x: x + torch.rand(8), lambda x: x.bernoulli(0.5), lambda x: F.dropout(x, 0.5, True)],
                         ids=["rand", "bernoulli", "dropout"])  # fmt: skip
def test_random_ops_are_refused(fn):
    with pytest.raises(UnsupportedGraph, match="the model draws random numbers at inference"):
        canonical(fn, X)


def test_a_recurrent_layer_draws_nothing_at_inference():
    lstm = torch.nn.LSTM(8, 8, 2, dropout=0.5)
    gm = canonical(lstm, torch.randn(4, 2, 8))
    assert any("lstm" in op for op in ops(gm))


def test_the_given_graph_is_not_changed():
    traced = trace(Function(written_mask).eval(), (X,))
    before = str(traced.gm.graph)
    canonicalise(traced.gm, traced.inputs)
    assert str(traced.gm.graph) == before
    assert not [name for name, _ in traced.gm.named_buffers() if "_folded_" in name]


def test_a_copy_shares_weights_but_not_nodes():
    traced = trace(nn.Linear(8, 4).eval(), (X,))
    copy = copy_graph(traced.gm)
    assert {p.data_ptr() for p in copy.parameters()} == {p.data_ptr() for p in traced.gm.parameters()}
    assert not set(copy.graph.nodes) & set(traced.gm.graph.nodes)
    assert torch.equal(leaves(copy(X))[0], leaves(traced.gm(X))[0])


def test_canonicalising_twice_changes_nothing():
    gm = canonical(rotary, X)
    again = canonicalise(gm, [X])
    assert ops(again) == ops(gm)
    assert torch.equal(run(again, X)[0], run(gm, X)[0])


def test_every_node_has_a_fake_value_of_one_mode():
    gm = canonical(rotary, X)
    values = [n.meta["val"] for n in gm.graph.nodes if n.op != "output"]
    assert len({id(v.fake_mode) for v in values}) == 1
    assert all(type(size) is int for v in values for size in v.shape)
