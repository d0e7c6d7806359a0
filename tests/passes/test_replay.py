"""Values read back into Python are recorded once and replayed while tracing; each is reported."""

import pytest
import torch
from torch import nn

from tests.conftest import run
from tokcompile.errors import TraceError
from tokcompile.passes.replay import Recording, record, replay
from tokcompile.passes.trace import export

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
N = torch.tensor([2, 3])


class Function(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, n):
        return self.fn(x, n)


def scalar(x, n):
    return x[:, : n[0].item()] * 2


def as_list(x, n):
    return torch.cat(x.split([*n.tolist(), 1], 1)[:2], 1)


def nested_list(x, n):
    (a, b), _ = torch.stack([n, n]).tolist()
    return x[:, :a] + x[:, b : b + a]


def branch(x, n):
    return x + 1 if n.sum() > 4 else x - 1


def python_number(x, n):
    return x[:, : int(n[1])] * float(n[0])


def positions(x, n):
    return x[:, torch.nonzero(n > 2)[:, 0]]


def positions_as_tuple(x, n):
    rows, columns = torch.nonzero(x > 0, as_tuple=True)
    return x[rows, columns]


def boolean_mask(x, n):
    return x[x > 0] * 2


def boolean_mask_and_slice(x, n):
    return x[:, torch.tensor([True, False, True, True, False, False])]


def write_at_a_mask(x, n):
    y = x * 1
    y[x > 0] = 5
    return y


def repeats(x, n):
    return x.repeat_interleave(n, 0)


def distinct(x, n):
    return x[:, : torch.unique(n).shape[0]]


def runs(x, n):
    _, counts = torch.unique_consecutive(torch.tensor([1, 1, 2]), return_counts=True)
    return x[:, : int(counts[0])]


def equality(x, n):
    return x * 2 if torch.equal(n, torch.tensor([2, 3])) else x


def loop(x, n):
    for i in range(int(n[0])):
        x = x + x[:, i : i + 1] * float(n[i])
    return x


ALL = [scalar, as_list, nested_list, branch, python_number, positions, positions_as_tuple, boolean_mask,
       boolean_mask_and_slice, write_at_a_mask, repeats, distinct, runs, equality, loop]  # fmt: skip


@pytest.mark.parametrize("fn", ALL, ids=lambda f: f.__name__)
def test_what_is_read_back_is_fixed(fn):
    program, guards = export(Function(fn).eval(), (X, N), {})
    assert torch.equal(run(program.module(check_guards=False), X, N), fn(X, N))
    sizes = [s for node in program.graph.nodes if isinstance(v := node.meta.get("val"), torch.Tensor) for s in v.shape]
    assert all(type(s) is int for s in sizes)
    assert all(" gave " in guard for guard in guards)


@pytest.mark.parametrize(("fn", "guard"), [
    (scalar, "item gave 2"),
    (as_list, "item gave 3"),
    (branch, "__bool__ gave True"),
    (boolean_mask, "__getitem__(mask) gave "),
    (write_at_a_mask, "__setitem__(mask) gave "),
    (repeats, "repeat_interleave gave 5"),
    (positions, "nonzero gave a tensor of shape (1, 1)"),
    (equality, "equal gave True"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_guards_say_what_was_read(fn, guard):
    recording = record(lambda: fn(X, N))
    assert any(text.startswith(guard) for text in recording.guards()), recording.guards()
    assert all(len(text) < 120 for text in recording.guards())


def test_nothing_is_recorded_where_nothing_is_read():
    assert record(lambda: X * 2 + X.sum()).values == []
    _, guards = export(Function(lambda x, n: x * n[0]).eval(), (X, N), {})
    assert guards == []


def test_values_are_copied():
    mask = X > 0
    recording = record(lambda: X[mask])
    (_, (rows, columns)), *_ = [(name, value[0]) for name, value in recording.values]
    before = rows.clone()
    mask.zero_()
    assert torch.equal(rows, before)
    with replay(recording):
        first = torch.ones(2, 6)[mask]
    with replay(recording):
        second = torch.ones(2, 6)[mask]
    assert first.shape == second.shape == (len(columns),)


def test_a_trace_that_asks_for_something_else_is_out_of_step():
    with (
        replay(Recording([("item", 3)])),
        pytest.raises(RuntimeError, match="the trace called __bool__, the eager run had called item"),
    ):
        bool(torch.tensor(True))
    with replay(Recording([])), pytest.raises(RuntimeError, match="the trace called item, the eager run had called None"):
        torch.tensor(3).item()


def test_a_replay_gives_values_in_order():
    recording = record(lambda: [torch.tensor(i).item() for i in (3, 1, 2)])
    with replay(recording):
        assert [torch.tensor(0).item() for _ in range(3)] == [3, 1, 2]


def test_a_replay_has_the_structure_of_the_list():
    recording = record(lambda: torch.tensor([[1, 2], [3, 4]]).tolist())
    with replay(recording):
        assert torch.zeros(2, 2, dtype=torch.int64).tolist() == [[1, 2], [3, 4]]


class Fickle(nn.Module):
    """Branches on whether it is traced: what is replayed does not fit."""

    def forward(self, x):
        if torch.compiler.is_compiling():
            return x[: int(x.sum().item())] * bool(x.sum() > 0)
        return x * x[0].item() * x[1].item()


def test_a_model_that_behaves_otherwise_under_tracing_is_refused():
    with pytest.raises(TraceError, match="replay is out of step"):
        export(Fickle().eval(), (torch.ones(4),), {})
