"""What one reduction costs by itself against the number of tokens: choosing and combining, half of the tokens kept.

    python -m benchmarks scaling --tokens 196,576,1024,2304,4096,16384

One `ReductionModule` on random tokens with a class token, batch 1, single thread: in eager torch and as the ops that
the ONNX file holds, in onnxruntime. What a method reads is given: the class attention row of topk and evit, for one, is
computed by the model's part of the graph (about n x D more multiply-adds) and not counted here. One transformer block
of the same width stands beside it for scale.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import RESULTS, environment, names, numbers, save, table
from tokcompile import bench, timing
from tokcompile.passes.reduction import ReductionModule
from tokcompile.primitives import use_forms
from tokcompile.recipe import Site, get_method

TOKENS = (196, 576, 1024, 2304, 4096, 16384)
METHODS = ("random", "grid", "topk", "evit", "dart", "tome", "pitome", "divprune")
SQUARES = {"tome": 0.75, "pitome": 4.0, "divprune": 4.0}  # n x n float32 matrices held at once, about
UNROLLED = 300  # tokens kept, beyond which divprune's k - 1 steps make an ONNX graph that takes minutes to write
GROWTH = {
    "random": "n (gather only)", "grid": "n (gather only)", "topk": "n log n (sort)", "evit": "n log n (sort)",
    "dart": "n (pivots x n similarities), n log n (sorts)", "tome": "n² (n/2 x n/2 similarities)",
    "pitome": "n² (n x n energies, n/2 x n/2 similarities)", "divprune": "n² (n x n distances, k steps over n)",
}  # fmt: skip
MEMORY = "too much memory"


def main(argv: Sequence[str] | None = None) -> int:
    args, where = arguments(argv), environment()
    with bench.torch_threads(1), torch.no_grad():
        rows = [row(n, args) for n in map(int, args.tokens)]
    text = markdown(rows, args)
    save(args.out, "scaling", {"rows": rows, "growth": GROWTH, "environment": where}, text)
    print(text)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=numbers, default=TOKENS)
    parser.add_argument("--methods", type=names, default=METHODS)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement, at least")
    parser.add_argument("--memory", type=float, default=2.0, help="GB that a method's n x n matrices may take")
    parser.add_argument("--no-onnx", action="store_true", help="eager torch only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def row(n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every method at n tokens, in torch and in onnxruntime, or why there are none; and GFLOPs."""
    found: dict[str, Any] = {"tokens": n, "block": {"eager": milliseconds(block(n, args), args.seconds)}}
    for method in args.methods:
        needed = SQUARES.get(method, 0.0) * n * n * 4 / 1e9
        if needed > args.memory:
            found[method] = {"eager": f"{MEMORY}: about {needed:.1f} GB"}
            continue
        module, inputs = reduction(method, n, args.width, args.heads)
        found[method] = {
            "flops": flops(module, inputs),
            "eager": milliseconds(lambda m=module, i=inputs: m(*i), args.seconds),
            "onnxruntime": "" if args.no_onnx else onnx_milliseconds(module, inputs, args.seconds),
        }
        print(n, method, found[method], flush=True)
    return found


class Reduction(nn.Module):
    """A ReductionModule over x, the sizes if it tracks them, and what it reads; without the results that are None."""

    def __init__(self, module: ReductionModule):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        given = rest if self.module.recipe.track_size else (None, *rest)
        return tuple(value for value in self.module(x, *given) if value is not None)


def reduction(method: str, n: int, width: int, heads: int) -> tuple[Reduction, tuple[Tensor, ...]]:
    """One reduction from n to n/2 in the third of twelve blocks, and its inputs."""
    recipe = get_method(method)
    side = math.isqrt(n)
    grid = (side, side) if side * side == n else None
    site = Site(n, n // 2, 1, 0, 0, 1, 2, 12, grid, 1, options=recipe.with_options({}))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    taps = {
        "normed": lambda: draw(1, n + 1, width),
        "k": lambda: draw(1, heads, n + 1, width // heads),
        "cls_attention": lambda: draw(1, heads, n + 1).softmax(-1),
    }
    taps |= {"rotated_k": taps["k"], "last_attention": taps["cls_attention"]}
    read = recipe.taps_read()
    size = (torch.ones(1, n),) if recipe.track_size else ()
    return Reduction(ReductionModule(recipe, site, names=read)), (
        draw(1, n + 1, width),
        *size,
        *(taps[t]() for t in read),
    )


def block(n: int, args: argparse.Namespace) -> Callable[[], Tensor]:
    """The products and the attention of one block over n tokens, before any reduction."""
    d, h = args.width, args.heads
    x, (wide, out, up, down) = (
        torch.randn(1, n + 1, d),
        [nn.Linear(*s) for s in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))],
    )

    def run() -> Tensor:
        q, k, v = wide(x).unflatten(-1, (3, h, d // h)).permute(2, 0, 3, 1, 4)
        y = x + out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y + down(nn.functional.gelu(up(y)))

    return run


def flops(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """FLOPs of its matrix products; sorts, gathers and sums are not counted."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def milliseconds(run: Callable[[], Any], seconds: float) -> float:
    """Median CPU time of a call."""
    run()
    times: list[float] = []
    start = time.process_time()
    while len(times) < 3 or time.process_time() - start < seconds:
        times.append(timing.measure(run, 1, time.process_time))
    return float(np.median(times)) * 1e3


def onnx_milliseconds(module: Reduction, inputs: tuple[Tensor, ...], seconds: float) -> float | str:
    """The same in onnxruntime, in the forms that are exported for it; or why not."""
    site = module.module.site
    if module.module.recipe.name == "divprune" and site.k > UNROLLED:
        return f"{site.k - 1} unrolled steps"
    try:
        import onnx_ir
        import onnxruntime

        from tokcompile.exports.onnx import quiet
        from tokcompile.exports.simplify import simplify
        from tokcompile.exports.targets import get_target
    except ImportError as error:
        return f"needs {error.name}"
    target = get_target("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with use_forms(target.forms), quiet(), tempfile.TemporaryDirectory() as folder:
        program = torch.onnx.export(module, inputs, dynamo=True, opset_version=target.opset, verbose=False)
        assert program is not None
        simplify(program.model, target.rules)
        path = str(Path(folder) / "reduction.onnx")
        onnx_ir.save(program.model, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {i.name: value.numpy() for i, value in zip(session.get_inputs(), inputs, strict=True)}
    return milliseconds(lambda: session.run(None, feed), seconds)


def markdown(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """Milliseconds in torch and in onnxruntime, FLOPs, and how the time grows from one count to the next."""
    counts = [f"{r['tokens']}" for r in rows]
    lines = [["one block of the model", "eager ms", *[cell(r["block"]["eager"]) for r in rows], exponent(rows, "block")]]
    for method in args.methods:
        lines.append([method, "eager ms", *[cell(r[method]["eager"]) for r in rows], exponent(rows, method)])
        if not args.no_onnx:
            lines.append(["", "onnxruntime ms", *[cell(r[method].get("onnxruntime", "")) for r in rows], ""])
        giga = [f"{r[method]['flops'] / 1e9:.3f}" if "flops" in r[method] else "" for r in rows]
        lines.append(["", "GFLOPs", *giga, GROWTH.get(method, "")])
    return table(["method", "", *counts, "grows as"], lines)


def cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def exponent(rows: Sequence[dict[str, Any]], method: str) -> str:
    """The power of n that the last two measured times show."""
    found = [(r["tokens"], r[method]["eager"]) for r in rows if isinstance(r[method]["eager"], float)]
    if len(found) < 2:
        return ""
    (n, before), (m, after) = found[-2:]
    return f"measured n^{math.log(after / before) / math.log(m / n):.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
