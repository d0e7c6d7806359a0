"""Time ratios of whole models: reduced over original, alternately, single thread, in one process.

    python -m benchmarks speed --models dinov2-s,deit-s,vit-b --batches 1,8 --runtimes onnxruntime --pairs 25

Original and reduced model are exported by the same code in the same form. A/A is the original against itself, the
noise. Random weights: what is timed does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tokcompile
from benchmarks.common import RESULTS, environment, names, numbers, save, table
from tokcompile import bench
from tokcompile.errors import TokcompileError
from tokcompile.passes.trace import trace
from tokcompile.recipe import get_method

MODELS = {
    "dinov2-s": ("vit_small_patch14_dinov2.lvd142m", {"img_size": 224}),
    "deit-s": ("deit_small_patch16_224", {}),
    "vit-b": ("vit_base_patch16_224", {}),
}
METHODS = ("topk", "evit", "pitome", "dart", "divprune", "grid")
BUDGETS = (0.7, 0.5)
REMOVED = 16  # ToMe's r
TITLES = (
    "model", "batch", "runtime", "method", "budget", "left", "FLOPs ratio", "time ratio [quartiles]", "overhead",
    "random there", "selection", "original ms", "reduced ms",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Times every model, batch and runtime, and writes the table after each of them."""
    args, where = arguments(argv), environment()
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    with bench.torch_threads(1):
        for name in args.models:
            for batch in args.batches:
                for found in time_model(name, int(batch), args, errors):
                    rows.append({"model": name, "batch": int(batch), **found})
                    print(table([], [cells(rows[-1])]).splitlines()[-1], flush=True)
                text = markdown(rows, errors)
                save(args.out, "speed", {"rows": rows, "errors": errors, "environment": where}, text)
    print("\n" + text)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=names, default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--runtimes", type=names, default=["onnxruntime"], help=f"of {', '.join(bench.RUNTIMES)}")
    parser.add_argument("--methods", type=names, default=METHODS, help="at the FLOPs budgets")
    parser.add_argument("--budgets", type=numbers, default=BUDGETS, help="shares of the FLOPs")
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for known, given in ((MODELS, args.models), (bench.RUNTIMES, args.runtimes)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]} is none of {', '.join(known)}")
    return args


def make_model(name: str, batch: int) -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """A timm model with random weights, and an input."""
    import timm

    model_name, options = MODELS[name]
    model = timm.create_model(model_name, pretrained=False, **options).eval().requires_grad_(False)
    return model, (torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)


def time_model(name: str, batch: int, args: argparse.Namespace, errors: list[str]) -> Iterator[dict[str, Any]]:
    """A/A of each runtime, then one row for each method and budget."""
    model, example = make_model(name, batch)
    source: Any = trace(model, example, None).program
    plain = tokcompile.optimize(source, example, budget=1.0)
    result = bench.Bench({}, args.pairs)
    cases = list(make_cases(source, example, args, result))
    for runtime in args.runtimes:
        original = bench.runner(plain, runtime)
        same = bench.paired(original, original, args.pairs)
        yield {"runtime": runtime, "method": "A/A", "flops_ratio": 1.0, **time_of(same)}
        timed: dict[Any, bench.Ratio] = {}
        for method, budget, made, twin in cases:
            try:
                for one in (twin, made):
                    if bench.key(one) not in timed:
                        timed[bench.key(one)] = bench.paired(original, bench.runner(one, runtime), args.pairs)
            except TokcompileError as error:
                errors.append(f"{name}, batch {batch}: {method} at {budget} in {runtime}: {error}")
                continue
            yield asdict(bench.row(runtime, method, budget, made, timed[bench.key(made)], timed[bench.key(twin)]))
    errors += [f"{name}, batch {batch}: {error}" for error in result.errors]


def make_cases(source: Any, example: Any, args: argparse.Namespace, result: bench.Bench) -> Iterator[Any]:
    """(method, budget, model, random selection at its places): ToMe as published, then all at the budgets."""

    def build(methods: Sequence[str], budgets: Sequence[Any]) -> Iterator[Any]:
        recipes = [get_method(method) for method in methods]
        return bench.build(result, lambda line: None, source, example, None, recipes, budgets, {}, {})

    yield from build(("tome",), (tokcompile.Remove(REMOVED),))
    yield from build(("random", *args.methods), [tokcompile.Flops(budget) for budget in args.budgets])


def time_of(ratio: bench.Ratio) -> dict[str, Any]:
    return {
        "ratio": ratio.median, "low": ratio.low, "high": ratio.high, "original_ms": ratio.a * 1e3,
        "optimized_ms": ratio.b * 1e3,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    def three(name: str, sign: str = "") -> str:
        return f"{row[name]:{sign}.3f}" if name in row else ""

    counts = row.get("counts")
    return [
        row["model"], str(row["batch"]), row["runtime"], row["method"], row.get("budget", ""),
        str(counts[-1]) if counts else "", three("flops_ratio"),
        f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", three("overhead", "+"), three("random_ratio"),
        three("selection", "+"), f"{row['original_ms']:.1f}", f"{row['optimized_ms']:.1f}",
    ]  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]], errors: Sequence[str]) -> str:
    return table(TITLES, [cells(row) for row in rows]) + "".join(f"\n\nnot timed: {error}" for error in errors)


if __name__ == "__main__":
    raise SystemExit(main())
