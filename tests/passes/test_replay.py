"""Values read back into Python are recorded once and replayed while tracing; each is reported."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.conftest import run
from tokcompile.errors import TraceError
from tokcompile.passes.replay import record, replay
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


def slice_by_a_tensor(x, n):
    return x[:, n[0] : n[0] + n[1]]


def slice_from_the_larger(x, n):
    return x[:, max(0, n[0] - 5) : min(n[1], 4)]


def index_of_a_tensor(x, n):
    return x[:, n[0]]


def range_of_a_tensor(x, n):
    return x[:, torch.arange(n[1])] + torch.zeros(2, n[1])


def view_by_a_tensor(x, n):
    return x.view(n[0], n[1], -1)


def selected(x, n):
    return torch.masked_select(x, x > 0)


def where_true(x, n):
    return x[torch.where(x > 0)]


def membership(x, n):
    return x + 1 if 3 in n else x


def tensor_of_tensors(x, n):
    return x * torch.tensor([[n[0], n[1], 1], [n[1], 2, n[0]]]).repeat(1, int(n[0]))


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
       boolean_mask_and_slice, write_at_a_mask, repeats, distinct, runs, equality, loop, slice_by_a_tensor,
       slice_from_the_larger, index_of_a_tensor, range_of_a_tensor, view_by_a_tensor, selected, where_true, membership,
       tensor_of_tensors]  # fmt: skip


@pytest.mark.parametrize("fn", ALL, ids=lambda f: f.__name__)
def test_what_is_read_back_is_fixed(fn):
    program, guards = export(Function(fn).eval(), (X, N), {})
    assert torch.equal(run(program.module(check_guards=False), X, N), fn(X, N))
    sizes = [s for node in program.graph.nodes if isinstance(v := node.meta.get("val"), torch.Tensor) for s in v.shape]
    assert all(type(s) is int for s in sizes)
    assert all(" gave " in guard for guard in guards)


@pytest.mark.parametrize(("fn", "guard"), [
    (scalar, "item gave 2"),
    (as_list, "tolist gave [2, 3] (test_replay.py:"),
    (branch, "__bool__ gave True"),
    (boolean_mask, "__getitem__(mask) gave 5 positions"),
    (write_at_a_mask, "__setitem__(mask) gave "),
    (repeats, "repeat_interleave gave 5"),
    (positions, "nonzero gave a tensor of shape (1, 1)"),
    (equality, "equal gave True"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_guards_say_what_was_read(fn, guard):
    recording = record(lambda: fn(X, N))
    texts = [str(read) for read in recording.reads]
    assert any(text.startswith(guard) for text in texts), texts
    assert all(len(text) < 120 for text in texts)


def test_nothing_is_recorded_where_nothing_is_read():
    assert record(lambda: X * 2 + X.sum()).reads == []
    _, guards = export(Function(lambda x, n: x * n[0]).eval(), (X, N), {})
    assert guards == []


def test_values_are_copied():
    mask = X > 0

    def select():
        return torch.ones(2, 6)[mask]

    recording = record(select)
    rows, columns = recording.reads[0].value
    before = rows.clone()
    mask.zero_()
    assert torch.equal(rows, before)
    mask |= X > 0
    with replay(recording):
        first = select()
    with replay(recording):
        second = select()
    assert first.shape == second.shape == (len(columns),)


def read_all(skip=False, more=False):
    first = torch.tensor(1).item()
    second = None if skip else bool(torch.tensor(True))
    return first, second, torch.tensor(3).item(), torch.tensor(4).item() if more else None


def test_a_read_that_the_eager_run_did_not_make_is_named():
    options = {}

    def reads():
        return read_all(**options)

    recording = record(reads)
    options["more"] = True
    with replay(recording), pytest.raises(TraceError, match=r"the trace called item \(test_replay.py:\d+\), the eager run had"):
        reads()


def test_a_read_left_out_while_tracing_does_not_disturb_the_others():
    options = {}

    def reads():
        return read_all(**options)

    recording = record(reads)
    options["skip"] = True
    with replay(recording):
        assert reads() == (1, None, 3, None)
    with replay(recording):
        assert reads()[::2] == (1, 3)


def test_a_replay_gives_values_in_order():
    def items():
        return [torch.tensor(i).item() for i in (3, 1, 2)]

    recording = record(items)
    with replay(recording):
        assert items() == [3, 1, 2]


def test_a_replay_has_the_structure_of_the_list():
    values = torch.tensor([[1, 2], [3, 4]])

    def nested():
        return values.tolist()

    recording = record(nested)
    with replay(recording):
        assert nested() == [[1, 2], [3, 4]]
    values.zero_()
    with replay(recording), pytest.raises(RuntimeError, match=r"fixed from the example inputs: tolist gave \[\[1, 2"):
        nested()


class Fickle(nn.Module):
    """Branches on whether it is traced: what is replayed does not fit."""

    def forward(self, x):
        if isinstance(x, FakeTensor):
            return x[: int(x.sum().item())]
        return x * x[0].item() * x[1].item()


def test_a_model_that_behaves_otherwise_under_tracing_is_refused():
    with pytest.raises(TraceError, match=r"the trace called item .*, the eager run had not"):
        export(Fickle().eval(), (torch.ones(4),), {})


class Careful(nn.Module):
    """Leaves out a check while it is exported, as models of transformers do."""

    def forward(self, x, n):
        if not torch.compiler.is_exporting() and bool((n < 0).any()):
            raise ValueError("sizes are positive")
        return x[:, : n[0]] * 2


def test_a_model_may_ask_whether_it_is_exported():
    program, guards = export(Careful().eval(), (X, N), {})
    assert torch.equal(run(program.module(check_guards=False), X, N), X[:, :2] * 2)
    assert [text[:11] for text in guards] == ["item gave 2"]
    assert not torch.compiler.is_exporting()


class OnlyEager(nn.Module):
    """Cannot run as if exported without being traced."""

    def forward(self, x, n):
        if torch.compiler.is_exporting() and not isinstance(x, FakeTensor):
            raise RuntimeError("not traced")
        return x[:, : n[0].item()] * 2


def test_a_model_that_runs_only_as_itself_is_recorded_so():
    program, _ = export(OnlyEager().eval(), (X, N), {})
    assert torch.equal(run(program.module(check_guards=False), X, N), X[:, :2] * 2)


class Remembers(nn.Module):
    """Keeps a tensor of its last call, as Qwen2-VL keeps its position offsets."""

    offset = None

    def forward(self, x, n):
        self.offset = n + 1
        return x[:, : self.offset[0].item()]


def test_what_a_forward_leaves_on_the_model_is_taken_back():
    model = Remembers().eval()
    export(model, (X, N), {})
    assert "offset" not in vars(model)


class Tables(nn.Module):
    """Keeps tables by their sizes, its own and those of a plain object, as RoPE2D of CroCo and its positions do."""

    def __init__(self):
        super().__init__()
        self.tables, self.getter = {}, type("Positions", (), {})()
        self.getter.positions = {}

    def forward(self, x, n):
        positions = self.getter.positions.setdefault(len(x), torch.arange(len(x)) + 1)
        size = int(positions.max()) + n[0].item()
        if size not in self.tables:
            self.tables[size] = (torch.ones(size), torch.zeros(size))
        return x * self.tables[size][0][0] + positions[:, None]


def test_tables_that_a_forward_keeps_are_taken_back():
    model = Tables().eval()
    program, _ = export(model, (X, N), {})
    assert not model.tables
    assert not model.getter.positions
    assert torch.equal(run(program.module(check_guards=False), X, N), model(X, N))
