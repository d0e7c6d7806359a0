#!/usr/bin/env python3
"""Compares the engine's outputs with those that PyTorch gave when the bundle was made. Exit code 1 where one is off.

With --backend onnxruntime the plain ONNX file runs instead, on the CPU: no GPU, no TensorRT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, BundleError, check_engine, choose_engine, load, main_of, plugin_of, read_manifest


def main() -> int:
    args = parse()
    manifest = read_manifest()
    tolerance = manifest["tolerance"][args.backend] if args.tolerance is None else args.tolerance
    engine = choose_engine(manifest, args.engine, args.plain)
    if args.backend == "onnxruntime" and "plain" not in manifest["models"]:
        raise BundleError("this bundle has no model.plain.onnx, and onnxruntime cannot run the plugin")
    what = ROOT / manifest["models"]["plain"] if args.backend == "onnxruntime" else engine
    if args.dry_run:
        print(f"{len(manifest['files'])} files are as manifest.json says")
        print(f"would run {what} with {args.backend} on {len(manifest['goldens'])} golden inputs")
        print(f"would allow a difference of {tolerance:g} of an output's largest value")
        return 0
    try:
        import numpy as np  # noqa: F401
    except ImportError:
        raise BundleError("numpy is missing: see README.md, 3. Python packages") from None
    if args.backend == "tensorrt":
        check_engine(engine)
    rows = list(compare(manifest, tolerance, infer_with(args.backend, what, manifest)))
    if args.json:
        print(json.dumps({"file": str(what), "backend": args.backend, "tolerance": tolerance, "outputs": rows}, indent=2))
    else:
        show(rows, what, tolerance)
    return 0 if all(row["ok"] for row in rows) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("tensorrt", "onnxruntime"), default="tensorrt", help="default tensorrt")
    parser.add_argument("--tolerance", type=float, metavar="X", help="instead of the manifest's, for all outputs")
    parser.add_argument("--plain", action="store_true", help="take the engine without plugins")
    parser.add_argument("--engine", metavar="FILE", help="take this engine, which build.sh made")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--dry-run", action="store_true", help="check the manifest and say what would be done")
    return parser.parse_args()


def infer_with(backend: str, path: Path, manifest: dict) -> Callable[[dict], dict]:
    """A function from input arrays to output arrays, by name."""
    if backend == "tensorrt":
        from engine import Engine

        return Engine(path, plugin_of(path), manifest).infer
    try:
        import onnxruntime as ort
    except ImportError:
        raise BundleError("onnxruntime is missing: pip install onnxruntime") from None
    if "bfloat16" in {row["dtype"] for kind in ("inputs", "outputs") for row in manifest[kind]}:
        raise BundleError("onnxruntime's CPU kernels lack bfloat16: verify this bundle with TensorRT")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken, names = {i.name for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    return lambda arrays: dict(zip(names, session.run(names, {n: a for n, a in arrays.items() if n in taken})))


def compare(manifest: dict, tolerance: float, infer: Callable[[dict], dict]) -> Iterator[dict]:
    """One row for each output of each golden example."""
    for number, golden in enumerate(manifest["goldens"]):
        arrays = {r["name"]: load(path, r["dtype"]) for r, path in zip(manifest["inputs"], golden["inputs"])}
        got = infer(arrays)
        for row, path in zip(manifest["outputs"], golden["outputs"]):
            largest, mean = errors(got[row["name"]], load(path, row["dtype"]), row["dtype"])
            yield {"example": number, "output": row["name"], "dtype": row["dtype"], "shape": row["shape"],
                   "error": largest, "mean_error": mean, "ok": bool(largest <= tolerance)}  # fmt: skip


def errors(got: Any, want: Any, dtype: str) -> tuple[float, float]:
    """The largest and the mean difference, as shares of the largest value; values that are no floats must be equal."""
    import numpy as np

    if got.shape != want.shape:
        return float("inf"), float("inf")
    if dtype == "bfloat16":  # the upper half of a float32
        got, want = ((a.astype(np.uint32) << 16).view(np.float32) for a in (got, want))
    elif not np.issubdtype(want.dtype, np.floating):
        return (0.0, 0.0) if np.array_equal(got, want) else (float("inf"), float("inf"))
    got, want = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where((got == want) | (np.isnan(got) & np.isnan(want)), 0.0, np.abs(got - want))
    difference = np.where(np.isnan(difference), np.inf, difference)
    scale = max(float(np.max(np.abs(want), where=np.isfinite(want), initial=0.0)), 1e-30)
    return (float(difference.max()) / scale, float(difference.mean()) / scale) if difference.size else (0.0, 0.0)


def show(rows: list, what: Path, tolerance: float) -> None:
    print(f"{what}: differences as shares of each output's largest value, {tolerance:g} allowed")
    width = max(len(row["output"]) for row in rows)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        print(f"  example {row['example']}  {row['output']:<{width}}  {row['dtype']} {shape}  largest {row['error']:.2e}  "
              f"mean {row['mean_error']:.2e}  {'ok' if row['ok'] else 'OFF'}")  # fmt: skip
    if not all(row["ok"] for row in rows):
        print("not the same: see README.md, When something fails")


if __name__ == "__main__":
    sys.exit(main_of(main))
