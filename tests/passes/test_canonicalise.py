"""The canonical graph: bit for bit the same values, functional, without constants to compute, no-ops and asserts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import leaves
from tests.passes.graphs import Function, canonical, ops, run
from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.functionalise import functional_overload
from tokcompile.passes.graph import copy_graph
from tokcompile.passes.trace import trace

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def same(fn, *inputs):
    """The canonical graph of `fn`, after checking that it gives what `fn` gives, twice, and has no in-place op left."""
    module = fn if isinstance(fn, nn.Module) else Function(fn)
    with torch.no_grad():
        want = leaves(module(*[v.clone() for v in inputs]))
    gm = canonical(module, *[v.clone() for v in inputs])
    for _ in range(2):
        got = leaves(run(gm, *[v.clone() for v in inputs]))
        assert len(got) == len(want)
        for g, w in zip(got, want):
            assert g.dtype == w.dtype
            assert torch.equal(g, w)
    assert not [op for op in ops(gm) if op.split(".")[0].endswith("_") and not op.startswith("__")]
    return gm


# -- constants ---------------------------------------------------------------------------------------------------------


def rotary(x):
    angles = torch.outer(torch.arange(6.0), 10 ** -torch.arange(4.0))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def relative_bias(x):
    place = torch.arange(6)[:, None] - torch.arange(6)[None] + 5
    return x @ x.mT + (torch.arange(11.0) * 0.5)[place]


def causal_mask(x):
    mask = torch.full((6, 6), float("-inf")).triu(1)
    return (x @ x.mT + mask).softmax(-1)


def written_mask(x):
    mask = torch.zeros(6, 6)
    mask[:, 4:] = 1.0
    mask[0] += 2
    mask.mul_(3)
    return x @ x.mT + mask


def grown_list(x):
    return x + torch.stack([torch.full((8,), float(i)) for i in range(6)])


@pytest.mark.parametrize("fn", [rotary, relative_bias, causal_mask, written_mask, grown_list], ids=lambda f: f.__name__)
def test_what_does_not_depend_on_inputs_becomes_a_buffer(fn):
    gm = same(fn, X)
    assert any(n.op == "get_attr" and n.target.startswith("_folded_") for n in gm.graph.nodes)
    assert not {"arange.default", "cos.default", "full.default", "zeros.default", "triu.default", "copy.default"} & set(ops(gm))


def test_views_of_weights_are_not_copied():
    gm = same(nn.Linear(8, 4).requires_grad_(False), X)
    assert not any("_folded_" in str(n.target) for n in gm.graph.nodes)
    weight = nn.Parameter(torch.randn(8, 8))
    gm = same(Function(lambda x: x @ weight.t()[:, :4], weight=weight), X)
    assert {p.data_ptr() for p in gm.parameters()} == {weight.data_ptr()}
    assert not any("_folded_" in str(n.target) for n in gm.graph.nodes)


def test_what_is_computed_from_weights_is_folded():
    weight = nn.Parameter(torch.randn(8, 8))
    gm = same(Function(lambda x: x @ (weight * 2), weight=weight), X)
    assert ops(gm)[-1].startswith("matmul")
    assert "mul.Tensor" not in ops(gm)


def test_a_constant_output_is_kept():
    gm = same(lambda x: (x * 2, torch.arange(3) + 1), X)
    assert len(leaves(run(gm, X))) == 2


def test_a_weight_written_in_place_while_folding_keeps_its_value():
    weight = nn.Parameter(torch.ones(8), requires_grad=False)
    module = Function(lambda x: x * weight.clone().mul_(3), weight=weight)
    same(module, X)
    assert weight.tolist() == [1.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["float", "bool"])
def test_a_constant_changed_after_its_use(dtype):
    """Either both values are right or it is refused."""

    def fn(x):
        mask = torch.zeros(6, 8, dtype=dtype)
        y = x + mask
        mask[0] = 1
        return y, x + mask

    try:
        same(fn, X)
    except UnsupportedGraph as refusal:
        assert "a constant is changed in place after it was used" in str(refusal)  # noqa: PT017


# -- in-place ops ------------------------------------------------------------------------------------------------------


def in_place_activation(x):
    return F.relu(x + 1, inplace=True)


def in_place_chain(x):
    y = x * 2
    y += 1
    y.mul_(3).clamp_(max=5)
    return y, y + 1


def write_a_row(x):
    y = x * 2
    y[:, 0] = 0
    return y + 1


def write_a_slice(x):
    y = x * 2
    y[:, 1:3] = TABLE[1:3]
    y[:, 4:] += 5
    return y


def write_a_slice_of_a_slice(x):
    y = x * 2
    y[1:, 2:4][:, :, 3] = 7
    return y


def write_at_positions(x):
    y = x * 2
    y[:, [0, 3]] = 7
    return y


def write_at_a_mask(x):
    return (x * 2).masked_fill_(TABLE > 0, 0.0)


def write_into_a_constant(x):
    """As in EoMT: a mask is made, then a part of it is written from the inputs."""
    mask = torch.ones(2, 6, 6)
    mask[:, :2, 2:] = (x[:, :2, :4] > 0).float()
    return (x @ x.mT) * mask


def write_all_of_a_constant(x):
    out = torch.zeros(2, 6, 8)
    out[:] = x * 2
    return out + 1


def fill_of_a_new_tensor(x):
    y = torch.empty_like(x).fill_(2.0)
    return x * y


def written_before_a_view(x):
    y = x * 2
    y.add_(1)
    return y.transpose(1, 2)


def read_a_row_after_its_parts_are_written(x):
    """As in Qwen3-VL's rotary table: a part of the first row comes from the others."""
    y = x * 2
    row = y[0]
    row[..., 1:5:2] = y[1, ..., 1:5:2]
    row[..., 2:6:3] = y[1, ..., 2:6:3] + 1
    return torch.cat((row, row), -1), y


def written_through_a_chain_of_views(x):
    y = x * 2
    turned = y.unsqueeze(1).transpose(2, 3)
    y[:, 1:3] = 7
    first = turned + 1
    y[:, 2] += 1
    return first, turned, y


def joined_masks(x):
    seen = x > 0
    seen |= x < -1
    seen &= x < 2
    seen ^= x > 1.5
    return x * seen


def written_from_the_inputs_then_computed(x):
    """Nothing computed from a constant is a constant once the inputs were written into it."""
    table = torch.zeros(2, 6, 8)
    table[0] = x[1]
    angle = table.unsqueeze(0).cos() * 1.0
    row = angle[0, 0]
    row[..., 1:5:2] = angle[0, 1, ..., 1:5:2]
    return x + row


def one_of_several_results_is_written(x):
    best, at = x.topk(3)
    best /= best.sum(-1, keepdim=True)
    return best, at


def a_view_that_alone_is_read_is_written(x):
    y = (x * 2).view(2, 2, 3, 8).permute(2, 0, 1, 3)
    y += 1
    y[0].mul_(3)
    return y.flatten(1)


def a_copy_is_written(x):
    y = x * 2
    z = y.clone()
    z.add_(1)
    return y, z


@pytest.mark.parametrize("fn", [
    in_place_activation, in_place_chain, write_a_row, write_a_slice, write_a_slice_of_a_slice, write_at_positions,
    write_at_a_mask, write_into_a_constant, write_all_of_a_constant, fill_of_a_new_tensor, written_before_a_view,
    a_copy_is_written, a_view_that_alone_is_read_is_written,
    read_a_row_after_its_parts_are_written, written_through_a_chain_of_views, joined_masks,
    written_from_the_inputs_then_computed, one_of_several_results_is_written,
], ids=lambda f: f.__name__)  # fmt: skip
def test_in_place_ops_become_functional(fn):
    same(fn, X)


def write_through_a_transpose(x):
    y = x * 2
    y.transpose(1, 2).add_(1)
    return y


def write_through_a_view_seen_later(x):
    y = x * 2
    rows = y.view(12, 8)
    y.add_(1)
    return rows, y


def write_through_contiguous(x):
    y = x * 2
    y.contiguous().add_(1)
    return y


def write_through_a_cast_to_the_same_type(x):
    y = x * 2
    y.to(torch.float32).add_(1)
    return y


def write_through_reshape(x):
    y = x * 2
    y.reshape(12, 8).add_(1)
    return y


def write_through_dropout(x):
    y = x * 2
    F.dropout(y, 0.5, training=False).add_(1)
    return y


def write_through_an_identity_slice(x):
    y = x * 2
    y[:].add_(1)
    return y


def write_through_expand(x):
    y = x * 2
    z = y.expand_as(y)
    z.mul_(2)
    return y + z


def write_through_unbind(x):
    y = x * 2
    y.unbind(1)[0].add_(1)
    return y


def write_and_read_the_old_view(x):
    y = x * 2
    row = y[:, 0]
    y[:, 0] = 5
    return row + y[:, 1]


def write_a_row_whose_view_is_read(x):
    y = x * 2
    row = y[:, 0]
    row.add_(5)
    return row, y


@pytest.mark.parametrize("fn", [
    write_through_a_transpose, write_through_a_view_seen_later, write_through_contiguous, write_through_reshape,
    write_through_a_cast_to_the_same_type, write_through_dropout, write_through_an_identity_slice, write_through_expand,
    write_through_unbind, write_and_read_the_old_view, write_a_row_whose_view_is_read,
], ids=lambda f: f.__name__)  # fmt: skip
def test_writes_into_shared_memory_are_right_or_refused(fn):
    try:
        same(fn, X)
    except UnsupportedGraph as refusal:
        assert "an in-place op changes memory that other values share" in str(refusal)  # noqa: PT017
        assert "what to do: write it out of place" in str(refusal)  # noqa: PT017


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls


def test_a_model_that_counts_its_calls_is_refused():
    with pytest.raises(UnsupportedGraph, match="the model changes a buffer of its own in forward"):
        canonical(Counter().eval(), X)


def test_an_input_written_in_place_is_refused():
    with pytest.raises(UnsupportedGraph, match="an in-place op changes memory that other values share"):
        canonical(lambda x: x.add_(1) * 2, X.clone())


def test_other_names_of_ops_are_the_names_that_rules_know():
    def fn(x):
        y = torch.multiply(x, 3).subtract(1).divide(2)
        y.multiply_(2)
        return torch.concat([y.clip(0), y.negative().absolute()])

    assert {op.split(".")[0] for op in ops(same(fn, X))} <= {"mul", "sub", "div", "cat", "clamp", "neg", "abs"}


def test_functional_overloads_go_by_name():
    gm = trace(Function(in_place_chain).eval(), (X,)).gm
    named = {str(n.target): str(functional_overload(n)) for n in gm.graph.nodes if n.op == "call_function"}
    assert named["aten.add_.Tensor"] == "aten.add.Tensor"
    assert named["aten.clamp_.default"] == "aten.clamp.default"
    assert named["aten.mul.Tensor"] == "None"


# -- no-ops ------------------------------------------------------------------------------------------------------------


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
    assert sorted(ops(gm)) == ["add.Tensor"] * 2 + ["mul.Tensor"] * 2 + ["transpose.int", "view.default"]


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
