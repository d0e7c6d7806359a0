"""Engines, built by TensorRT-RTX on the CPU: every method, both forms, precisions, a free batch, and what is refused.

Nothing is run here: that takes a GPU.
"""

import functools
import json
import os
import shutil

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import tokcompile
from tests.command_line import ROOT, TINY, Vit
from tests.exports.engines import FUSED, language, vit
from tests.exports.models import attributes, reductions
from tests.tiny import WIDTH, Tiny, optimize
from tokcompile.cli import main
from tokcompile.errors import EngineError, ExportError
from tokcompile.exports import process, tensorrt_rtx
from tokcompile.exports.batch import free_batch
from tokcompile.exports.network import check_network
from tokcompile.plugins import build

needs_rtx = pytest.mark.skipif(tensorrt_rtx.version() is None, reason=f"TensorRT-RTX is not here: {tensorrt_rtx.INSTALL}")
IN_LANGUAGE = ("dart", "fastv", "pyramiddrop")
OPTIONS = {"evs": {"frames": 7}}
NOT_FREE = ("random",)  # whose batch cannot be free
METHODS = sorted(tokcompile.methods())
BUILT = ("dart", "topk")  # without plugins, in half precision; the others with -m matrix


@pytest.fixture(scope="module")
def library():
    """The plugin library: for GPUs where there is an nvcc, else the same plugins over kernels for the CPU."""
    try:
        preset, folder = ("x86", "build/plugins") if shutil.which("nvcc") else ("host", "build/tests/plugins-plain")
        return build.build(preset, ROOT / folder)
    except ExportError as error:
        pytest.skip(f"no plugin library: {error}")


def check(report, opt, path, plugins=0):
    """What every engine has: the planned token counts, the inputs and outputs of the model, and its file."""
    assert report.bytes == os.path.getsize(path) > 0
    assert [(t["block"], t["n"], t["k"]) for t in report.tokens] == [(r.block, r.n, r.k) for r in opt.plan.reductions]
    assert [t["length"] for t in report.tokens] == [1 + r.k for r in opt.plan.reductions]
    assert report.plugin_layers == plugins < report.layers
    assert [(v["name"], v["dtype"]) for v in report.inputs] == [(opt.input_names[0], "float")]
    assert [v["dtype"] for v in report.outputs] == ["float"]
    assert report.version.startswith(tensorrt_rtx.VERSION)


@needs_rtx
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        *((method, "fp16") for method in BUILT),
        ("tome", "fp32"),
        *(pytest.param(method, "fp16", marks=pytest.mark.matrix) for method in METHODS if method not in BUILT),
    ],
)
def test_plain_form(method, precision, tmp_path):
    opt, path = vit(method), tmp_path / "m.engine"
    report = opt.build_engine(path, backend="tensorrt_rtx", precision=precision)
    check(report, opt, path)
    assert report.compute_capabilities == ["SM80", "SM86", "SM89", "SM120"]
    assert 0 < report.onnx_error <= {"fp32": 1e-4, "fp16": 2e-2}[precision]


@needs_rtx
def test_bfloat16_and_one_device(tmp_path):
    opt, path = vit("tome"), tmp_path / "m.engine"
    report = opt.build_engine(path, backend="tensorrt_rtx", precision="bf16", compute_capabilities=["SM89"])
    check(report, opt, path)
    assert report.onnx_error is None
    assert "bfloat16" in report.note


@pytest.mark.every(2)
@needs_rtx
@pytest.mark.parametrize("method", FUSED)
def test_plugin_form(method, library, tmp_path):
    opt, path = vit(method), tmp_path / "m.engine"
    report = opt.build_engine(path, backend="tensorrt_rtx", precision="fp16", plugin_library=library, verify=False)
    check(report, opt, path, plugins=len(opt.plan.reductions))
    assert report.plugin_library == str(library)


@pytest.mark.every(2)
@needs_rtx
@pytest.mark.parametrize("method", IN_LANGUAGE)
def test_a_language_model_has_one_plugin_layer_for_each_image(method, library, tmp_path):
    """DART's pivots from text among them: the second image's are all after it, the first one's also between the two."""
    opt, path = language(method), tmp_path / "m.engine"
    report = opt.build_engine(path, backend="tensorrt_rtx", precision="bf16", plugin_library=library, verify=False)
    assert [(t["n"], t["k"]) for t in report.tokens] == [(r.n, r.k) for r in opt.plan.reductions]
    first, second = opt.plan.reductions
    assert [t["length"] for t in report.tokens] == [80 - 25 + first.k, 80 - 25 - 29 + first.k + second.k]
    assert report.plugin_layers == 2


def all_of(method: str) -> list[tuple[tokcompile.OptimizedModel, tuple[int, ...] | None]]:
    """A vision tower with one image and with a free batch, and a language model."""
    found: list = [(vit(method), None)]
    if method not in NOT_FREE:
        found.append((vit(method, 2), (1, 4, 8)))
    if method in IN_LANGUAGE:
        found.append((language(method), None))
    return found


@needs_rtx
@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_form_precision_and_batch(method, precision, library, tmp_path):
    """Plain and plugin, static and free batch."""
    for opt, profiles in all_of(method):
        for plugins in (False, True):
            options = {"precision": precision, "plugins": plugins, "plugin_library": library if plugins else None}
            report = opt.build_engine(tmp_path / "m.engine", backend="tensorrt_rtx", profiles=profiles, verify=False, **options)
            assert report.plugin_layers == (plugins and method in (*FUSED, *IN_LANGUAGE)) * len(opt.plan.reductions)
            assert [(t["block"], t["n"], t["k"]) for t in report.tokens] == [(r.block, r.n, r.k) for r in opt.plan.reductions]
            assert report.compute_capabilities == ["SM80", "SM86", "SM89", "SM120"]


@needs_rtx
def test_more_tokens_than_topk_takes(library, tmp_path):
    """TopK ends at K = 3,840: the plain form is refused with the way out, the plugin's engine is built."""
    opt = optimize((Tiny().eval(), (torch.randn(1, 4001, WIDTH),)), method="fastervlm", budget=tokcompile.Tokens(3900))
    path = tmp_path / "m.engine"
    with pytest.raises(ExportError, match=r"node 'reduction_0' selects the top 3900 tokens.*3840\n.*form='plugin'"):
        opt.build_engine(path, backend="tensorrt_rtx", verify=False)
    assert os.listdir(tmp_path) == []
    report = opt.build_engine(path, backend="tensorrt_rtx", plugin_library=library, verify=False)
    assert (report.plugin_layers, report.tokens[0]["k"]) == (1, 3900)


@needs_rtx
def test_methods_without_a_kernel_stay_plain_and_the_report_says_so(library, tmp_path):
    opt, path = vit("grid"), tmp_path / "m.engine"
    report = opt.build_engine(path, backend="tensorrt_rtx", plugin_library=library, verify=False)
    check(report, opt, path)
    assert report.note == "in plain ops, as there is no kernel: grid"


@needs_rtx
@pytest.mark.parametrize(("method", "plugins"), [("tome", False), ("dart", True)])
def test_a_free_batch(method, plugins, library, tmp_path):
    opt, path = vit(method, 2), tmp_path / "m.engine"
    report = opt.build_engine(
        path, backend="tensorrt_rtx", plugins=plugins, plugin_library=library if plugins else None, profiles=(1, 4, 8)
    )
    check(report, opt, path, plugins=len(opt.plan.reductions) if plugins else 0)
    assert report.inputs[0]["shape"] == [-1, 3, 28, 28]
    assert report.outputs[0]["shape"] == [-1, 5]
    assert report.profiles == {opt.input_names[0]: [[1, 3, 28, 28], [4, 3, 28, 28], [8, 3, 28, 28]]}


@pytest.mark.parametrize(
    ("method", "batch", "profiles", "message"),
    [
        ("tome", 1, (1, 4, 8), "share a batch of 2 or more.*\n.*optimize with a batch of 2"),
        ("random", 2, (1, 4, 8), "holds other indices for each sample\n.*once for each batch size"),
        ("tome", 2, (4, 1, 8), r"takes the smallest, best and largest shape, \(batch, 3, 28, 28\)"),
        ("tome", 2, {"image": [(1, 3, 28, 28), (2, 3, 28, 28), (2, 3, 56, 56)]}, "only the batch is free"),
        ("tome", 2, {"x": [(1,), (1,), (1,)]}, r"profiles is for the inputs \['x'\], and the model has \['image'\]"),
    ],
)
def test_refused_profiles(method, batch, profiles, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        vit(method, batch).build_engine(tmp_path / "m.engine", backend="tensorrt_rtx", profiles=profiles)
    assert os.listdir(tmp_path) == []


def test_a_free_batch_leaves_no_constants_behind():
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (float[2,3,4] x) => (float[2,12] y) <int64[2] old = {2, 12}> { y = Reshape(x, old) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    free_batch(model, 2)
    (shape,) = model.graph.initializers.values()
    assert shape.const_value.numpy().tolist() == [-1, 12]


def test_a_free_batch_that_gives_other_numbers_is_refused(tmp_path):
    """A product over the batch: nothing in the graph tells, so the numbers at other batch sizes have to."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = Vit(depth=2)

        def forward(self, image):
            return self.vit(image) + image.mean((0, 1, 2, 3))

    opt = tokcompile.optimize(Mixed().eval(), (torch.randn(2, 3, 28, 28),), method="grid", budget=0.5)
    with pytest.raises(ExportError, match=r"cannot be freed: output .* is off by"):
        opt.export_onnx(tmp_path / "m.onnx", target="tensorrt", form="plain", dynamic_batch=True)


class Quantized(nn.Module):
    """A linear layer with int8 weights and activations, as Q/DQ nodes."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = float(weight.abs().max() / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        ops = torch.ops.quantized_decomposed
        x = ops.quantize_per_tensor(x, 0.05, 0, -128, 127, torch.int8)
        x = ops.dequantize_per_tensor(x, 0.05, 0, -128, 127, torch.int8)
        weight = ops.dequantize_per_tensor(self.weight, self.scale, 0, -128, 127, torch.int8)
        return nn.functional.linear(x, weight, self.bias)


@functools.cache
def quantized() -> tokcompile.OptimizedModel:
    import torch.ao.quantization.fx._decomposed  # registers the ops

    torch.manual_seed(0)
    model = Vit(depth=2)
    for block in model.blocks:
        block.qkv, block.proj = Quantized(block.qkv), Quantized(block.proj)
    return tokcompile.optimize(model.eval(), (torch.randn(1, 3, 28, 28),), method="tome", budget=0.5)


def test_a_quantized_model_keeps_its_nodes(tmp_path):
    report = quantized().export_onnx(tmp_path / "m.onnx", target="tensorrt", form="plain")
    ops = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (4, 8)
    assert report.error <= 1e-4
    with pytest.raises(ExportError, match=r"its Q/DQ nodes say the precisions\n.*precision=None"):
        quantized().export_onnx(tmp_path / "half.onnx", precision="fp16")


@needs_rtx
def test_a_quantized_engine(tmp_path):
    opt, path = quantized(), tmp_path / "m.engine"
    check(opt.build_engine(path, backend="tensorrt_rtx", verify=False), opt, path)


@pytest.fixture(scope="module")
def plugin_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "m.onnx"
    vit("tome").export_onnx(path, target="tensorrt_rtx", form="plugin", verify=False)
    return path


@needs_rtx
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", 60, "Tome .*reduction_0.*attribute k is 60"),
        ("unit", 0, "Tome .*reduction_0.*attribute unit is 0"),
        ("inputs", "x,nothing", "Tome .*reduction_0.*nothing"),
        ("plugin_version", "2", "Plugin not found"),
        ("plugin_namespace", "elsewhere", "Plugin not found"),
    ],
)
def test_a_node_with_wrong_attributes_is_refused(name, value, message, plugin_file, library, tmp_path):
    model = onnx.load(plugin_file)
    node = reductions(model)[0]
    node.domain = "elsewhere" if name == "plugin_namespace" else node.domain
    assert name in attributes(node)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    onnx.save(model, tmp_path / "wrong.onnx")
    spec = {
        "onnx": str(tmp_path / "wrong.onnx"), "engine": str(tmp_path / "m.engine"), "plugins": [str(library)], "profiles": {},
    }  # fmt: skip
    with pytest.raises(EngineError, match=message):
        tensorrt_rtx.build(spec, ["SM86"])


@needs_rtx
def test_a_plugin_node_without_its_library(plugin_file, tmp_path):
    spec = {"onnx": str(plugin_file), "engine": str(tmp_path / "m.engine"), "plugins": [], "profiles": {}}
    with pytest.raises(EngineError, match=r"(?s)Plugin not found.*what to do: load the plugin library"):
        tensorrt_rtx.build(spec, ["SM86"])


@needs_rtx
def test_a_file_that_is_no_library(tmp_path):
    (tmp_path / "lib.so").write_text("no library")
    with pytest.raises(EngineError, match="does not take the plugin library"):
        vit("tome").build_engine(
            tmp_path / "m.engine", backend="tensorrt_rtx", plugin_library=tmp_path / "lib.so", verify=False
        )
    assert os.listdir(tmp_path) == ["lib.so"]


def test_a_builder_that_does_not_live_to_report(monkeypatch, tmp_path):
    script = tmp_path / "builder.py"
    script.write_text("import os, sys\nprint('[error] it was the plugin', file=sys.stderr, flush=True)\nos.abort()\n")
    monkeypatch.setattr(process, "SCRIPT", script)
    with pytest.raises(EngineError, match=r"TensorRT ended by SIGABRT without an engine\n  log: \[error\] it was the plugin"):
        process.run_builder("TensorRT", {}, os.environ)


REDUCTION = {
    "node": "reduction_0",
    "method": "tome",
    "block": 1,
    "n": 50,
    "k": 40,
    "tensor": "r",
    "shape": [1, 41, 8],
    "fused": 1,
}


def layer(shape, kind="PLUGIN_V3", name="reduction_0", tensor="r"):
    return {"type": kind, "name": name, "outputs": [{"name": tensor, "shape": shape, "dtype": "float"}]}


def test_the_network_is_compared_with_the_plan():
    seen = check_network([layer([-1, 41, 8]), layer([1, 5], "SHUFFLE", "s", "s")], [REDUCTION], plugins=True)
    assert (seen.layers, seen.plugin_layers) == (2, 1)
    assert seen.tokens == [{"block": 1, "n": 50, "k": 40, "length": 41}]


@pytest.mark.parametrize(
    ("layers", "plugins", "message"),
    [
        ([layer([1, 42, 8])], True, r"50 -> 40 after block 1 \(reduction_0\) leaves \[1, 42, 8\] in the network"),
        ([layer([2, 41, 8])], True, r"leaves \[2, 41, 8\]"),
        ([layer([1, 41, 8], tensor="other")], True, "is not in the network: no layer gives 'r'"),
        ([layer([1, 41, 8], "GATHER")], True, "has 0 plugin layers in the network, not 1"),
        ([layer([1, 41, 8]), layer([1, 41, 8])], True, "has 2 plugin layers"),
        ([layer([1, 41, 8])], False, "has 1 plugin layers in the network, not 0"),
    ],
)
def test_a_network_that_is_not_as_planned(layers, plugins, message):
    with pytest.raises(EngineError, match=message):
        check_network(layers, [REDUCTION], plugins)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "openvino"}, "backend='openvino' is none of tensorrt, tensorrt_rtx"),
        ({"compute_capabilities": ["SM80"]}, "is for tensorrt_rtx: TensorRT builds for the GPU that it runs on"),
        ({"backend": "tensorrt_rtx", "compute_capabilities": ["SM90"]}, r"\['SM90'\]: TensorRT-RTX builds for SM75"),
        ({"plugin_library": "none.so"}, "plugin_library='none.so' is not a file"),
    ],
)
def test_refused_options(options, message, tmp_path):
    with pytest.raises(EngineError, match=message):
        vit("random").build_engine(tmp_path / "m.engine", **options)
    assert os.listdir(tmp_path) == []


@needs_rtx
def test_the_command_line(tmp_path, capsys):
    engine = tmp_path / "m.engine"
    options = ["--method", "topk", "--backend", "tensorrt_rtx", "--precision", "fp16", "--compute-capability", "SM86"]
    assert main(["build", TINY, "--engine", str(engine), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["path"], report["bytes"]) == (str(engine), os.path.getsize(engine))
    assert report["compute_capabilities"] == ["SM86"]
    assert main(["build", TINY, "--engine", str(engine), "--profile", "1:4"]) == 2
    assert "--profile '1:4' is not MIN:BEST:MAX" in capsys.readouterr().err
