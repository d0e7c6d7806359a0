"""How far token reduction moves a really trained model, on photographs, at equal FLOPs.

    python -m benchmarks quality --data ../shared/data --n 300

DINOv2 ViT-S/14 with a saliency head (`tokcompile.demo.weights`). Budgets are shares of the FLOPs of the backbone: the
head reads every position and costs the same for all. Everything is compared with the full model on the same images, so
differences between methods are paired. The data folder holds `caltech101.csv` with the columns path, part ("gallery" or
"query") and label; another folder with such a file works too.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, one_hot

import tokcompile
from benchmarks.common import RESULTS, environment, names, numbers, save, table
from tokcompile import bench
from tokcompile.demo import weights
from tokcompile.errors import BudgetError
from tokcompile.recipe import get_method

Array = np.ndarray[Any, Any]
Batch = tuple[list[Path], Tensor]
Values = list[dict[str, list[float]]]

BUDGETS = (0.85, 0.7, 0.5)
METHODS = ("tome", "pitome", "topk", "evit", "divprune", "dart", "grid", "random")
TWINS = ("tome", "dart")  # random selection is measured at their blocks and counts too; topk and evit share random's
GRID = weights.SIZE // weights.PATCH
METRICS = ("cls", "tokens", "saliency", "agree", "correct")
SHOWN = {"cls": "CLS cosine", "tokens": "token cosine", "saliency": "saliency error", "agree": "agreement"}
COMPARED = ("cls", "saliency", "agree")
RIDGES = tuple(10.0**e for e in range(-2, 5))


@dataclass
class Case:
    """One way to spend a budget. left: tokens after each reduction. values: one number per image and metric."""

    method: str
    budget: float
    flops: float
    left: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    note: str = ""
    grid: int = GRID
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METRICS})
    program: Any = None

    @property
    def name(self) -> str:
        return f"{self.method} ({self.grid * weights.PATCH} px)" if self.method == "smaller input" else self.method


class Backbone(nn.Module):
    """pixels: (B, 3, H, W) -> the features after the final norm: (B, 1 + N, D), class token first."""

    def __init__(self, model: weights.SaliencyViT):
        super().__init__()
        self.backbone = model.backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels).last_hidden_state


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; where the data is missing it says so and measures nothing."""
    args = arguments(argv)
    listing = args.data / "caltech101.csv"
    if not listing.is_file():
        print(f"quality: skipped, there is no {listing}; name a folder that has one with --data")
        return 0
    with bench.torch_threads(1), torch.no_grad():
        run(args, listing)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with caltech101.csv")
    parser.add_argument("--n", type=int, default=300, help="query images, evenly over the classes")
    parser.add_argument("--gallery", type=int, default=10, help="gallery images per class, for the linear head")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--budgets", type=numbers, default=BUDGETS, help="comma-separated shares of the FLOPs")
    parser.add_argument("--methods", type=names, default=METHODS)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the batch in hand after so long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def run(args: argparse.Namespace, listing: Path) -> None:
    start, where = time.perf_counter(), environment()
    model = weights.load_saliency_vit()
    gallery, query = part(listing, "gallery"), part(listing, "query")
    head = linear_head(model, gallery[: args.gallery * len({label for _, label in gallery})], args.batch)
    print(f"linear head: {head.text}; {time.perf_counter() - start:.0f} s", flush=True)
    cases, errors = build(model, args)
    print(f"{len(cases)} programs; {time.perf_counter() - start:.0f} s", flush=True)
    done, wanted, text = 0, query[: args.n], ""
    for measured in measure_all(Job(model, head, cases, args.batch), list(batches(wanted, args.batch)), args.workers):
        for case, values in zip(cases, measured, strict=True):
            for name, one in values.items():
                case.values[name] += one
        done = len(cases[0].values["cls"])
        data, text = results(cases, errors, head, done)
        save(args.out, "quality", {**data, "environment": where}, text)
        print(f"{done} of {len(wanted)} images; {time.perf_counter() - start:.0f} s", flush=True)
        if time.perf_counter() - start > 60 * args.minutes:
            break
    print(text)


def part(listing: Path, name: str) -> list[tuple[Path, int]]:
    """The images of one part with their labels, dealt out evenly: the first of every class, then the second, ..."""
    classes: dict[int, list[tuple[Path, int]]] = {}
    with listing.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] == name:
                label = int(row["label"])
                classes.setdefault(label, []).append((listing.parent / row["path"], label))
    dealt = chain.from_iterable(zip_longest(*(classes[label] for label in sorted(classes))))
    return [item for item in dealt if item is not None]


def batches(items: Sequence[tuple[Path, int]], size: int) -> Iterator[Batch]:
    for first in range(0, len(items), size):
        paths, labels = zip(*items[first : first + size], strict=True)
        yield list(paths), torch.tensor(labels)


def pixels(path: Path, size: int) -> Tensor:
    """(3, size, size): the short side at 8/7 of the size (256 for 224), bicubic, centre crop, ImageNet mean and std."""
    image = weights.read_image(path)
    scale = round(size * 256 / 224) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), 3).crop((left, top, left + size, top + size))  # 3 is bicubic
    values = (np.asarray(image, np.float32) / 255 - np.array(weights.MEAN, np.float32)) / np.array(weights.STD, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)


def load(paths: Sequence[Path], size: int, batch: int) -> Tensor:
    """(batch, 3, size, size); the last image is repeated where there are fewer, because programs fix the batch."""
    padded = [*paths, *[paths[-1]] * (batch - len(paths))]
    return torch.stack([pixels(path, size) for path in padded])


@dataclass
class Head:
    """A linear classifier on class-token features: mean and scale: (D,), weight: (D, classes), bias: (classes,)."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    text: str

    def __call__(self, features: Tensor) -> Tensor:
        scores = ((features - self.mean) / self.scale).double() @ self.weight + self.bias
        return scores.argmax(-1)


def linear_head(model: weights.SaliencyViT, gallery: Sequence[tuple[Path, int]], batch: int) -> Head:
    """Ridge regression on one-hot labels, in closed form; the ridge with the best leave-one-out accuracy."""
    backbone = Backbone(model)
    parts = [(backbone(load(p, weights.SIZE, len(p)))[:, 0], y) for p, y in batches(gallery, batch)]
    features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    x, y = ((features - mean) / scale).double(), one_hot(labels).double()
    bias = y.mean(0)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best = None
    for ridge in RIDGES:
        shrink = s**2 / (s**2 + ridge)
        fitted = (u * shrink) @ (u.T @ (y - bias))
        lever = ((u**2) @ shrink + 1 / len(x))[:, None]
        left_out = y - (y - bias - fitted) / (1 - lever).clamp_min(1e-9)
        accuracy = (left_out.argmax(1) == labels).double().mean().item()
        if best is None or accuracy > best[0]:
            best = accuracy, ridge, v.T @ ((s / (s**2 + ridge))[:, None] * (u.T @ (y - bias)))
    assert best is not None
    text = f"{len(x)} gallery images, {y.shape[1]} classes, ridge {best[1]:g}, leave-one-out accuracy {best[0]:.3f}"
    return Head(mean, scale, best[2], bias, text)


def build(model: weights.SaliencyViT, args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """All cases with their programs, and what could not be built, with the reason."""
    example = torch.zeros(args.batch, 3, weights.SIZE, weights.SIZE)
    source = torch.export.export(Backbone(model).eval(), (example,), strict=False)
    same = tokcompile.optimize(source, method="tome", budget=1.0)
    cases, errors = [Case("r = 0", 1.0, 1.0, program=same)], []
    for budget in args.budgets:
        for method in args.methods:
            try:
                case = reachable(source, method, budget)
            except BudgetError as error:
                errors.append(f"{method} at {budget}: not reachable, {error}")
                continue
            cases.append(case)
            if method in TWINS:
                cases.append(random_twin(source, case))
    return cases + smaller_inputs(model, same.report.original_flops, args), errors


def reachable(source: Any, method: str, budget: float) -> Case:
    """The method at its own blocks, or, where those cannot meet the budget, all of them so much earlier that they can.

    Raises: BudgetError.
    """
    recipe = get_method(method)
    first = int(recipe.place == "block")  # before block 0 there is no attention to read
    own = list(recipe.steps.blocks(12))
    for earlier in range(own[-1] - first + 1):
        where = sorted({max(first, block - earlier) for block in own})
        try:
            made = tokcompile.optimize(source, method=recipe, budget=tokcompile.Flops(budget), where=where)
        except BudgetError as error:
            reason = error
            continue
        note = f"where={where} instead of {own}, which cannot meet the budget" if earlier else ""
        return case_of(made, method, budget, note)
    raise reason


def case_of(made: tokcompile.OptimizedModel, method: str, budget: float, note: str = "") -> Case:
    steps = made.plan.reductions
    return Case(method, budget, made.report.flops_ratio, [r.k for r in steps], [r.block for r in steps], note, program=made)


def random_twin(source: Any, case: Case) -> Case:
    """Random selection at the blocks and counts of another method."""
    plan = case.program.plan.replace(method="random", options={})
    return case_of(tokcompile.optimize(source, plan=plan), f"random as {case.method}", case.budget)


def smaller_inputs(model: weights.SaliencyViT, full: int, args: argparse.Namespace) -> list[Case]:
    """The untouched model at the input sizes around every budget; in between, results are interpolated."""
    costs = {}
    for grid in range(GRID - 1, 1, -1):
        costs[grid] = flops(model, grid, args.batch) / full
        if costs[grid] <= min(args.budgets):
            break
    return [Case("smaller input", cost, cost, [g * g], grid=g, program=Backbone(model)) for g, cost in costs.items()]


def flops(model: weights.SaliencyViT, grid: int, batch: int) -> int:
    example = torch.zeros(1, 3, grid * weights.PATCH, grid * weights.PATCH)
    return batch * tokcompile.optimize(Backbone(model).eval(), (example,), budget=1.0).report.original_flops


@dataclass
class Job:
    """What every batch of images is measured with."""

    model: weights.SaliencyViT
    head: Head
    cases: Sequence[Case]
    batch: int


_job: list[Job] = []  # forked workers find the job, with its programs, here


def measure_all(job: Job, parts: Sequence[Batch], workers: int) -> Iterator[Values]:
    """The values of every batch, in order. More than one worker needs fork (Linux): programs cannot be pickled."""
    _job[:] = [job]
    if workers == 1:
        yield from map(measure, parts)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(measure, parts)


@torch.no_grad()
def measure(part: Batch) -> Values:
    """For each case and metric one value per image."""
    (job,), (paths, labels) = _job, part
    model, head, count = job.model, job.head, len(paths)
    inputs = {grid: load(paths, grid * weights.PATCH, job.batch) for grid in {case.grid for case in job.cases}}
    full = Backbone(model)(inputs[GRID])[:count]
    full_saliency, full_class = saliency(model, full), head(full[:, 0])
    measured = []
    for case in job.cases:
        features = case.program(inputs[case.grid])[:count]
        predicted = head(features[:, 0])
        found = {
            "cls": cosine_similarity(features[:, 0], full[:, 0], dim=-1),
            "tokens": cosine_similarity(on_full_grid(features), full[:, 1:], dim=-1).mean(1),
            "saliency": (saliency(model, features) - full_saliency).abs().mean((1, 2, 3)),
            "agree": predicted == full_class,
            "correct": predicted == labels,
        }
        measured.append({name: values.double().tolist() for name, values in found.items()})
    return measured


def as_grid(features: Tensor) -> Tensor:
    """(B, 1 + N, D) -> (B, D, sqrt(N), sqrt(N))."""
    side = round((features.shape[1] - 1) ** 0.5)
    return features[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def on_full_grid(features: Tensor) -> Tensor:
    """Patch features (B, 256, D); those of a smaller input are interpolated."""
    return interpolate(as_grid(features), (GRID, GRID), mode="bilinear").flatten(2).transpose(1, 2)


def saliency(model: weights.SaliencyViT, features: Tensor) -> Tensor:
    """(B, 1, 224, 224); a smaller input is decoded at its own size and the picture then enlarged."""
    grid = as_grid(features)
    size = grid.shape[-1] * weights.PATCH
    picture = torch.sigmoid(model.decoder(grid, (size, size)))
    return interpolate(picture, (weights.SIZE, weights.SIZE), mode="bilinear")


def results(cases: Sequence[Case], errors: Sequence[str], head: Head, n: int) -> tuple[dict[str, Any], str]:
    """The data for JSON and the markdown text."""
    rows, differences = [], []
    for case in cases:
        shown = [spread(case.values[name], 4 if name == "saliency" else 3) for name in (*SHOWN, "correct")]
        left = case.left[-1] if case.left else GRID**2
        rows.append([f"{case.budget:.2f}", case.name, f"{case.flops:.3f}", left, *shown])
        if case.method not in ("r = 0", "smaller input", "random"):
            differences.append(compared(case, cases))
    differences += [compared(case, cases) for case in cases if case.method == "random"]
    differences.sort(key=lambda row: -float(row[0]))
    text = table(["budget", "method", "FLOPs", "left", *SHOWN.values(), "accuracy"], rows)
    others = [f"{SHOWN[name]} - {other}" for other in ("random", "smaller input") for name in COMPARED]
    titles = ["budget", "method", *others]
    text += "\n\n" + table(titles, differences)
    notes = [f"{c.method} at {c.budget}: {c.note}" for c in cases if c.note] + list(errors)
    text += "".join(f"\n\n{line}" for line in [f"n = {n} images; {head.text}.", *notes])
    data = {"n": n, "head": head.text, "notes": notes, "rows": [record(case) for case in cases]}
    data["differences"] = [dict(zip(titles, row, strict=True)) for row in differences]
    return data, text


def record(case: Case) -> dict[str, Any]:
    found = {name: {"mean": float(np.mean(v)), "se": error_of(np.array(v))} for name, v in case.values.items()}
    own = {name: getattr(case, name) for name in ("budget", "flops", "blocks", "left")}
    return {"method": case.name, **own, **found}


def error_of(values: Array) -> float:
    """The standard error of a mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def spread(values: Sequence[float] | Array, digits: int) -> str:
    array = np.asarray(values)
    return f"{array.mean():.{digits}f} ± {error_of(array):.{digits}f}"


def compared(case: Case, cases: Sequence[Case]) -> list[str]:
    """The paired differences to random selection at the same budget and to a smaller input of the same FLOPs."""
    drawn = next((c for c in cases if c.method == "random" and c.budget == case.budget), case)
    smaller = {name: smaller_at(case.flops, cases, name) for name in COMPARED}
    cells = []
    for rival in ({} if drawn is case else drawn.values, smaller):
        for name in COMPARED:
            other, digits = rival.get(name), 4 if name == "saliency" else 3
            cells.append("" if other is None else signed(np.array(case.values[name]) - np.array(other), digits))
    return [f"{case.budget:.2f}", case.name, *cells]


def signed(values: Array, digits: int) -> str:
    return f"{values.mean():+.{digits}f} ± {error_of(values):.{digits}f}"


def smaller_at(flops: float, cases: Sequence[Case], name: str) -> Array | None:
    """The values of a smaller input at these FLOPs, interpolated image by image between the two nearest sizes."""
    sizes = sorted((c for c in cases if c.method in ("smaller input", "r = 0")), key=lambda c: c.flops)
    for low, high in pairwise(sizes):
        if low.flops <= flops <= high.flops:
            share = (flops - low.flops) / (high.flops - low.flops)
            return (1 - share) * np.array(low.values[name]) + share * np.array(high.values[name])
    return None


if __name__ == "__main__":
    raise SystemExit(main())
