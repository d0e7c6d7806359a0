"""The program that goes to torch.onnx, made of the graph that is there already."""

from collections import Counter

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import assert_equal, build
from tokcompile.errors import ExportError
from tokcompile.exports.flat import flatten
from tokcompile.exports.onnx import linear_rules, to_onnx
from tokcompile.exports.program import exported
from tokcompile.passes.graph import aten, propagate_shapes
from tokcompile.primitives.forms import FORMS, use_forms


@pytest.fixture
def flat():
    model, args, kwargs = build("timm/vit")
    return flatten(tokcompile.optimize(model, args, kwargs, method="tome", budget=0.5))


def inputs(flat):
    return [*flat.inputs, *(torch.rand(v.shape).to(v.dtype) for r in flat.reductions for v in r.inputs)]


def ops(model):
    return Counter(node.op_type for graph in (model.graph, *model.functions.values()) for node in graph)


def test_the_same_nodes_as_torch_gives_that_traces_it_again(flat):
    names = [n.name for n in flat.gm.graph.find_nodes(op="placeholder")]
    with use_forms(FORMS["onnxruntime"]), linear_rules(), torch.no_grad():
        ours = to_onnx(flat.gm, inputs(flat), 20)
        theirs = torch.onnx.export(
            flat.gm, tuple(inputs(flat)), dynamo=True, opset_version=20, input_names=names, verbose=False
        )
    assert ops(ours) == ops(theirs.model)
    assert sum(ops(ours).values()) > 50


class Tied(nn.Module):
    """One weight under two names, a table that is no parameter, and a tensor that is made where it is used."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.rand(4), persistent=False)

    def forward(self, x):
        return self.b(self.a(x) * self.table) + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Tied()

    def forward(self, x):
        return self.inner(x), aten.add.Tensor(x, aten.sum.default(self.inner.a.weight))


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, Tied)


def test_modules_are_traced_and_each_tensor_is_one_input():
    model, x = Called(), torch.rand(2, 4)
    gm = torch.fx.GraphModule(model, Leaves().trace(model))
    propagate_shapes(gm, [x])
    program = exported(gm, [x])
    assert_equal(program.module()(x), model(x))
    assert len(program.graph_signature.parameters) == 3
    assert len(program.graph_signature.buffers) == 2
    program.run_decompositions({aten.sum.default: lambda x: (x * torch.tensor([2.0, 3.0, 4.0, 5.0])).amax()})
    assert len(program.graph_signature.buffers) == 3
    assert_equal(program.module()(x), [model.inner(x), x + (model.inner.a.weight * torch.arange(2, 6)).amax()])


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        x = self.encoder(x).mean(1)
        return torch.cond(x.square().sum() > 1, lambda x: x + 1, lambda x: x - 1, (x,))


def test_a_model_that_chooses_what_it_runs_is_refused(tmp_path):
    opt = tokcompile.optimize(Chooses().eval(), (torch.rand(1, 12, 16),), method="random", budget=0.5)
    with pytest.raises(ExportError, match=r"chooses what it runs[\s\S]*node: cond = cond"):
        opt.export_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
