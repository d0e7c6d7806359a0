"""Gathers against plain indexing: restricting full tensors to kept tokens, and giving dropped tokens back."""

import pytest
import torch
from torch.fx import GraphModule

from tests.passes.graphs import ascending, rows, run, subset
from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.gather import Gatherer
from tokcompile.passes.graph import Builder, FakeTensorMode, shape
from tokcompile.passes.tokens import Batch, Seq, Space, new_shape, old_shape, plain

N, K, J = 10, 6, 3


class Bench:
    """A graph under construction with two reductions, 10 -> 6 -> 3, whose indices are inputs."""

    def __init__(self, batch, sort=True):
        self.batch = batch
        self.builder = Builder(
            torch.nn.Module(), FakeTensorMode(allow_non_fake_inputs=True, static_shapes=True), torch.device("cpu")
        )
        self.gather = Gatherer(self.builder)
        self.inputs = []
        self.first = subset(batch, N, K, sort, seed=1)
        second = subset(batch, K, J, sort, seed=2)
        self.second = self.first.gather(1, second)
        self.s = Space("s", N, K, None, self.placeholder(self.first))
        self.t = Space("t", K, J, self.s, self.placeholder(second))
        self.kept = {self.s: self.first, self.t: self.second}

    def placeholder(self, value):
        node = self.builder.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = self.builder.mode.from_tensor(value, static_shapes=True)
        self.inputs.append(value)
        return node

    def b(self):
        return (Batch(self.batch),) if self.batch > 1 else ()

    def run(self, node):
        self.builder.graph.output(node)
        return run(GraphModule(self.builder.root, self.builder.graph), *self.inputs)


WANTS = {
    "table": ("B S 5", "N 5"),
    "row-of-a-batch": ("B S 5", "1 N 5"),
    "per-sample": ("B S 5", "B N 5"),
    "mask": ("B 2 S S", "1 1 N N"),
    "mask-per-sample": ("B 2 S S", "B 1 N N"),
    "bias-per-head": ("B 2 S S", "2 N N"),
    "column": ("B S 5", "N 1"),
    "keys-only": ("B 2 S S", "B 1 1 N"),
    "tokens-first": ("S B 5", "N 1 5"),
    "channels-first": ("B 5 S", "5 N"),
    "one-of-both": ("B S 5", "5"),
}
SPACES = {
    "body": lambda bench: Seq((bench.s,)),
    "class-token": lambda bench: Seq((1, bench.s)),
    "suffix": lambda bench: Seq((2, bench.s, 3)),
    "twice": lambda bench: Seq((1, bench.t)),
    "two-runs": lambda bench: Seq((1, bench.s, 2, bench.t)),
}


def label_of(words: str, bench: Bench, seq: Seq):
    atoms = {"S": (seq,), "B": bench.b(), "N": (seq.old,)}
    return tuple(atoms[w] if w in atoms else plain((int(w),))[0] for w in words.split())


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("want", WANTS)
def test_a_full_tensor_is_restricted_to_the_kept_tokens(want, space, batch, order):
    bench = Bench(batch, order == "sorted")
    seq = SPACES[space](bench)
    want, have = WANTS[want]
    label = label_of(want, bench, seq)
    sizes = [{"B": batch, "N": seq.old}.get(w) or int(w) for w in have.split()]
    value = torch.arange(torch.tensor(sizes).prod()).reshape(sizes)
    node = bench.gather.coerce(bench.placeholder(value), plain(sizes), label, None)
    got = bench.run(node)
    full = value.expand(old_shape(label))  # what it stands for: the broadcast tensor, restricted
    assert torch.equal(got.expand(new_shape(label)), rows(full, label, bench.kept))
    for have_size, got_size in zip(sizes, got.shape[-len(sizes) :]):
        assert have_size != 1 or got_size in (1, batch)  # broadcast axes stay so, but for the batch


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("have", ["once", "once-of-two"])
def test_a_reduced_tensor_is_reduced_further(have, batch):
    bench = Bench(batch, sort=False)
    once, twice = Seq((1, bench.s)), Seq((1, bench.t))
    if have == "once-of-two":
        once, twice = Seq((1, bench.s, bench.s)), Seq((1, bench.t, bench.s))
    full = torch.arange(batch * once.old * 5).reshape(batch, once.old, 5)
    start, goal = ((bench.b(), (s,), (5,)) for s in (once, twice))
    value = rows(full, start, bench.kept)
    got = bench.run(bench.gather.coerce(bench.placeholder(value), start, goal, None))
    assert torch.equal(got, rows(full, goal, bench.kept))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("product", ["rows", "heads", "groups", "flat"])
def test_product_axes_are_gathered_inside(product, batch):
    bench = Bench(batch, sort=False)
    seq = Seq((1, bench.s))
    b = Batch(batch) if batch > 1 else batch
    label = {
        "rows": ((b, seq), (5,)),
        "heads": ((b, 2), (seq,), (5,)),
        "groups": (bench.b(), (seq, 4), (5,)),
        "flat": (bench.b(), (seq, 5)),
    }[product]
    label = tuple(tuple(a for a in axis if a != 1) for axis in label)
    full = torch.arange(torch.tensor(old_shape(label)).prod()).reshape(old_shape(label))
    got = bench.run(bench.gather.coerce(bench.placeholder(full), plain(full.shape), label, None))
    assert torch.equal(got, rows(full, label, bench.kept))


def test_what_is_already_right_is_left_alone():
    bench = Bench(3)
    label = (bench.b(), (Seq((1, bench.s)),), (5,))
    value = bench.placeholder(torch.zeros(new_shape(label)))
    assert bench.gather.coerce(value, label, label, None) is value
    scalar = bench.placeholder(torch.zeros(5))
    assert bench.gather.coerce(scalar, plain((5,)), label, None) is scalar
    column = bench.placeholder(torch.zeros(1, 5))
    assert bench.gather.coerce(column, plain((1, 5)), label, None) is column


def test_index_tensors_are_built_once():
    bench = Bench(3)
    seq = Seq((1, bench.s, 2))
    assert bench.gather.index(13, seq) is bench.gather.index(13, seq)
    table = bench.placeholder(torch.zeros(13, 5))
    label = (bench.b(), (seq,), (5,))
    for _ in range(2):
        bench.gather.coerce(table, plain((13, 5)), label, None)
    cats = [n for n in bench.builder.graph.nodes if n.target is torch.ops.aten.cat.default]
    assert len(cats) == 1


def test_one_image_needs_no_batched_gather():
    """Batch 1 is a plain index_select, which exports to one ONNX Gather."""
    bench = Bench(1)
    table = bench.placeholder(torch.zeros(11, 5))
    bench.gather.coerce(table, plain((11, 5)), ((Seq((1, bench.s)),), (5,)), None)
    calls = [str(n.target) for n in bench.builder.graph.nodes if n.op == "call_function"]
    assert calls[-1] == "aten.index_select.default"
    assert not any("permute" in c or "gather" in c for c in calls)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("space", SPACES)
def test_index_within_a_full_axis(space, batch):
    bench = Bench(batch, sort=False)
    seq = SPACES[space](bench)
    got = bench.run(bench.gather.index(seq.old, seq))
    positions = torch.arange(seq.old).expand(batch, -1)[:, :, None]
    label = (bench.b(), (seq,), ())
    assert torch.equal(got, rows(positions.reshape(old_shape(label)), label, bench.kept).reshape(batch, -1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stage", ["once", "twice", "two-runs"])
def test_recovery_gives_every_token_its_representative(stage, batch):
    bench = Bench(batch, sort=False)
    draw = torch.Generator().manual_seed(3)
    to_s = torch.randint(K, (batch, N), generator=draw)
    to_t = torch.randint(J, (batch, K), generator=draw)
    first, second = bench.placeholder(to_s), bench.placeholder(to_t)
    bench.s.assign, bench.t.assign = (lambda: first), (lambda: second)
    seq = {"once": Seq((1, bench.s)), "twice": Seq((1, bench.t, 2)), "two-runs": Seq((bench.s, 1, bench.t))}[stage]
    label = (bench.b(), (2,), (seq,), (5,))
    value = torch.randn(batch, 2, seq.new, 5)
    got = bench.run(bench.gather.recover(bench.placeholder(value.reshape(new_shape(label))), label, None))
    got = got.reshape(batch, 2, seq.old, 5)
    for b in range(batch):
        old, new = 0, 0
        for part in seq.parts:
            slots = {bench.s: to_s[b], bench.t: to_t[b][to_s[b]]}.get(part)
            slots = torch.arange(part) if slots is None else slots
            assert torch.equal(got[b, :, old : old + len(slots)], value[b, :, new + slots])
            old, new = old + len(slots), new + (part if isinstance(part, int) else part.k)


@pytest.mark.parametrize("batch", [1, 3])
def test_sizes_are_one_for_plain_tokens(batch):
    bench = Bench(batch)
    sizes = torch.rand(batch, K)
    bench.s.size = bench.placeholder(sizes)
    got = bench.run(bench.gather.sizes(Seq((1, bench.s, 2))))
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.cat([torch.ones(batch, 1), sizes, torch.ones(batch, 2)], 1))


@pytest.mark.parametrize(("have", "message"), [
    ((9, 5), "an axis of 9 meets a token axis of 11"),
    ((12, 5), "an axis of 12 meets a token axis of 11"),
], ids=["shorter", "longer"])  # fmt: skip
def test_other_lengths_do_not_meet(have, message):
    bench = Bench(1)
    value = bench.placeholder(torch.zeros(have))
    with pytest.raises(UnsupportedGraph, match=message):
        bench.gather.coerce(value, plain(have), ((Seq((1, bench.s)),), (5,)), None)


def test_unrelated_reductions_do_not_meet():
    bench = Bench(1)
    other = Space("u", N, 4, None, bench.placeholder(torch.zeros(1, 4, dtype=torch.int64)))
    value = bench.placeholder(torch.zeros(4, 5))
    with pytest.raises(UnsupportedGraph, match=r"tokens of two unrelated reductions meet: u:10->4 and s:10->6"):
        bench.gather.coerce(value, ((Seq((other,)),), (5,)), ((Seq((bench.s,)),), (5,)), None)


def test_axes_cut_in_other_places_do_not_meet():
    bench = Bench(1)
    value = bench.placeholder(torch.zeros(7, 5))
    with pytest.raises(UnsupportedGraph, match=r"token axes that are cut differently meet: Seq\(s:10->6 \+ 1\) and"):
        bench.gather.coerce(value, ((Seq((bench.s, 1)),), (5,)), ((Seq((1, bench.s)),), (5,)), None)


def test_a_lost_batch_is_an_error():
    bench = Bench(3)
    value = bench.placeholder(torch.zeros(4, 11))
    with pytest.raises(UnsupportedGraph, match="each sample keeps other tokens, but here the batch is no longer to be seen"):
        bench.gather.coerce(value, plain((4, 11)), ((4,), (Seq((1, bench.s)),)), None)


def test_constants_are_shared_by_value():
    bench = Bench(3)
    assert bench.gather.arange(0, 4, 3) is bench.gather.arange(0, 4, 3)
    assert bench.gather.arange(0, 4, 3) is not bench.gather.arange(1, 5, 3)
    assert shape(bench.gather.arange(0, 4, 3)) == (3, 4)
    assert ascending(bench.first)
