"""The faster forms are the same function, and are found where they should be."""

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tokcompile.exports.onnx import to_onnx
from tokcompile.exports.simplify import RULES, simplify
from tokcompile.exports.targets import TARGETS


class Packed(nn.Module):
    """Attention's projection as timm writes it."""

    def __init__(self, bias):
        super().__init__()
        self.qkv = nn.Linear(12, 36, bias=bias)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return q @ k.transpose(-2, -1) @ v


class Metric(nn.Module):
    """A normalised mean over heads of all tokens but the first."""

    def forward(self, x):
        mean = x.reshape(2, 3, 5, 4)[:, :, 1:].mean(1)
        unit = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp_min(1e-12)
        return unit


class Sized(nn.Module):
    """Attention with a bias on the keys, as sizes of tokens give it."""

    def __init__(self, n, heads, per_head=False):
        super().__init__()
        self.n, self.heads, self.per_head = n, heads, per_head
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, 12 // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = x[..., : self.heads].permute(0, 2, 1)[:, :, None] if self.per_head else x[:, None, None, :, 0]
        return nn.functional.scaled_dot_product_attention(q, k, v, bias + v.sum() * 0)  # after q and k


class Keys(nn.Module):
    """The mean of keys over heads, and what else is read with the heads first."""

    def __init__(self, rotary=False):
        super().__init__()
        self.rotary = rotary

    def forward(self, x):
        k = x.reshape(*x.shape[:2], 3, 4).transpose(1, 2)
        k = k * k.flip(-1) if self.rotary else k
        return k.mean(1), k @ k.transpose(-2, -1)


class Pairs(nn.Module):
    """Even and odd ones of all tokens but the first, normalised."""

    def forward(self, x):
        unit = x[:, 1:] / torch.linalg.vector_norm(x[:, 1:], dim=-1, keepdim=True).clamp_min(1e-12)
        return unit[:, 1::2], unit[:, ::2]


class Indices(nn.Module):
    """Places in a whole sequence, from ranks among its even tokens, and sums in a row."""

    def forward(self, x):
        best, first = x.topk(3).indices, x.argmax(-1)
        body = torch.cat([best * 2 + 1, torch.arange(3).expand(*x.shape[:2], 3) * 2], 2)
        whole = torch.cat([torch.zeros(*x.shape[:2], 1, dtype=torch.int64), body + 4], 2)
        return whole, first + 3 + 4, best + 7


class Masked(nn.Module):
    """Causal attention of which no query sees the first `hidden` keys, nor, where told, those whose first entry is negative."""

    def __init__(self, hidden=0, given=False):
        super().__init__()
        self.given = given
        places = torch.arange(5)
        self.register_buffer("mask", (places <= places[:, None]) & (places >= hidden))

    def forward(self, x):
        q = x.reshape(*x.shape[:2], 3, 4).transpose(1, 2)
        mask = self.mask & (x[:, None, None, :, 0] > 0) if self.given else self.mask
        return nn.functional.scaled_dot_product_attention(q, q, q * 2, mask)


CASES = {
    "hidden_rows": (Masked(), {"IsNaN": (1, 0), "Where": (1, 0)}),
    "hidden_rows with queries that see nothing": (Masked(hidden=2), {"IsNaN": (1, 0), "Where": (1, 1)}),
    "hidden_rows of a given mask": (Masked(given=True), {"IsNaN": (1, 0), "Where": (2, 2)}),
    "split_qkv": (Packed(True), {"MatMul": (3, 5)}),
    "split_qkv without bias": (Packed(False), {"MatMul": (3, 5)}),
    "slice_last": (Metric(), {"ReduceMean": (1, 1)}),
    "head_mean": (Keys(), {"ReduceMean": (1, 0), "Split": (0, 1), "Mean": (0, 1)}),
    "head_mean of rotary keys": (Keys(rotary=True), {"ReduceMean": (1, 1), "Mean": (0, 0)}),
    "lp_norm": (Metric(), {"LpNormalization": (0, 1), "Div": (1, 0)}),
    "lp_norm slice_last": (Pairs(), {"LpNormalization": (0, 1), "Slice": (3, 2)}),
    "look_up": (Indices(), {"Mul": (1, 0), "Add": (5, 2), "Gather": (0, 1), "Concat": (2, 1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_rules(case):
    module, counts = CASES[case]
    before, after, _ = rewritten(module, torch.randn(2, 5, 12), *(word for word in case.split() if word in RULES))
    assert {op: (before.count(op), after.count(op)) for op in counts} == counts


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("n", [128, 131])
def test_a_bias_on_the_keys_becomes_a_channel(batch, n):
    before, after, model = rewritten(Sized(n, 3), torch.randn(batch, n, 12), *TARGETS["onnxruntime"].rules)
    assert (before.count("Add"), after.count("Add")) == (3, 4)  # biases of q, k and v and the one above, none on the scores
    # with a batch k is transposed first, and gets its channel as a row
    joined = [node for node in model.graph if node.op_type == "Concat" and 4 + 1 in node.outputs[0].shape]
    axes = {node.attributes["axis"].as_int() - len(node.outputs[0].shape) for node in joined}
    assert axes == ({-1} if batch == 1 else {-1, -2})
    assert [list(node.inputs[0].shape)[-1] for node in model.graph if node.op_type == "Softmax"] == [n]


@pytest.mark.parametrize("module", [Sized(100, 3), Sized(128, 3, per_head=True)])
def test_other_biases_are_added(module):
    """To few scores, or another one for every head."""
    _, after, _ = rewritten(module, torch.randn(1, module.n, 12), *TARGETS["onnxruntime"].rules)
    assert after.count("Add") == 5


def rewritten(module, x, *rules):
    """(ops before, ops after, the model), after a run that gives what torch gives."""
    program = torch.export.export(module.eval(), (x,))
    model = to_onnx(program.module(check_guards=False), [x], 20)
    before = [node.op_type for node in model.graph]
    simplify(model, rules)
    after = [node.op_type for node in model.graph]
    got = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x.numpy()})
    for value, want in zip(got, tree_leaves(module(x)), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), want, rtol=0, atol=1e-5)
    return before, after, model


def test_a_slice_of_the_mean_is_taken_after_it():
    program = torch.export.export(Metric(), (torch.randn(2, 5, 12),))
    model = to_onnx(program.module(check_guards=False), [torch.randn(2, 5, 12)], 20)
    simplify(model, ("slice_last",))
    ops = [node.op_type for node in model.graph]
    assert ops.index("ReduceMean") < ops.index("Slice")


class Named(nn.Module):
    """Gives the input its name."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Block(nn.Module):
    """A block whose keys are also read by another op, and a selection of its tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 4)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + torch.cat([y[:, :1], nn.functional.gelu(y[:, 1:])], 1)
        index = (k.cumsum(2).mean(1).amax(-1) + k.abs().sum((1, 3))).topk(2).indices
        return self.head(x), index, x.index_select(1, index[0])


def test_a_batch_of_one_is_dropped():
    rules = ("split_qkv", "drop_batch", "reshape_once")
    _, with_batch, _ = rewritten(Block(), torch.randn(2, 5, 12), *rules)
    _, ops, model = rewritten(Block(), torch.randn(1, 5, 12), *rules)
    ranks = {op: {len(node.inputs[0].shape) for node in model.graph if node.op_type == op} for op in ops}
    assert ranks["LayerNormalization"] == ranks["Gelu"] == ranks["Gather"] == {2}
    assert ranks["Softmax"] == {3}
    assert ranks["MatMul"] == {2, 3}
    assert ranks["ReduceSum"] == {3}
    assert ranks["TopK"] == {1}
    assert ranks["CumSum"] == {4}  # an op that is not known stays as it is
    assert sorted(ops) != sorted(with_batch)
    assert [list(v.shape) for v in model.graph.outputs] == [[1, 5, 4], [1, 2], [1, 2, 12]]


def test_images_of_a_batch_of_one_keep_it():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Sigmoid())
    before, after, _ = rewritten(Named(module), torch.randn(1, 3, 8, 8), "drop_batch")
    assert before == after


def test_few_tokens_are_taken_first():
    class Few(nn.Module):
        def forward(self, x):
            return x[:, :2] / torch.linalg.vector_norm(x[:, :2], dim=-1, keepdim=True).clamp_min(1e-12)

    _, after, _ = rewritten(Few(), torch.randn(2, 5, 12), "lp_norm", "slice_last")
    assert after == ["Slice", "LpNormalization"]


def test_only_the_last_of_two_reshapes_is_left():
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20})
    value = x
    for i, shape in enumerate(([6], [3, 2], [3, 2], [2, 3])):
        to = ir.Value(name=f"to_{i}", const_value=ir.tensor(shape, name=f"to_{i}"))
        graph.register_initializer(to)
        graph.append(ir.Node("", "Reshape", [value, to]))
        value = graph[-1].outputs[0]
        value.shape, value.name = ir.Shape(shape), f"v{i}"
    graph.append(ir.Node("", "Relu", [value]))
    graph.outputs.append(graph[-1].outputs[0])
    simplify(ir.Model(graph, ir_version=10), ("reshape_once",))
    assert [node.op_type for node in graph] == ["Relu"]
    assert graph[0].inputs[0] is x


def test_rules_leave_other_graphs_alone():
    x = torch.randn(2, 4)
    model = to_onnx(torch.export.export(nn.Linear(4, 4), (x,)).module(check_guards=False), [x], 20)
    assert {name: rule(model.graph) for name, rule in RULES.items()} == dict.fromkeys(RULES, 0)
