"""The GPU benchmark without a GPU: every path at tiny sizes, so that it is not broken when there is one at last."""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tokcompile
from benchmarks import gpu, gpu_checks, gpu_kernels, gpu_prefill, gpu_profile
from benchmarks.gpu_kernels import EAGER, METHODS, Case
from benchmarks.gpu_session import Session
from tests.plugins.host import host_library
from tests.plugins.stand_in import StandIn, memory
from tokcompile.passes.reduction import ReductionModule
from tokcompile.plugins import torch_ops


@pytest.fixture
def session(tmp_path):
    args = argparse.Namespace(dry_run=True, quick=False, out=tmp_path / "gpu.json")
    return Session(args, "cpu", time.monotonic() + 600, {}, gpu.write)


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("TOKCOMPILE_HOST_KERNELS", str(host_library()))
    kernels = ctypes.CDLL(str(host_library()))
    kernels.tc_host_threads(1)  # test_kernel_builds.py looks for races; here more of them only wait for each other
    torch_ops.library.cache_clear()
    yield
    kernels.tc_host_threads(4)
    torch_ops.library.cache_clear()


@pytest.mark.matrix
@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(tmp_path, host):
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "results.json")]) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert list(data["parts"]) == list(gpu.PARTS)
    assert not [error for part in data["parts"].values() for error in part["errors"] if "trace" in error]
    assert data["parts"]["build"]["rows"][0]["kernels"] == "loaded"
    assert {row["method"] for row in data["parts"]["headline"]["rows"]} == set(METHODS)
    assert {row["method"] for row in data["parts"]["check"]["rows"]} == {*METHODS, "select", "gather", "merge"}
    assert all(row["ok"] for row in data["parts"]["check"]["rows"])
    done = {row["method"] for row in data["parts"]["models"]["rows"]}
    assert done == {"A/A", "dart", "tome", "tome proportional=False", "divprune", "topk", "pitome"}
    assert [row["method"] for row in data["parts"]["prefill"]["rows"]] == ["A/A", "dart", "random"]
    assert {row["text"] for row in data["parts"]["check"]["rows"] if row["method"] == "dart"} == {0, gpu_kernels.TEXT}
    text = (tmp_path / "results.md").read_text()
    assert "no figure here means anything" in text
    assert "equal the reference" in text


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_an_unknown_part_is_refused():
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--parts", "none"])


def test_a_failed_part_is_noted_and_the_others_go_on(session, monkeypatch):
    def broken(session):
        session.add("check", {"ok": True})
        raise RuntimeError("it broke")

    monkeypatch.setitem(gpu.PARTS, "check", broken)
    for part in ("check", "sanitize"):
        gpu.run_part(session, part)
    data = json.loads(session.args.out.read_text())
    assert data["parts"]["check"]["errors"][0]["error"] == "check: RuntimeError: it broke"
    assert data["parts"]["check"]["rows"] == [{"ok": True}]
    assert data["parts"]["sanitize"]["rows"][0]["ok"]
    assert gpu.failed(session)


def test_nothing_is_begun_when_the_time_is_up(session, monkeypatch):
    session.deadline = time.monotonic()
    gpu.run_part(session, "headline")
    assert session.parts["headline"]["rows"] == []
    assert "time was up" in session.parts["headline"]["errors"][0]["error"]
    assert not gpu.failed(session)


def test_a_wrong_kernel_is_found(session, monkeypatch):
    class Wrong(StandIn):
        def write(self, kernel, s, numbers, pointers, text=None):
            index = pointers[4 if kernel.name == "topk" else 0]
            super().write(kernel, s, numbers, pointers, text)
            if kernel.name == "topk":
                found = memory(index, (s.batch, s.k), torch.int64)
                found.copy_(found.flip(1))

    monkeypatch.setattr(torch_ops, "library", lambda device: Wrong())
    gpu_checks.check_case(session, Case("vlm", "topk", 1, 40, 64, 0.5), torch.float32)
    assert not all(row["ok"] for row in session.parts["check"]["rows"])
    assert gpu_checks.sanitized("cpu") == 1


def test_near_ties_are_told_from_errors():
    case = Case("vlm", "topk", 1, 100, 64, 0.5)
    module = case.module()
    x, size, score = case.inputs(torch.float32, "cpu")
    score[:] = torch.arange(100.0) / 100
    score[:, :, 50] = score[:, :, 49] + 1e-6  # the last kept and the first dropped
    got = list(module.reference(x, size, score))
    assert gpu_checks.compare(got, module, (x, size, score))["index"] == "exact"
    got[1] = torch.cat([torch.tensor([[49]]), got[1][:, 1:]], 1)
    near = gpu_checks.compare(got, module, (x, size, score))
    assert (near["index"], near["ok"]) == ("near tie, 0.9800 of the set", True)
    score[:, :, 50] = 0.5
    wrong = gpu_checks.compare(got, module, (x, size, score))
    assert (wrong["index"], wrong["ok"]) == ("wrong, 0.9800 of the set", False)


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_forms_do_what_the_methods_do(method):
    """As sets of rows: the published order is another for some."""
    compare_forms(Case("vlm", method, 2, 40, 64, 0.5))


def test_the_papers_form_with_pivots_from_text():
    compare_forms(Case("llm", "dart", 2, 40, 64, 0.3))


def compare_forms(case):
    given = case.inputs(torch.float32, "cpu")
    got = gpu_kernels.eager(case, given)()
    want = case.module().reference(*given)[0]
    assert got.shape == want.shape
    for a, b in zip(got, want):
        nearest = torch.cdist(a, b).min(1)
        assert nearest.values.max() < 1e-2  # cdist rounds
        assert len(set(nearest.indices.tolist())) == case.k + case.text


def test_every_eager_form_is_there_and_every_case_possible():
    assert set(EAGER) == set(METHODS)
    args = argparse.Namespace(dry_run=False, quick=False)
    full = Session(args, "cuda", 0.0, {}, gpu.write)
    cases = gpu_kernels.headline_cases(full) + gpu_kernels.all_cases(full)
    assert len(cases) == len(set(cases))
    language = {(c.batch, c.length, c.dim) for c in cases if c.kind == "vlm"}
    assert language == {(b, n, d) for b in (1, 8) for n in (576, 2880, 8192) for d in (3584, 4096)}
    for case in cases:
        assert case.module().kernel is not None
        assert case.dim % case.head_dim == 0


def test_targets_count_what_was_measured(session):
    row = {
        "method": "dart",
        "text": 0,
        "B": 1,
        "N": 2880,
        "D": 4096,
        "graph us": 40.0,
        "floor us": 20.0,
        "eager over kernel": 9.0,
    }
    session.part("headline")["rows"].append(row)
    session.part("models")["rows"].append({"method": "tome", "B": 8, "over flops": 0.04})
    session.part("models")["rows"].append({"method": "tome", "B": 1, "over flops": 0.04})
    for method, over_flops, over_layers in (("A/A", 0, 0), ("dart", 0.2, 0.02), ("random", 0, 0)):
        session.part("prefill")["rows"].append({"method": method, "over flops": over_flops, "over layers": over_layers})
    assert [(t["met"], t["of"]) for t in gpu.targets(session)] == [(1, 1), (0, 1), (0, 0), (1, 1), (0, 1), (1, 1)]
    assert "| 0 of 0 | not measured |" in gpu.markdown(session)


@pytest.mark.slow
def test_it_runs_from_a_plain_checkout_with_torch_and_numpy_alone(tmp_path):
    """No installed tokcompile, none of the libraries that only some parts of it need."""
    hide = tmp_path / "sitecustomize.py"
    names = ("timm", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "transformers")
    hide.write_text(f"import sys\nsys.modules |= dict.fromkeys({names})\n")
    packages = Path(torch.__file__).parents[1]
    where = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{packages}"}
    where.pop("TOKCOMPILE_HOST_KERNELS", None)
    code = (
        "import sys, runpy; import sitecustomize; sys.argv = ['gpu.py', *sys.argv[1:]]; "
        f"runpy.run_path({str(gpu.ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')"
    )
    # -S: no .pth files, so no editable install of this checkout
    command = [sys.executable, "-S", "-c", code, "--dry-run", "--parts", "build,sanitize", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=where)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out.json").read_text())["parts"]["sanitize"]["rows"][0]["ok"]


def test_the_prefill_cases_are_the_published_ones():
    """Shapes of LLaMA-7B and Qwen2-7B, whose weights are made on the device: here on none, so no memory is needed."""
    full = Session(argparse.Namespace(dry_run=False, quick=False), "cuda", 0.0, {}, gpu.write)
    assert set(gpu_prefill.setups(full)) == {
        *((m, n, "graph") for m in ("llama-7b", "qwen2-7b") for n in (576, 2880, 8192)),
        ("llama-7b", 2880, "compiled"),
    }
    billions = {}
    for name in ("llama-7b", "qwen2-7b"):
        size = gpu_prefill.MODELS[name]
        model = gpu_prefill.made_on("meta", torch.bfloat16, size, 64)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
        embeddings = size.width * size.vocabulary
        billions[name] = (sum(p.numel() for p in model.parameters()) + embeddings) / 1e9
    assert {name: round(count, 1) for name, count in billions.items()} == {"llama-7b": 6.7, "qwen2-7b": 7.6}


def test_the_reduced_prefill_keeps_fused_causal_attention_and_one_kernel(session):
    size, visual = gpu_prefill.MODELS["tiny"], 40
    length = gpu_prefill.BEFORE + visual + gpu_prefill.AFTER
    model = gpu_prefill.made_on("cpu", torch.float32, size, length)
    span = (gpu_prefill.BEFORE, gpu_prefill.BEFORE + visual)
    x = torch.randn(1, length, size.width)
    made = tokcompile.optimize(model, (x,), method="dart", budget=tokcompile.Tokens(4), spans=[span], where=[gpu_prefill.LAYER])
    attention = [n for n in made.graph_module.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert [n.args[5] for n in attention] == [True] * size.depth
    (reduction,) = [m for m in made.graph_module.modules() if isinstance(m, ReductionModule)]
    assert reduction.kernel.text == (4, span[1], length)
    gathers = [n for n in made.graph_module.graph.nodes if n.target == torch.ops.aten.index_select.default]
    assert [n.args[0].name for n in gathers] == ["cos", "sin"]  # once for all layers and both of q and k


def test_the_decode_step_goes_on_where_the_prefill_ended():
    torch.manual_seed(0)
    decoder = gpu_prefill.made_on("cpu", torch.float32, gpu_prefill.MODELS["tiny"], 9)
    x = torch.randn(1, 9, 64)
    step = gpu_prefill.Step(decoder, [8] * 4)
    y = x
    for layer, (keys, values) in zip(decoder.layers, step.caches):
        _, k, v = layer.before(y, decoder.cos, decoder.sin)
        keys[:, :, :8], values[:, :, :8] = k[:, :, :8], v[:, :, :8]
        y = layer(y, decoder.cos, decoder.sin)
    assert torch.allclose(step(x[:, -1:]), decoder(x), atol=1e-5)


def test_forms_of_attention_with_sizes_are_one():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 13, 8)
    sizes = torch.randint(1, 5, (2, 13)).float()
    forms = {name: run() for name, run in gpu_profile.attention_forms(q, k, v, sizes).items()}
    want = ((q @ k.mT / 8**0.5 + sizes.log()[:, None, None]).softmax(-1)) @ v
    for name, got in forms.items():
        assert torch.allclose(got, want, atol=1e-5) == (name != "no sizes"), name


def test_kernels_go_by_the_name_of_their_body():
    assert gpu_profile.short("void tc::run<tc::PivotDots<tc::F16, 8, true, 4> >(tc::PivotDots<...)") == "PivotDots"
    assert gpu_profile.short("nvjet_sm90") == "nvjet_sm90"
