"""Time to the first token in ONNX Runtime on one CPU thread: tower, projector and prefill, reduced over full.

    python -m benchmarks.tiny_vlm speed

Every engine is exported in float32 by `export_onnx`, the unreduced ones too. Reduced and full run alternately, and the
median of the ratios of CPU time within pairs counts. Adding the two embeddings of a token's place is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokcompile
from benchmarks.common import environment
from benchmarks.tiny_vlm import model as parts
from benchmarks.tiny_vlm import reduce
from benchmarks.tiny_vlm.data import GRID, PATCH, SIZE
from benchmarks.tiny_vlm.tower import Tower
from tokcompile import bench
from tokcompile.errors import BudgetError

QUESTION = 8  # tokens of "\nWhat is at the top left?"
FULL = GRID * GRID
PAIRS = 7


class Front(nn.Module):
    """pixels: (B, 3, H, W) -> what each token shows, (B, N, 576); class token first, which is not passed on."""

    def __init__(self, projector: parts.Projector):
        super().__init__()
        self.tower, self.projector = Tower(), projector
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projector.shown(self.tower(pixels))


def fronts(projector: parts.Projector, method: str | None, tokens: int, side: int = SIZE) -> Any:
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    budget: Any = 1.0 if method is None else tokcompile.Tokens(tokens)
    recipe = reduce.in_tower(method or "random")
    return tokcompile.optimize(Front(projector), (pixels,), method=recipe, budget=budget, outputs="reduced")


def prefills(lm: Any, length: int, method: str | None = None, tokens: int = 0, layer: int = 0) -> Any:
    """The prefill of a prompt with `length` visual tokens, of which a method keeps `tokens` at a layer."""
    shape = (1, parts.PREFIX + length + QUESTION, parts.WIDTH)
    prompt = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    return reduce.in_language_model(lm, prompt, [(parts.PREFIX, parts.PREFIX + length)], method, tokens, layer)


def conditions() -> Iterator[tuple[str, Callable[..., Any] | None, Callable[..., Any]]]:
    """Name, the front (None: the full one) and the prefill of each condition."""
    for k in reduce.TOKENS + reduce.EVEN:
        for m in reduce.TOWER[k]:
            yield f"tower-{m}-{k}", partial(fronts, method=m, tokens=k), partial(prefills, length=k)
        for m in reduce.BETWEEN[k]:
            yield f"between-{m}-{k}", None, partial(prefills, length=FULL, method=m, tokens=k)
        for m in reduce.INSIDE.get(k, ()):
            yield f"inside-{m}-{k}", None, partial(prefills, length=FULL, method=m, tokens=k, layer=reduce.LAYER)
        for m in reduce.STEPWISE.get(k, ()):
            yield f"stepwise-{m}-{k}", None, partial(prefills, length=FULL, method=m, tokens=k, layer=reduce.LAYER)
    for grid in reduce.SMALLER:
        front = partial(fronts, method=None, tokens=0, side=grid * PATCH)
        yield f"smaller-input-{grid * grid}", front, partial(prefills, length=grid * grid)


def speed(build: Path, only: str = "") -> None:
    """Writes build/speed.json, continuing it where it exists; only: conditions whose names contain this."""
    path = build / "speed.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"environment": environment()}
    lm, projector = parts.language_model(build / "llm"), parts.Projector().eval()  # what is timed does not depend on weights
    engines: dict[str, tuple[Any, Any]] = {}

    def engine(make: Callable[..., Any], first: Any) -> tuple[Any, Any]:
        name = repr((make.func.__name__, sorted(make.keywords.items())))  # type: ignore[attr-defined]
        if name in engines:
            return engines[name]
        opt = make(first)
        made = bench.onnx_runner(opt, 1), opt.report
        if make.keywords.get("method") is None or first is projector:  # type: ignore[attr-defined]
            engines[name] = made
        return made

    whole = partial(fronts, method=None, tokens=0)
    full = engine(whole, projector), engine(partial(prefills, length=FULL), lm)

    def run(pair: Any) -> Callable[[], None]:
        def once() -> None:
            for part, _ in pair:
                part()

        return once

    def flops(pair: Any) -> int:
        return sum(r.flops + r.overhead_flops for _, r in pair)

    for name, front, prefill in [("A/A", None, partial(prefills, length=FULL)), *conditions()]:
        if name in rows or not any(part in name for part in only.split(",")):
            continue
        try:
            pair = engine(front or whole, projector), engine(prefill, lm)
        except BudgetError as error:  # ToMe removes at most half in one block
            print(f"{name} left out: {error}", flush=True)
            continue
        ratio = bench.paired(run(full), run(pair), PAIRS, warmup=1)
        rows[name] = {**asdict(ratio), "flops_ratio": flops(pair) / flops(full)}
        path.write_text(json.dumps(rows, indent=1))
        print(name, ratio, rows[name]["flops_ratio"], flush=True)
