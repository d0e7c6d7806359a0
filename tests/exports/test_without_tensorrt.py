"""Without TensorRT, TensorRT-RTX or Torch-TensorRT: what is said, trtexec in their place, what a plugin would be given."""

import os

import pytest

from tests.exports.engines import FUSED, language, vit
from tokcompile.errors import EngineError
from tokcompile.exports import tensorrt_api, tensorrt_rtx
from tokcompile.passes.reduction import ReductionModule
from tokcompile.plugins import torch_ops


@pytest.fixture
def no_tensorrt(monkeypatch):
    monkeypatch.setattr(tensorrt_api, "version", lambda: None)
    monkeypatch.setattr(tensorrt_api, "USUAL_PLACES", ())
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize(("target", "file"), [(None, "model.onnx"), ("jetpack6", "model.plain.onnx")])
def test_without_tensorrt_the_commands_are_said(target, file, no_tensorrt, tmp_path):
    with pytest.raises(EngineError, match="TensorRT is not installed here") as caught:
        vit("random").build_engine(tmp_path / "m.engine", target=target, verify=False)
    assert f"trtexec --onnx={file} --stronglyTyped" in str(caught.value)
    assert 'opt.export_onnx("model.onnx", target=' in str(caught.value)
    assert os.listdir(tmp_path) == []


TRTEXEC = """#!/bin/sh
for a in "$@"; do case $a in --saveEngine=*) file=${a#*=};; esac; done
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v101300] # $*"
echo "[W] a warning"
if [ -n "$FAIL" ]; then echo "[E] no such luck" >&2; exit 1; fi
echo engine > "$file"
"""


def test_trtexec_is_used_where_there_is_no_python_package(no_tensorrt, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "trtexec").write_text(TRTEXEC)
    (tmp_path / "bin" / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    report = vit("random").build_engine(tmp_path / "m.engine", verify=False)
    assert (tmp_path / "m.engine").read_text() == "engine\n"
    assert report.version == "101300 (trtexec)"
    assert (report.layers, report.warnings) == (None, ["[W] a warning"])
    assert "token counts unchecked" in report.note
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(EngineError, match=r"trtexec ended with code 1: .*--saveEngine=.*\n  log: \[E\] no such luck"):
        vit("random").build_engine(tmp_path / "m2.engine", verify=False)
    assert sorted(os.listdir(tmp_path)) == ["bin", "m.engine"]


def test_without_rtx_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt_rtx, "version", lambda: None)
    with pytest.raises(EngineError, match=r'TensorRT-RTX is not installed\n  what to do: pip install "tokcompile\[rtx\]"'):
        vit("random").build_engine(tmp_path / "m.engine", backend="tensorrt_rtx", verify=False)


@pytest.mark.parametrize("method", FUSED)
def test_torch_tensorrt_would_give_a_plugin_the_attributes_of_its_node(method):
    """As far as it goes without Torch-TensorRT: what the plugin library reads is the same as from an ONNX file."""
    from tokcompile.exports.torch_tensorrt import describe
    from tokcompile.plugins.contract import reduction_node

    module = next(m for m in vit(method).graph_module.modules() if isinstance(m, ReductionModule))
    kernel = torch_ops.KERNELS[module.kernel.name]
    use = module.kernel
    name, got = describe(use.name, use.place, use.numbers, use.text, False)
    outputs = ("x", "index", *(["size"] if kernel.merges else []))
    want = reduction_node(module, outputs).attributes
    same = ["n", "k", "unit", "start", "tap_start", "prefix", "outputs", "option_pivots", "option_alpha"]
    same += ["inputs"] * (module.names == kernel.taps)  # an attention row of another name is as good
    assert {key: got[key] for key in same if key in want} == {key: want[key] for key in same if key in want}
    by_score = {"topk": False, "fastervlm": False, "fopru": False, "evit": True}
    assert (name, got.get("option_fuse")) == (("evit", by_score[method]) if method in by_score else (method, None))


def test_torch_tensorrt_would_give_dart_its_text():
    from tokcompile.exports.torch_tensorrt import describe

    module = next(m for m in language("dart").graph_module.modules() if isinstance(m, ReductionModule))
    use = module.kernel
    _, got = describe(use.name, use.place, use.numbers, use.text, False)
    assert got["text"] == [30, 41, 70, 80]
    assert got["option_text_pivots"] == 4


def test_without_torch_tensorrt():
    from tokcompile.exports.torch_tensorrt import register

    with pytest.raises(EngineError, match=r"Torch-TensorRT is missing .*\n.*pip install torch-tensorrt"):
        register("lib.so")
