"""Whole vision transformers with random weights on a GPU: reduced over original, beside what the FLOPs promise."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import tokcompile
from benchmarks.gpu_session import Run, Session, captured
from tokcompile import bench
from tokcompile.errors import TokcompileError
from tokcompile.passes.trace import trace


@dataclass(frozen=True)
class Size:
    image: int
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    class_token: bool = True


MODELS = {
    "vit-b/16@384": Size(384, 16, 768, 12, 12, 3072),
    "vit-l/14@336": Size(336, 14, 1024, 24, 16, 4096),
    "vit-h/14@224": Size(224, 14, 1280, 32, 16, 5120),
    "siglip-so400m/14@384": Size(384, 14, 1152, 27, 16, 4304, class_token=False),
    "tiny": Size(32, 8, 32, 3, 2, 64),
}


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    """A pre-norm vision transformer with fused attention; 1000 logits from the class token or the mean."""

    def __init__(self, size: Size):
        super().__init__()
        self.size, self.patches = size, (size.image // size.patch) ** 2
        self.embed = nn.Conv2d(3, size.width, size.patch, size.patch)
        self.position = nn.Parameter(torch.randn(1, self.patches + size.class_token, size.width) * 0.02)
        if size.class_token:
            self.token = nn.Parameter(torch.randn(1, 1, size.width) * 0.02)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        if self.size.class_token:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.size.class_token else x.mean(1))


@dataclass(frozen=True)
class Setup:
    """One model to time. runtime: graph (eager ops in a CUDA graph) or compiled (inductor's code in one)."""

    model: str
    batch: int
    dtype: torch.dtype
    runtime: str


VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dart", {}), ("tome", {}), ("tome", {"proportional": False}), ("divprune", {}), ("topk", {}), ("pitome", {}),
)  # fmt: skip


def headline_setups(session: Session) -> list[Setup]:
    half = torch.float16
    if session.dry:
        return [Setup("tiny", 2, torch.float32, "graph"), Setup("tiny", 1, torch.float32, "compiled")]
    return [
        Setup("vit-l/14@336", 8, half, "graph"),
        Setup("vit-l/14@336", 64, half, "graph"),
        Setup("vit-b/16@384", 8, half, "compiled"),
    ]


def all_setups(session: Session) -> list[Setup]:
    if session.short:
        return []
    models = [name for name in MODELS if name != "tiny"]
    found = [Setup(m, b, torch.float16, "graph") for b in (8, 1, 64) for m in models]
    found += [Setup(m, 8, torch.bfloat16, "compiled") for m in models]
    return [setup for setup in found if setup not in headline_setups(session)]


def models(session: Session) -> None:
    time_setups(session, "models", headline_setups(session))


def more_models(session: Session) -> None:
    time_setups(session, "more_models", all_setups(session))


def time_setups(session: Session, part: str, setups: Sequence[Setup]) -> None:
    for setup in setups:
        if session.left() <= 0:
            session.part(part)["errors"].append({"error": f"{setup}: the time was up"})
            continue
        try:
            time_model(session, part, setup)
        except Exception as error:
            session.fail(part, str(setup), error)
        torch._dynamo.reset()
        if session.device == "cuda":
            torch.cuda.empty_cache()


def time_model(session: Session, part: str, setup: Setup) -> None:
    """The unreduced model against itself, then every variant and random selection at its places."""
    size = MODELS[setup.model]
    model = Vit(size).to(session.device, setup.dtype).eval().requires_grad_(False)
    image = torch.randn(setup.batch, 3, size.image, size.image, device=session.device, dtype=setup.dtype)
    source: Any = trace(model, (image,), None).program
    plain = whole(session, setup, tokcompile.optimize(source, (image,), budget=1.0))
    about = {"model": setup.model, "B": setup.batch, "dtype": str(setup.dtype)[6:], "runtime": setup.runtime}
    same = pair(session, plain, plain)
    session.add(part, {**about, "method": "A/A", "flops": 1.0, **times(same)})
    twins: dict[Any, bench.Ratio] = {}
    for method, options in variants(session, setup):
        title = method + "".join(f" {k}={v}" for k, v in options.items())
        if session.left() <= 0:
            session.part(part)["errors"].append({"error": f"{setup} {title}: the time was up"})
            continue
        try:
            made = tokcompile.optimize(source, (image,), method=method, budget=0.5, **options)
            places = bench.places(made)
            if places not in twins:
                plan = made.plan.replace(method="random", options={})
                twins[places] = pair(session, plain, whole(session, setup, tokcompile.optimize(source, (image,), plan=plan)))
            ratio = pair(session, plain, whole(session, setup, made))
            flops = made.report.flops_ratio
            random = {"random": twins[places].median, "over flops": ratio.median / flops - 1}
            session.add(part, {**about, "method": title, "flops": flops, **times(ratio), **random})
        except (TokcompileError, RuntimeError) as error:
            session.fail(part, f"{setup} {title}", error)


def variants(session: Session, setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fewer where each one has to be compiled; none that reads a class token where there is none."""
    slow = setup.runtime == "compiled"
    for method, options in VARIANTS[: 2 if slow and session.dry else 3 if slow or session.args.quick else None]:
        if method != "topk" or MODELS[setup.model].class_token:
            yield method, options


def whole(session: Session, setup: Setup, made: tokcompile.OptimizedModel) -> Run:
    return running(session, setup.runtime, made.graph_module, *made.example_inputs)


def running(session: Session, runtime: str, program: nn.Module | Callable[..., Any], *inputs: Any) -> Run:
    """A function that runs a program once, without launch costs on a GPU."""
    if runtime == "compiled":
        program = torch.compile(program, fullgraph=True, dynamic=False, backend=session.compiler)
    return captured(session.device, lambda: program(*inputs))


def pair(session: Session, a: Run, b: Run) -> bench.Ratio:
    def clock() -> float:
        if session.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return bench.paired(
        a, b, 3 if session.dry else 9 if session.args.quick else 15, clock=clock, least=0.001 if session.dry else 0.02
    )


def times(ratio: bench.Ratio) -> dict[str, Any]:
    return {
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "original ms": ratio.a * 1e3,
        "reduced ms": ratio.b * 1e3,
    }


# -- TensorRT -------------------------------------------------------------------------------------------------------------


def tensorrt(session: Session) -> None:
    """The plain ONNX form of one model in trtexec, where there is one."""
    tool = shutil.which("trtexec") or shutil.which("/usr/src/tensorrt/bin/trtexec")
    if tool is None:
        session.part("tensorrt")["errors"].append({"error": "trtexec was not found"})
        return
    name, batch = ("tiny", 1) if session.dry else ("vit-b/16@384", 8)
    dtype = torch.float32 if session.dry else torch.float16
    model = Vit(MODELS[name]).to(session.device, dtype).eval().requires_grad_(False)
    image = torch.randn(batch, 3, MODELS[name].image, MODELS[name].image, device=session.device, dtype=dtype)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, options in (("unreduced", {"budget": 1.0}), ("dart", {"method": "dart"}), ("tome", {"method": "tome"})):
            made = tokcompile.optimize(model, (image,), **options)
            path = Path(folder) / f"{title}.onnx"
            made.export_onnx(path, target="tensorrt", inline=True, verify=False)
            command = [tool, f"--onnx={path}", "--stronglyTyped", "--useCudaGraph", "--noDataTransfers", "--useSpinWait"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(session.left(), 60))
            median = re.search(r"GPU Compute Time:.*?median = ([\d.]+) ms", done.stdout)
            if median is None:
                raise RuntimeError(f"trtexec, exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
            found[title] = float(median[1])
            flops = made.report.flops_ratio
            ratio = found[title] / found["unreduced"]
            session.add(
                "tensorrt", {"model": name, "B": batch, "method": title, "flops": flops, "ms": found[title], "ratio": ratio}
            )
