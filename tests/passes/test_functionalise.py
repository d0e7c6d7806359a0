"""In-place ops become functional ones, or are refused where memory is shared in a way that is not followed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.graphs import TABLE, Function, X, canonical, same
from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.functionalise import functional_overload
from tokcompile.passes.trace import trace


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


def written_through_a_cast_to_the_same_type(x):
    """As in Zamba's state: one head after the other, as float32, which it is."""
    y = x * 2
    row = y[:, 1]
    new = row.float() * 3
    row.float().copy_(new.to(row.dtype))
    return y, new


def another_dtype_is_written(x):
    y = torch.zeros(x.shape, dtype=torch.int32)
    y.copy_(x * 3)
    return y.float() + x


@pytest.mark.parametrize("fn", [
    in_place_activation, in_place_chain, write_a_row, write_a_slice, write_a_slice_of_a_slice, write_at_positions,
    write_at_a_mask, write_into_a_constant, write_all_of_a_constant, fill_of_a_new_tensor, written_before_a_view,
    a_copy_is_written, another_dtype_is_written, a_view_that_alone_is_read_is_written,
    read_a_row_after_its_parts_are_written, written_through_a_chain_of_views, joined_masks,
    written_from_the_inputs_then_computed, one_of_several_results_is_written,
    written_through_a_cast_to_the_same_type,
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


def through(view, read=False):
    """A write through a view, or the view read after a write."""

    def fn(x):
        y = x * 1
        seen = view(y)
        (y if read else seen).mul_(2)
        return seen * 2 if read else y

    fn.__name__ = f"{'read' if read else 'write'}_{view.__name__}"
    return fn


def windows(y):
    return y.unfold(1, 2, 2)


def strides(y):
    return y.as_strided((2, 6), (48, 8))


def complex_numbers(y):
    return torch.view_as_complex(y.unflatten(-1, (4, 2))).real


def halves(y):
    return y.tensor_split(2, 1)[1]


WAYS = [through(view, read) for view in (windows, strides, complex_numbers, halves) for read in (False, True)]


@pytest.mark.parametrize("fn", [
    write_through_a_transpose, write_through_a_view_seen_later, write_through_contiguous, write_through_reshape,
    write_through_a_cast_to_the_same_type, write_through_dropout, write_through_an_identity_slice, write_through_expand,
    write_through_unbind, write_and_read_the_old_view, write_a_row_whose_view_is_read, *WAYS,
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


class Angles(nn.Module):
    """Writes a buffer whole at each call, as a rotary embedding whose angles depend on the length; early: reads it first."""

    def __init__(self, early=False):
        super().__init__()
        self.early = early
        self.register_buffer("angles", torch.arange(X.shape[-1]).float())
        self.register_buffer("own", torch.arange(X.shape[-1]).float())

    def forward(self, x):
        before = self.angles + 1 if self.early else 0
        self.angles.copy_(torch.where(x.max() > 1, self.own * 2, self.own))
        return x * self.angles + before


def test_a_buffer_that_is_written_before_it_is_read_is_no_state():
    graph = canonical(Angles().eval(), X)
    for x in (X, -X.abs()):  # the example's way, and the other one
        assert torch.equal(graph(x)[0], Angles()(x))
    with pytest.raises(UnsupportedGraph, match="the model changes a buffer of its own in forward"):
        canonical(Angles(early=True).eval(), X)


def test_an_input_written_in_place_is_refused():
    with pytest.raises(UnsupportedGraph, match="an in-place op changes memory that other values share"):
        canonical(lambda x: x.add_(1) * 2, X.clone())


def test_functional_overloads_go_by_name():
    gm = trace(Function(in_place_chain).eval(), (X,)).gm
    named = {str(n.target): str(functional_overload(n)) for n in gm.graph.nodes if n.op == "call_function"}
    assert named["aten.add_.Tensor"] == "aten.add.Tensor"
    assert named["aten.clamp_.default"] == "aten.clamp.default"
    assert named["aten.mul.Tensor"] == "None"
