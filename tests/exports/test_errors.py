"""Refusals: each says what is wrong and what to do, and leaves no file behind."""

import builtins
import os

import onnx_ir as ir
import pytest
import torch

from tests.exports.models import tiny
from tokcompile.errors import ExportError
from tokcompile.exports.targets import TARGETS
from tokcompile.exports.verify import refuse_forbidden
from tokcompile.passes.faithful import relative_error


@pytest.fixture(scope="module")
def opt():
    return tiny(method="random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensort"}, "unknown target 'tensort'; did you mean tensorrt"),
        ({"target": "qnn!"}, "there are onnxruntime, tensorrt"),
        ({"opset": 11}, "opset=11 cannot be written: it is 18 to"),
        ({"opset": 99}, "opset=99 cannot be written"),
        ({"opset": True}, "opset=True"),
        ({"tolerance": 0.0, "external_data": True}, "verification failed"),
    ],
)
def test_options(opt, options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        opt.export_onnx(tmp_path / "m.onnx", **options)
    assert os.listdir(tmp_path) == []


def test_a_failed_export_leaves_the_file_that_was_there(opt, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"before")
    with pytest.raises(ExportError, match=r"verification failed: output .* more than the tolerance 0e"):
        opt.export_onnx(tmp_path / "m.onnx", tolerance=0.0)
    assert (tmp_path / "m.onnx").read_bytes() == b"before"


def test_unwritable_places(opt, tmp_path):
    with pytest.raises(ExportError, match="cannot write"):
        opt.export_onnx(tmp_path / "missing" / "m.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        opt.export_onnx(tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(opt, package, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ExportError, match=r'pip install "tokcompile\[onnx\]"'):
        opt.export_onnx(tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def one_node(op_type: str, attributes: list[ir.Attr], k: int | None = None) -> ir.Model:
    """A model of one node, with K as a constant."""
    x = ir.Value(name="x")
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="g")
    inputs = [x]
    if k is not None:
        value = ir.Value(name="k", const_value=ir.tensor([k], name="k"))
        graph.register_initializer(value)
        inputs.append(value)
    graph.append(ir.Node("", op_type, inputs, attributes, name="culprit"))
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("target", "op_type", "attributes", "k", "message"),
    [
        ("onnxruntime", "NonZero", [], None, "node 'culprit' is NonZero"),
        ("tensorrt", "Loop", [], None, "node 'culprit' is Loop, which tensorrt does not take"),
        ("tensorrt", "ScatterND", [ir.AttrString("reduction", "add")], None, "is ScatterND with reduction add"),
        (
            "tensorrt_rtx",
            "TopK",
            [],
            3841,
            "node 'culprit' selects the top 3841 tokens, but tensorrt_rtx stops at 3840",
        ),
    ],
)
def test_forbidden_ops(target, op_type, attributes, k, message):
    with pytest.raises(ExportError, match=message):
        refuse_forbidden(one_node(op_type, attributes, k), TARGETS[target])


def test_allowed_ops():
    assert refuse_forbidden(one_node("TopK", [], 3840), TARGETS["tensorrt"]) is None
    assert refuse_forbidden(one_node("TopK", [], 4000), TARGETS["onnxruntime"]) is None
    assert refuse_forbidden(one_node("ScatterND", [ir.AttrString("reduction", "none")]), TARGETS["tensorrt"]) is None


def test_relative_error():
    a = torch.tensor([1.0, -4.0, float("inf"), float("nan")])
    assert relative_error(a, a) == 0
    assert relative_error(a + 0.4, a) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.tensor([1]), torch.tensor([2])) == float("inf")


def test_what_stands_for_infinity_is_not_the_largest():
    """Logits of tokens that a model never says are the smallest number there is."""
    lowest = torch.finfo(torch.float32).min
    a = torch.tensor([lowest, float("-inf"), float("nan"), 2.0, 1.0])
    assert relative_error(a, a) == 0
    assert relative_error(a + torch.tensor([0, 0, 0, 1.0, 0]), a) == pytest.approx(0.5)
    assert relative_error(a.flip(0), a) == float("inf")
    assert relative_error(a[:1], a[3:4]) == float("inf")
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1.0, 2.0])) == 0
    small = torch.tensor([torch.finfo(torch.float16).min, 1.0])  # a number like others in float32
    assert relative_error(small.half(), small) == 0
