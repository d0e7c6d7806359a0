"""What was fixed from the example inputs is checked on later inputs, in the traced, the optimized and the saved model."""

import re

import pytest
import torch

import tokcompile
from tests.passes.graphs import Function, ops, run
from tokcompile.errors import InputError
from tokcompile.passes.arguments import flat_caller
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.guards import collect
from tokcompile.passes.trace import from_program, trace, unlift

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
N = torch.tensor([2, 3])


def scalar(x, n):
    return x[:, : n[0].item()] * 2


def as_list(x, n):
    return torch.cat(x.split([*n.tolist(), 1], 1)[:2], 1)


def branch(x, n):
    return x + 1 if n.sum() > 4 else x - 1


def boolean_mask(x, n):
    return x[:, torch.arange(6) < n[1]] * 2


def repeats(x, n):
    return x.repeat_interleave(n, 0)


def one_repeat(x, n):
    return x.repeat_interleave(n[:1], 0)


def distinct(x, n):
    return x[:, : torch.unique(n).shape[0]]


def membership(x, n):
    return x + 1 if 3 in n else x


def equality(x, n):
    return x * 2 if torch.equal(n, torch.tensor([2, 3])) else x


def truncated(x, n):
    return x[:, : int(n[1] * 0.5)]


def a_float(x, n):
    return x * (n.float().mean() / 3).item()


CASES = [
    # fn, values that give the same graph, values that do not
    (scalar, [2, 5], [1, 3]),
    (as_list, [2, 3], [3, 2]),
    (branch, [4, 4], [1, 1]),
    (boolean_mask, [1, 3], [2, 4]),
    (repeats, [1, 4], [2, 2]),
    (one_repeat, [2, 1], [1, 3]),
    (distinct, [2, 3], [2, 2]),
    (membership, [3, 3], [2, 2]),
    (equality, [2, 3], [3, 3]),
    (truncated, [9, 3], [2, 4]),
    (a_float, [3, 2], [3, 3]),
]


@pytest.mark.parametrize(("fn", "good", "bad"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_later_values_are_checked(fn, good, bad):
    traced = trace(Function(fn).eval(), (X, N))
    assert traced.guards
    assert all(" gave " in line and line.endswith(" from inputs_1") for line in traced.guards)
    call = flat_caller(traced)
    values = call(X + 1, torch.tensor(good))
    for graph in (traced.gm, canonicalise(traced.gm, traced.inputs)):
        torch.testing.assert_close(run(graph, *values)[0], fn(X + 1, torch.tensor(good)))
    with pytest.raises(
        InputError, match=r"these inputs differ from the example inputs .* gave .*\n  what to do: optimize once"
    ):
        call(X, torch.tensor(bad))


def test_what_does_not_depend_on_inputs_is_no_guard():
    traced = trace(Function(lambda x, n: x[:, : torch.tensor([1, 4])[1].item()]).eval(), (X, N))
    assert traced.guards == []
    assert traced.checks == []


def test_marks_are_taken_out_of_the_traced_graph():
    traced = trace(Function(as_list).eval(), (X, N))
    assert not [op for op in ops(traced.gm) if "assert" in op or op.startswith(("eq", "all"))]


def test_a_saved_program_keeps_its_guards(tmp_path):
    traced = trace(Function(scalar).eval(), (X, N))
    torch.export.save(traced.program, tmp_path / "program.pt2")
    again = trace(tmp_path / "program.pt2")
    assert again.guards == traced.guards
    with pytest.raises(InputError, match="item gave 2"):
        flat_caller(again)(X, N + 1)


def test_a_tensor_held_equal_to_a_constant_becomes_it():
    """Then positions computed from sizes are tables, as those of an image whose grid was fixed."""

    def fn(x, n):
        rows, columns = n.tolist()
        angle = torch.arange(6) * n[0] + (n * 2).sum()
        return x.view(rows, columns, 2) * 1, x * angle

    traced = trace(Function(fn).eval(), (X, N))
    gm = canonicalise(traced.gm, traced.inputs)
    assert ops(gm) == ["reshape.default", "mul.Tensor", "mul.Tensor"]
    for g, w in zip(run(gm, X, N), fn(X, N)):
        assert torch.equal(g, w)


def test_a_tensor_written_after_it_was_read_is_not_replaced():
    def fn(x, n):
        m = n * 1
        length = m[0].item()
        m += 1
        return x[:, :length] * m[0]

    traced = trace(Function(fn).eval(), (X, N))
    for n in (N, torch.tensor([2, 7])):
        torch.testing.assert_close(run(canonicalise(traced.gm, traced.inputs), X, n)[0], fn(X, n))


def test_guards_compute_only_what_they_need():
    def fn(x, n):
        y = torch.relu_(x @ x.mT)
        m = n * 1
        m[0] += 1
        return y * m[0].item()

    guards = trace(Function(fn).eval(), (X, N)).checks[0]
    assert not [op for op in ops(guards.gm) if op.startswith(("relu", "matmul"))]
    guards((X, N))
    with pytest.raises(InputError):
        guards((X, N + 1))


def test_a_plain_export_has_no_guards():
    program = torch.export.export(Function(lambda x, n: x * n[0]).eval(), (X, N))
    assert collect(unlift(program)) is None
    assert from_program(program, (X, N), {}, None, []).checks == []


class Sized(torch.nn.Module):
    """Reads the size of its grid from an input, as towers of packed images do."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.tower = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, sizes):
        height, width = sizes[0].tolist()
        rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        return self.tower(x + (rows + 2 * columns)[:, None])


def test_an_optimized_model_refuses_other_values():
    x, sizes = torch.randn(1, 36, 16), torch.tensor([[6, 6]])
    fast = tokcompile.optimize(Sized().eval(), (x, sizes), method="random", budget=0.5)
    (guard,) = fast.report.guards
    assert re.fullmatch(r"tolist gave \[6, 6\] \(test_guards.py:\d+\) from sizes", guard)
    with torch.no_grad():
        fast(x, sizes)
        with pytest.raises(InputError, match=r"tolist gave \[6, 6\] .* from sizes"):
            fast(x, torch.tensor([[4, 9]]))
