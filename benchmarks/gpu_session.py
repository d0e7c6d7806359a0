"""One run of the GPU benchmark: its results as they come, and its clocks."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tokcompile import timing

Run = Callable[[], Any]
SECONDS = 0.6  # that the timing of one case may take, about


@dataclass
class Session:
    """The run: what it may use, and what it has found. Every part is {"rows": [...], "errors": [...], "seconds": s}."""

    args: argparse.Namespace
    device: str
    deadline: float
    environment: dict[str, Any]
    write: Callable[[Session], None]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    bandwidth: float = 0.0

    @property
    def dry(self) -> bool:
        return bool(self.args.dry_run)

    @property
    def short(self) -> bool:
        return bool(self.args.quick or self.args.dry_run)

    @property
    def compiler(self) -> str:
        return "eager" if self.dry else "inductor"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def part(self, name: str) -> dict[str, Any]:
        return self.parts.setdefault(name, {"rows": [], "errors": [], "seconds": 0.0})

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Notes a row, in the files and, unless it only says that all is well, on the terminal."""
        self.part(name)["rows"].append(row)
        if name != "check" or not row["ok"]:
            print(f"{name}: {line(row)}", flush=True)
        self.write(self)

    def fail(self, name: str, what: str, error: BaseException) -> None:
        text = f"{what}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:400]}"
        self.part(name)["errors"].append({"error": text, "trace": traceback.format_exc()[-3000:]})
        print(f"{name}: FAILED {text}", flush=True)
        self.write(self)


def line(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def stopwatch(device: str, run: Run) -> float:
    """Seconds until the device has done it."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def alternate(session: Session, runs: Mapping[str, tuple[Run, int]], rounds: int | None = None) -> dict[str, float]:
    """Median seconds of one call of each (function, calls it makes), every round in the other order than the last."""
    once = {}
    for name, (run, _) in runs.items():
        for _ in range(2):
            once[name] = stopwatch(session.device, run)
    least = 3 if session.short else 7
    rounds = rounds or max(least, min(100, int((0.02 if session.dry else SECONDS) / max(sum(once.values()), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    with timing.no_collection():
        for i in range(rounds):
            for name in list(runs)[:: 1 if i % 2 == 0 else -1]:
                run, calls = runs[name]
                times[name].append(stopwatch(session.device, run) / calls)
    return {name: sorted(found)[len(found) // 2] for name, found in times.items()}


def captured(device: str, run: Run) -> Run:
    """The same as one CUDA graph."""
    if device == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth(session: Session) -> float:
    """Bytes read and written per second by a large copy."""
    x = torch.empty(2**16 if session.dry else 2**30, dtype=torch.uint8, device=session.device)
    y = torch.empty_like(x)
    found = alternate(session, {"copy": (lambda: y.copy_(x), 1)}, rounds=20)
    return 2 * x.numel() / found["copy"]
