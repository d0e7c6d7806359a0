"""Compiling and exporting the models of the demo, in worker processes because tracing keeps one core busy for long."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokcompile
from tokcompile.demo import weights
from tokcompile.demo.trackers import Stage, follow, per_block
from tokcompile.errors import BudgetError, TokcompileError
from tokcompile.files import atomic
from tokcompile.recipe import get_method

DEPTH = 12  # blocks of the demo model
FEWEST = 16  # with fewer patch tokens left than this a method reduces earlier instead
ORIGINAL, SMALLER = "original", "smaller input"


@dataclass(frozen=True)
class Job:
    """One model to build: a method at a FLOPs budget, or the original itself at its own or at a smaller size."""

    method: str
    budget: float = 1.0
    size: tuple[int, int] = weights.WHOLE

    @property
    def name(self) -> str:
        if self.method == ORIGINAL:
            return ORIGINAL
        kind = self.method if self.method != SMALLER else f"input-{pixels(self.size)}"
        return f"{kind}-flops-{self.budget:g}"


@dataclass
class Built:
    """What came of a job. tokens: patch tokens leaving each block. note: why it is not the method's default.

    twin: a file with random selection at the same blocks and counts, which tells what choosing costs.
    """

    job: Job
    file: str
    flops: int
    overhead_flops: int
    tokens: list[int]
    stages: list[Stage]
    plan: dict[str, Any]
    error: float
    bytes: int
    note: str = ""
    twin: str = ""


def pixels(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def build_all(jobs: Sequence[Job], folder: Path, spare: Path, photograph: torch.Tensor, workers: int) -> Iterator[Built]:
    """Yields each model as it is finished. spare: where the twins go. photograph: (1, 3, 224, 224), to follow the tokens on.

    Raises: TokcompileError.
    """
    if workers == 1:
        builder = Builder(photograph)
        yield from (builder.build(job, folder, spare) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (photograph.numpy(),))
    try:
        for future in as_completed([pool.submit(work, job, folder, spare) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise TokcompileError(f"a worker process ended early, perhaps for want of memory ({error})") from error
    finally:
        pool.shutdown(cancel_futures=True)


_builder: list[Builder] = []


def start_worker(photograph: Any) -> None:
    torch.set_num_threads(1)
    _builder.append(Builder(torch.from_numpy(photograph)))


def work(job: Job, folder: Path, spare: Path) -> Built:
    return _builder[0].build(job, folder, spare)


class Builder:
    """Holds the trained model, exported once, from which every method starts."""

    def __init__(self, photograph: torch.Tensor):
        self.photograph = photograph
        self.model = weights.load_saliency_vit()
        self.program: Any = None

    def build(self, job: Job, folder: Path, spare: Path) -> Built:
        """Optimizes, exports and verifies one model and writes its plan."""
        optimized, note = self.optimize(job)
        report = optimized.export_onnx(folder / f"{job.name}.onnx")
        plan = json.loads(optimized.plan.json())
        stages = follow(optimized, self.photograph) if job.size == weights.WHOLE else []
        if stages:
            save_text(folder / f"plan-{job.name}.json", optimized.plan.json() + "\n")
        costs = optimized.report
        depth, patches = len(costs.blocks), job.size[0] * job.size[1] // weights.PATCH**2
        tokens = per_block(stages, depth, patches)
        return Built(
            job, f"{job.name}.onnx", costs.flops, costs.overhead_flops, tokens, stages, plan, report.error or 0.0,
            report.bytes, note, self.twin(optimized, job, spare),
        )  # fmt: skip

    def twin(self, optimized: tokcompile.OptimizedModel, job: Job, spare: Path) -> str:
        """Writes random selection at the blocks and counts of a method whose schedule is not that of random itself."""
        random = get_method("random")
        if not optimized.plan.reductions or same_schedule(get_method(job.method), random):
            return ""
        file = spare / f"{job.name}.onnx"
        plan = optimized.plan.replace(method=random.name, options={})
        tokcompile.optimize(self.program, plan=plan).export_onnx(file, verify=False)
        return str(file)

    def optimize(self, job: Job) -> tuple[tokcompile.OptimizedModel, str]:
        """The optimized model, and why it reduces elsewhere than the method does by default."""
        if job.size != weights.WHOLE:
            example = torch.zeros(1, 3, *job.size)
            return tokcompile.optimize(self.model, (example,), method="random", budget=1.0), ""
        if self.program is None:  # passing the program instead of the model saves tracing it for each method
            with torch.no_grad():
                self.program = torch.export.export(self.model, (self.photograph,), strict=False)
        if job.method == ORIGINAL:
            return tokcompile.optimize(self.program, method="random", budget=1.0), ""
        return within_budget(self.program, job)


def same_schedule(one: tokcompile.Recipe, other: tokcompile.Recipe) -> bool:
    a, b = one.steps, other.steps
    return one.place == other.place and a.counts is b.counts and list(a.blocks(DEPTH)) == list(b.blocks(DEPTH))


def within_budget(program: Any, job: Job) -> tuple[tokcompile.OptimizedModel, str]:
    """The method at its own blocks, or at half their depth where the budget cannot be met or leaves hardly a token."""
    recipe = get_method(job.method)
    own = where = list(recipe.steps.blocks(DEPTH))
    reasons: list[str] = []
    while where[-1] > 0 and len(reasons) < 3:
        try:
            made = tokcompile.optimize(program, method=recipe, budget=tokcompile.Flops(job.budget), where=where)
        except BudgetError as error:
            reasons.append(str(error))
        else:
            if made.plan.reductions[-1].k >= FEWEST:
                return made, moved_note(job, own, where, reasons)
            reasons.append(f"only {made.plan.reductions[-1].k} tokens would be left")
        first = int(recipe.place == "block")  # block 0 has no attention before it that could be read
        where = sorted({max(first, block // 2) for block in where})
    raise BudgetError(f"{job.method} does not reach Flops({job.budget:g}): {reasons[-1]}")


def moved_note(job: Job, own: list[int], where: list[int], reasons: list[str]) -> str:
    if not reasons:
        return ""
    moved = f"{job.method} at {job.budget:g} reduces at blocks {listed(where)} instead of its own {listed(own)}"
    return f"{moved}: {reasons[0].partition(':')[0]}"


def listed(blocks: list[int]) -> str:
    """[0, 1, 2] as "0-2" and [3, 6, 9] as "3, 6, 9"."""
    run = len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1))
    return f"{blocks[0]}-{blocks[-1]}" if run else ", ".join(map(str, blocks))


def save_text(path: Path, text: str) -> None:
    """Writes a small file, whole or not at all."""
    with atomic(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
