"""fp16 and bf16: the converted program is close to the original, half where it should be, and called like it."""

import onnx
import pytest
import torch
from torch import nn

import tokcompile
from tests.exports.models import run, session, tiny
from tests.tiny import WIDTH
from tests.tiny import tiny as tiny_with
from tokcompile.errors import ExportError
from tokcompile.exports.precision import FLOAT32, convert, finite
from tokcompile.passes.graph import packet

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# difference to float32 over the largest value; of dense outputs for most tokens, as near ties fall the other way for some
TOLERANCES = {"fp16": 5e-3, "bf16": 5e-2}


def error(a, b):
    return float((a - b).abs().max() / b.abs().max())


# with keys of eight bits, tome and pitome pair many of these random tokens otherwise in bf16
@pytest.mark.parametrize(
    ("method", "precision"),
    [*((m, "fp16") for m in ("tome", "dart", "pitome", "divprune")), *((m, "bf16") for m in ("dart", "divprune", "random"))],
)
def test_close_to_float32(method, precision):
    opt = tiny(method=method)
    half = convert(opt, precision)
    with torch.no_grad():
        want, got = opt(*opt.example_inputs), half(*opt.example_inputs)
    assert got.dtype == want.dtype == torch.float32
    rows = (got - want).abs().amax(-1) / want.abs().max()
    assert 0 < rows.quantile(0.8) < TOLERANCES[precision]


@pytest.mark.parametrize("precision", HALF)
def test_what_is_half_and_what_is_not(precision):
    gm = convert(tiny(method="tome"), precision).graph_module
    dtypes = {name: set() for name in ("aten.linear", "aten.layer_norm", "aten.scaled_dot_product_attention", "call_module")}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if packet(node) in dtypes:
            dtypes[packet(node)].add((value[0] if isinstance(value, tuple) else value).dtype)
        if packet(node) in FLOAT32:
            assert all(n.meta["val"].dtype == torch.float32 for n in node.all_input_nodes)
    half = {HALF[precision]}
    assert dtypes["aten.linear"] == dtypes["call_module"] == half
    assert dtypes["aten.layer_norm"] == {torch.float32}
    weights = {node.target: node.meta["val"].dtype for node in gm.graph.nodes if node.op == "get_attr"}
    assert {dtype for name, dtype in weights.items() if name.startswith("_half_")} == half
    assert torch.float32 in weights.values()  # of the norms


def test_sizes_stay_float32_and_indices_integers():
    opt = tiny(method="tome", outputs="reduced")
    half = convert(opt, "fp16")
    with torch.no_grad():
        want, got = opt(*opt.example_inputs), half(*opt.example_inputs)
    for name, value in want.kept.items():
        assert got.kept[name].dtype == value.dtype


def test_the_original_is_left_alone():
    opt = tiny(method="dart")
    with torch.no_grad():
        before = opt(*opt.example_inputs)
        convert(opt, "fp16")
        assert torch.equal(opt(*opt.example_inputs), before)
    assert not [name for name in opt.graph_module.state_dict() if name.startswith("_half_")]
    assert convert(opt, "fp32") is opt
    assert convert(opt, None) is opt


class Masked(nn.Module):
    """Adds float32's lowest value where attention is not allowed, as many models do."""

    def forward(self, x):
        n = x.shape[1]
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(n - 1)
        scores = x @ x.transpose(1, 2) + mask
        scores = scores.masked_fill(torch.ones(n, n).triu(n - 1).bool(), -1e30)
        return scores.softmax(-1) @ x


class Normalised(nn.Module):
    """A norm by root mean square, in its own ops."""

    def forward(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()


@pytest.mark.parametrize("precision", HALF)
def test_numbers_beyond_half_precision_stay_finite(precision):
    opt = tokcompile.optimize(*tiny_with(before=Masked()), method="random", where=[2])
    half = convert(opt, precision)
    x = torch.randn(1, 12, WIDTH)
    with torch.no_grad():
        got, want = half(x), opt(x)
    assert torch.isfinite(got).all()
    assert error(got, want) < TOLERANCES[precision]
    assert finite(-1e30, torch.float16) == -65504
    assert finite(float("-inf"), torch.float16) == float("-inf")
    assert finite(0.5, torch.float16) == 0.5


class Positions(nn.Module):
    """Counts positions, which float16 cannot beyond 2,048, and adds a constant and a mask that are made on the way."""

    def forward(self, x):
        at = (torch.ones(x.shape[1]).long().cumsum(0) + 4000).float()[:, None]
        shown = (x.abs() > 0).to(torch.float32)
        return x + torch.sin(at) * shown + torch.zeros(1, 1, x.shape[2])


def test_integers_become_float32():
    opt = tokcompile.optimize(*tiny_with(before=Positions()), method="random", where=[2])
    half = convert(opt, "fp16")
    with torch.no_grad():
        assert error(half(*opt.example_inputs), opt(*opt.example_inputs)) < TOLERANCES["fp16"]


def test_large_activations_do_not_overflow():
    """The square of 1,000 is no float16."""
    opt = tokcompile.optimize(*tiny_with(before=Normalised()), method="random", where=[2])
    x = 1000 * torch.randn(1, 12, WIDTH)
    with torch.no_grad():
        assert error(convert(opt, "fp16")(x), opt(x)) < TOLERANCES["fp16"]


def test_exported_and_compared_with_the_converted_program(tmp_path):
    opt = tiny(method="tome")
    report = opt.export_onnx(tmp_path / "m.onnx", precision="fp16")
    assert (report.precision, report.tolerance) == ("fp16", 2e-2)
    assert report.error <= report.tolerance
    assert session(tmp_path / "m.onnx").get_inputs()[0].type == "tensor(float)"
    types = {tuple(i.dims): i.data_type for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert types[(32, 96)] == onnx.TensorProto.FLOAT16
    with torch.no_grad():
        want = opt(*opt.example_inputs)
    (got,) = run(tmp_path / "m.onnx", dict(zip(report.inputs, opt.example_inputs, strict=True)))
    assert error(got, want) < TOLERANCES["fp16"]


def test_bfloat16_is_written_and_not_run_by_onnxruntime(tmp_path, monkeypatch):
    opt = tiny(method="random")
    monkeypatch.setattr(type(opt), "save", None)  # another form of the same program needs no file, nor can all be saved
    report = opt.export_onnx(tmp_path / "m.onnx", precision="bf16")
    assert report.error is None
    assert "bfloat16" in report.note


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        (torch.float32, "fp8", "precision='fp8' is none of fp32, fp16, bf16"),
        (torch.float16, "bf16", "this one has float16 weights"),
        (torch.bfloat16, "fp32", "this one has bfloat16 weights"),
    ],
)
def test_refusals(dtype, precision, message):
    with pytest.raises(ExportError, match=message):
        convert(tiny(dtype, method="random"), precision)
