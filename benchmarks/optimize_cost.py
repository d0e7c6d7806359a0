"""What compiling costs: seconds of `tokcompile.optimize` by pass and its peak memory, beside torch.export alone.

    python -m benchmarks optimize --model vit_base_patch16_224 --methods tome,topk,dart

Every measurement is a process of its own, because peak memory never goes down again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, environment, names, peak_megabytes, save, table

METHODS = ("tome", "topk", "dart", "divprune")
EXPORT = "torch.export"
BUDGET = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.worker:
        print(json.dumps(measure(args.model, args.worker, args.batch)))
        return 0
    runs, where = {}, environment()
    for what in (EXPORT, *args.methods):
        runs[what] = [in_process(what, args) for _ in range(args.repeats)]
        print(what, runs[what][-1], flush=True)
    text = markdown(runs)
    save(args.out, "optimize_cost", {"runs": runs, "environment": where}, text)
    print(text)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks optimize", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="of timm")
    parser.add_argument("--methods", type=names, default=METHODS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def in_process(what: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.optimize_cost", "--worker", what]
    command += ["--model", args.model, "--batch", str(args.batch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(model_name: str, what: str, batch: int) -> dict[str, Any]:
    """Seconds (of the clock and of the CPU), by pass if there are passes, and peak memory before and after."""
    import timm
    import torch

    import tokcompile

    torch.set_num_threads(1)
    model = timm.create_model(model_name, pretrained=False).eval().requires_grad_(False)
    example = (torch.randn(batch, 3, 224, 224),)
    with torch.no_grad():
        model(*example)
        before, clock, cpu = peak_megabytes(), time.perf_counter(), time.process_time()
        passes: dict[str, float] = {}
        if what == EXPORT:
            torch.export.export(model, example, strict=False)
        else:
            made = tokcompile.optimize(model, example, method=what, budget=tokcompile.Flops(BUDGET))
            passes = made.report.seconds
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "before": before, "peak": peak_megabytes(), "passes": passes}


def markdown(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the repeated processes."""
    steps = list(dict.fromkeys(step for found in runs.values() for one in found for step in one["passes"]))

    def middle(found: list[dict[str, Any]], name: str) -> float:
        return statistics.median(one[name] for one in found)

    rows = []
    for what, found in runs.items():
        by_pass = [statistics.median(one["passes"].get(step, 0.0) for one in found) for step in steps]
        rows.append(
            [what, f"{middle(found, 'seconds'):.2f}", f"{middle(found, 'cpu'):.2f}"]
            + [f"{seconds:.2f}" if what != EXPORT else "" for seconds in by_pass]
            + [f"{middle(found, 'before'):.0f}", f"{middle(found, 'peak'):.0f}"]
        )
    return table(["", "seconds", "CPU seconds", *steps, "peak MB before", "peak MB after"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
