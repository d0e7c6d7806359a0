"""Models on a GPU: the same answers as on the CPU, in CUDA graphs and under torch.compile, and the same files.

Skipped without one, as on CI; `python -m pytest tests/test_cuda.py` on a machine that has one.
"""

import copy
import functools

import pytest
import torch

import tokcompile
from benchmarks import gpu_session
from tests.conftest import leaves
from tests.methods.inputs import run, sequence, site
from tests.methods.test_properties import IDS, VARIANTS
from tests.models import FAMILIES, shake
from tests.vlm.models import vlm
from tokcompile.recipe import methods as known_methods
from tokcompile.vlm import export, split

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAMES = ("timm/vit", "hf/dinov2", "hf/siglip_vision", "hf/qwen2_vl_vision", "hf/llava")


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it is by default, and rounds to three digits


def on(device, value):
    return torch.utils._pytree.tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, value)


def built(name):
    """(model, args, kwargs) on the CPU and copies on the GPU."""
    torch.manual_seed(0)
    model, args, kwargs = FAMILIES[name].build(2)
    model = shake(model)
    return (model, args, kwargs), (copy.deepcopy(model).cuda(), on("cuda", args), on("cuda", kwargs))


def apart(got, want):
    pairs = list(zip(leaves(got), leaves(want), strict=True))
    return max(((g.cpu().double() - w.double()).abs().max() / w.double().abs().max().clamp_min(1e-6)).item() for g, w in pairs)


def captured(function):
    """What a call gives from a CUDA graph."""
    out = []
    gpu_session.captured("cuda", lambda: out.append(function()))()
    torch.cuda.synchronize()
    return out[-1]


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_every_method_runs_in_a_cuda_graph(name, options):
    recipe = known_methods()[name]
    where = site(recipe, 36, 24, 1, options=options, block=1, depth=4)
    taps = sequence(2, 37)
    on_gpu = {key: value.cuda() for key, value in taps.items()}
    plan, rows, sizes = run(recipe, taps, where)
    got, got_rows, got_sizes = captured(lambda: run(recipe, on_gpu, where))
    assert torch.equal(got.index.cpu(), plan.index)
    assert (got_rows.cpu() - rows).abs().max() <= 1e-5 * rows.abs().max()
    assert sizes is None or torch.equal(got_sizes.cpu(), sizes)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_model_on_a_gpu_answers_as_on_the_cpu(name):
    (model, args, kwargs), (there, there_args, there_kwargs) = built(name)
    same = tokcompile.optimize(there, there_args, there_kwargs, budget=1.0)
    assert all(map(torch.equal, leaves(same(*there_args, **there_kwargs)), leaves(there(*there_args, **there_kwargs))))
    for method in ("tome", "dart", "random", "grid"):
        want = tokcompile.optimize(model, args, kwargs, method=method, budget=0.6)(*args, **kwargs)
        opt = tokcompile.optimize(there, there_args, there_kwargs, method=method, budget=0.6)
        assert apart(opt(*there_args, **there_kwargs), want) <= 1e-4
        assert apart(captured(functools.partial(opt, *there_args, **there_kwargs)), want) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "random", "divprune"])
def test_torch_compile(method):
    (model, args, _), (there, there_args, _) = built("timm/vit")
    want = tokcompile.optimize(model, args, method=method, budget=0.6)(*args)
    opt = tokcompile.optimize(there, there_args, method=method, budget=0.6)
    assert apart(torch.compile(opt, fullgraph=True, dynamic=False)(*there_args), want) <= 1e-4
    graphs = torch.compile(opt, fullgraph=True, dynamic=False, mode="reduce-overhead")
    for _ in range(4):  # warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        assert apart(graphs(*there_args), want) <= 1e-4
    as_backend = torch.compile(there, backend="tokcompile", options={"method": method, "budget": 0.6})
    assert apart(as_backend(*there_args), want) <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_files_are_written_from_a_gpu(name, tmp_path):
    (_, _, _), (there, args, kwargs) = built(name)
    for method in ("tome", "grid"):
        opt = tokcompile.optimize(there, args, kwargs, method=method, budget=0.6)
        assert max(opt.export_onnx(tmp_path / "m.onnx").errors.values()) <= 1e-4
        assert {v.device.type for v in [*opt.parameters(), *there.parameters()]} == {"cuda"}
    opt.save(tmp_path / "m.pt2")
    with torch.no_grad():
        assert apart(tokcompile.load(tmp_path / "m.pt2")(*args, **kwargs), on("cpu", leaves(opt(*args, **kwargs)))) <= 1e-5


def test_a_folder_is_written_from_a_gpu(tmp_path):
    model, inputs = vlm("llava")
    parts = split(model.cuda(), on("cuda", inputs))
    parts = parts.after(tokcompile.optimize(*parts.vision, method="divprune", budget=0.5, outputs="reduced"))
    prefill = tokcompile.optimize(
        *parts.language, spans=parts.spans, outputs="reduced", method="dart", budget=tokcompile.Tokens(4)
    )
    report = export(parts, prefill, tmp_path / "folder", max_new_tokens=4)
    assert report
