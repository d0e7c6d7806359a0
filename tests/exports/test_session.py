"""Session options: right on the CPU; for the other providers the names of their options, and what is missing here."""

import onnxruntime as ort
import pytest
import torch

import tokcompile
from tests.exports.models import tiny
from tokcompile.errors import ExportError
from tokcompile.exports.session import PROVIDERS, provider_options


@pytest.mark.parametrize("form", ["functions", "plain"])
def test_both_forms_are_right_on_the_cpu(form, tmp_path):
    opt = tiny(method="tome")
    report = opt.export_onnx(tmp_path / "m.onnx", form=form)
    options, providers = tokcompile.session_options("cpu", threads=1)
    assert providers == [("CPUExecutionProvider", {})]
    assert options.intra_op_num_threads == 1
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), options, providers=providers)
    (got,) = session.run(None, {report.inputs[0]: opt.example_inputs[0].numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), opt(*opt.example_inputs), rtol=0, atol=1e-4)


@pytest.fixture
def every_provider(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDERS.values()))


def test_tensorrt_loads_the_plugin_library(every_provider, tmp_path):
    library = tmp_path / "libtokcompile_plugins.so"
    library.write_bytes(b"")
    _, providers = tokcompile.session_options(
        "tensorrt", plugin_library=library, device=1, cache=tmp_path, options={"trt_max_workspace_size": 1}
    )
    assert [name for name, _ in providers] == [PROVIDERS["tensorrt"], PROVIDERS["cuda"], PROVIDERS["cpu"]]
    assert providers[0][1] == {
        "device_id": "1",
        "trt_extra_plugin_lib_paths": str(library),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(tmp_path),
        "trt_max_workspace_size": "1",
    }


def test_cuda_falls_back_to_the_cpu(every_provider):
    _, providers = tokcompile.session_options("cuda")
    assert providers == [(PROVIDERS["cuda"], {"device_id": "0"}), (PROVIDERS["cpu"], {})]
    assert provider_options("rtx", None, 0, "folder") == {"device_id": "0", "nv_runtime_cache_path": "folder"}


@pytest.mark.parametrize(
    ("provider", "options", "message"),
    [
        ("gpu", {}, "provider='gpu' is none of cpu, cuda, tensorrt, rtx"),
        ("tensorrt", {}, "has no TensorrtExecutionProvider, only .*\n.*pip install onnxruntime-gpu"),
        ("rtx", {}, "the RTX provider is missing .*\n.*onnxruntime-ep-nv-tensorrt-rtx-cu13"),
        ("cpu", {"plugin_library": "a.so"}, "cpu loads no TensorRT plugins"),
        ("tensorrt", {"plugin_library": "a.so"}, "'a.so' is not a file"),
    ],
)
def test_refusals(provider, options, message):
    if provider in ("tensorrt", "rtx") and PROVIDERS[provider] in ort.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(ExportError, match=message):
        tokcompile.session_options(provider, **options)
