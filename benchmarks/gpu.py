"""The CUDA kernels and whole models on a GPU: built, checked, sanitized and timed, in order of importance.

    python -m benchmarks gpu --out build/benchmarks/gpu.json --minutes 9
    python benchmarks/gpu.py --out results.json --quick
    python benchmarks/gpu.py --parts build,check,headline      # the kernels alone
    python benchmarks/gpu.py --parts build,prefill             # 7B-class language models alone, about 40 GB

Needs torch, numpy and, for the kernels, nvcc; no network, no installed tokcompile (from a plain checkout it makes a
temporary folder of links in which the package lies as it is imported), no TensorRT (trtexec is used when found). Results
are saved after every row; what fails is recorded and the rest goes on. --dry-run goes every way on the CPU at tiny sizes,
over the kernels' host build where TOKCOMPILE_HOST_KERNELS names it. Exit: 0, 1 where a check or a part failed, 2 without
a GPU.

Times are medians over alternating variants. `graph`: in a CUDA graph, so without the cost of launching from Python;
`call`: called from Python. Inputs rotate through copies, larger than the L2 cache together where they are not tiny.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def find_package() -> None:
    """Makes `import tokcompile` work from a plain checkout, whose folders lie elsewhere than the package says."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [str(ROOT), *(p for p in sys.path if p not in (here, str(ROOT)))]
    try:
        importlib.import_module("tokcompile")
        return
    except ModuleNotFoundError:
        for name in [name for name in sys.modules if name.split(".")[0] == "tokcompile"]:
            del sys.modules[name]
    folder = Path(tempfile.mkdtemp(prefix="tokcompile-"))
    atexit.register(shutil.rmtree, folder, True)
    (folder / "tokcompile").mkdir()
    for entry in [*(ROOT / "tokcompile").iterdir(), ROOT / "passes", ROOT / "plugins", ROOT / "exports"]:
        (folder / "tokcompile" / entry.name).symlink_to(entry)
    sys.path.insert(0, str(folder))


find_package()

import torch  # noqa: E402

from benchmarks import gpu_checks, gpu_kernels, gpu_models, gpu_prefill, gpu_profile  # noqa: E402
from benchmarks.common import RESULTS, environment, names, save, table  # noqa: E402
from benchmarks.gpu_session import Session, copy_bandwidth  # noqa: E402
from tokcompile.plugins import torch_library, torch_ops  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "benchmarks gpu needs a CUDA device and a torch built for it; --dry-run goes through it on the CPU.",
            file=sys.stderr,
        )
        return 2
    device = "cpu" if args.dry_run else "cuda"
    if args.sanitize_child:
        return gpu_checks.sanitized(device)
    session = Session(args, device, time.monotonic() + 60 * args.minutes, {**environment(), **hardware(device)}, write)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in args.parts:
            run_part(session, name)
    print("\n" + markdown(session))
    return 1 if failed(session) else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="a .json file, or a folder; .md goes beside it")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further row is begun")
    parser.add_argument("--parts", type=names, default=list(PARTS), help=f"of {', '.join(PARTS)}, in this order")
    parser.add_argument("--quick", action="store_true", help="the headline figures only")
    parser.add_argument("--dry-run", action="store_true", help="every path at tiny sizes on the CPU; the figures mean nothing")
    parser.add_argument("--sanitize-child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"{unknown[0]} is none of {', '.join(PARTS)}")
    if args.out.suffix != ".json":
        args.out = args.out / "gpu.json"
    return args


def run_part(session: Session, name: str) -> None:
    """One part, whose failure is noted and ends only itself."""
    start, part = time.monotonic(), session.part(name)
    if session.left() <= 0:
        part["errors"].append({"error": "not begun: the time was up"})
        return
    try:
        PARTS[name](session)
    except Exception as error:
        session.fail(name, name, error)
    part["seconds"] += time.monotonic() - start
    write(session)


def failed(session: Session) -> bool:
    wrong = [row for part in session.parts.values() for row in part["rows"] if row.get("ok") is False]
    return bool(wrong) or any("trace" in e for part in session.parts.values() for e in part["errors"])


def hardware(device: str) -> dict[str, Any]:
    """The GPU, its driver, and the CUDA of torch and of nvcc."""
    found: dict[str, Any] = {"CUDA of torch": torch.version.cuda or "none"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        found["driver"] = said("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    nvcc = torch_library.find_nvcc()
    found["nvcc"] = said(nvcc, "--version").splitlines()[-1] if nvcc else "none"
    return found


def said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def build(session: Session) -> None:
    """The library, and the bandwidth that floors are reckoned with."""
    session.bandwidth = copy_bandwidth(session)
    session.environment["copy bandwidth"] = f"{session.bandwidth / 1e9:.0f} GB/s"
    start = time.monotonic()
    if not session.dry and not os.environ.get("TOKCOMPILE_KERNELS"):
        torch_library.build()
    seconds = time.monotonic() - start
    loaded = torch_ops.library(session.device) is not None
    session.add("build", {"kernels": "loaded" if loaded else "none", "seconds": seconds, "ok": loaded or session.dry})


# in order of importance: the time may be up before the last
PARTS: dict[str, Callable[[Session], None]] = {
    "build": build,
    "check": gpu_checks.check,
    "headline": gpu_kernels.headline,
    "profile": gpu_profile.profile,
    "attention": gpu_profile.attention,
    "prefill": gpu_prefill.prefill,
    "models": gpu_models.models,
    "sanitize": gpu_checks.sanitize,
    "more_models": gpu_models.more_models,
    "grid": gpu_kernels.grid,
    "tensorrt": gpu_models.tensorrt,
}


def write(session: Session) -> None:
    """All results so far, as JSON and markdown."""
    found = {"environment": session.environment, "bandwidth": session.bandwidth, "parts": session.parts}
    save(session.args.out.parent, session.args.out.stem, {**found, "targets": targets(session)}, markdown(session))


def rows_of(session: Session, *parts: str) -> list[dict[str, Any]]:
    return [row for name in parts if name in session.parts for row in session.parts[name]["rows"]]


def targets(session: Session) -> list[dict[str, Any]]:
    """Every target with what was measured; none where nothing was."""
    kernels, whole_models = rows_of(session, "headline", "grid"), rows_of(session, "models", "more_models")
    dart = [r for r in kernels if (r["method"], r["text"], r["B"], r["N"], r["D"]) == ("dart", 0, 1, 2880, 4096)]
    merging = [r for r in kernels if r["method"] in ("tome", "pitome")]
    large = [r for r in whole_models if r["B"] >= 8 and r["method"] != "A/A"]
    long = [r for r in rows_of(session, "prefill") if r["method"] == "dart"]
    at = "DART N 2880 D 4096 B 1:"
    found: list[tuple[str, list[dict[str, Any]], str, Callable[[dict[str, Any]], bool]]] = [
        (f"{at} within 3x of the floor or 15 us", dart, "graph us", lambda r: r["graph us"] <= max(3 * r["floor us"], 15)),
        (f"{at} >= 10x faster than eager", dart, "eager over kernel", lambda r: r["eager over kernel"] >= 10),
        ("match and merge: >= 5x faster than eager", merging, "eager over kernel", lambda r: r["eager over kernel"] >= 5),
        ("whole model, batch >= 8: within 5 % of the FLOPs ratio", large, "over flops", lambda r: r["over flops"] <= 0.05),
        ("prefill, 88.9 % removed: within 5 % of the FLOPs ratio", long, "over flops", lambda r: r["over flops"] <= 0.05),
        ("prefill: within 3 % of what its layers take alone", long, "over layers", lambda r: r["over layers"] <= 0.03),
    ]
    return [
        {"target": text, "met": sum(map(test, rows)), "of": len(rows), "measured": sorted(round(r[key], 3) for r in rows)}
        for text, rows, key, test in found
    ]


def markdown(session: Session) -> str:
    """The environment, the targets, and a table and the failures of every part."""
    blocks = [
        "\n".join(f"- {name}: {value}" for name, value in session.environment.items()),
        table(
            ["target", "met", "measured"],
            [[t["target"], f"{t['met']} of {t['of']}", shown(t["measured"])] for t in targets(session)],
        ),
    ]
    if session.dry:
        blocks.insert(0, "**A dry run on the CPU: no figure here means anything.**")
    for name, part in session.parts.items():
        blocks.append(f"## {name} ({part['seconds']:.0f} s)")
        rows = part["rows"]
        if name == "check":
            wrong = [row for row in rows if not row["ok"]]
            near = sum(str(row.get("index", "")).startswith("near") for row in rows)
            blocks.append(
                f"{len(rows) - len(wrong)} of {len(rows)} equal the reference, {near} of them up to near ties: indices that "
                f"the reference changes too when its inputs are moved by {gpu_checks.JITTER:g}"
            )
            rows = wrong
        if rows:
            titles = list(dict.fromkeys(key for row in rows for key in row if key != "output"))
            blocks.append(table(titles, [[cell(row.get(title, "")) for title in titles] for row in rows]))
        blocks += [f"- {error['error']}" for error in part["errors"]]
    return "\n\n".join(blocks)


def shown(values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    if len(values) <= 6:
        return ", ".join(map(str, values))
    return f"{values[0]} to {values[-1]}, median {values[len(values) // 2]}"


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
