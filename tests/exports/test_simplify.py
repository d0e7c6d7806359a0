"""The faster forms are the same function, and are found where they should be."""

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from tokcompile.exports.onnx import to_onnx
from tokcompile.exports.simplify import RULES, simplify


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


CASES = {
    "split_qkv": (Packed(True), {"MatMul": (3, 5)}),
    "split_qkv without bias": (Packed(False), {"MatMul": (3, 5)}),
    "mean_first": (Metric(), {"ReduceMean": (1, 1)}),
    "lp_norm": (Metric(), {"LpNormalization": (0, 1), "Div": (1, 0)}),
}


@pytest.mark.parametrize("case", CASES)
def test_rules(case):
    module, counts = CASES[case]
    x = torch.randn(2, 5, 12)
    program = torch.export.export(module.eval(), (x,))
    model = to_onnx(program.module(check_guards=False), [x], 20)
    before = [node.op_type for node in model.graph]
    simplify(model, (case.split()[0],))
    after = [node.op_type for node in model.graph]
    assert {op: (before.count(op), after.count(op)) for op in counts} == counts
    (got,) = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), module(x), rtol=0, atol=1e-5)


def test_a_slice_of_the_mean_is_taken_after_it():
    program = torch.export.export(Metric(), (torch.randn(2, 5, 12),))
    model = to_onnx(program.module(check_guards=False), [torch.randn(2, 5, 12)], 20)
    simplify(model, ("mean_first",))
    ops = [node.op_type for node in model.graph]
    assert ops.index("ReduceMean") < ops.index("Slice")


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
