#!/usr/bin/env python3
"""Times the engine on this device: warm-up, latency percentiles, throughput. Shapes are fixed, so is the batch size."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from common import BundleError, check_engine, choose_engine, load, main_of, plugin_of, read_manifest


def main() -> None:
    args = parse()
    manifest = read_manifest()
    path = choose_engine(manifest, args.engine, args.plain)
    if args.dry_run:
        print(f"{len(manifest['files'])} files are as manifest.json says")
        print(f"would load {path}" + ("" if path.exists() else ", which ./build.sh has yet to build"))
        print(f"would run {args.warmup} calls to warm up, then {args.iterations} one by one and {args.iterations} in a row")
        for kind in ("inputs", "outputs"):
            print(f"{kind}: " + ", ".join(f"{r['name']} {r['dtype']} {r['shape']}" for r in manifest[kind]))
        return
    check_engine(path)
    found = measure(path, manifest, args)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{path.name} on {found['gpu']}, TensorRT {found['tensorrt']}, {args.iterations} calls")
    for kind, title in (("gpu_ms", "GPU"), ("host_ms", "host")):
        print(f"{title:>5}  " + "  ".join(f"{name} {found[kind][name]:.3f} ms" for name in ("p50", "p90", "p99", "mean")))
    print(f"throughput {found['calls_per_second']:.1f} calls/s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=200, metavar="N", help="timed calls (default 200)")
    parser.add_argument("--warmup", type=int, default=50, metavar="N", help="calls before that (default 50)")
    parser.add_argument("--plain", action="store_true", help="take the engine without plugins")
    parser.add_argument("--engine", metavar="FILE", help="take this engine, which build.sh made")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--dry-run", action="store_true", help="check the manifest and say what would be done")
    args = parser.parse_args()
    if args.iterations < 1 or args.warmup < 0:
        parser.error("--iterations starts at 1 and --warmup at 0")
    return args


def measure(path: Path, manifest: dict, args: argparse.Namespace) -> dict:
    """Latencies and throughput with the first golden inputs."""
    try:
        import numpy as np
    except ImportError:
        raise BundleError("numpy is missing: see README.md, 3. Python packages") from None
    from engine import Engine

    names = manifest["goldens"][0]["inputs"]
    inputs = {r["name"]: load(name, r["dtype"]) for r, name in zip(manifest["inputs"], names)}
    with Engine(path, plugin_of(path), manifest) as engine:
        engine.put(inputs)
        engine.throughput(args.warmup)
        gpu, host = engine.latencies(args.iterations)
        rate = engine.throughput(args.iterations)
        found = {"engine": str(path), "gpu": engine.device_name(), "tensorrt": engine.trt.__version__}
    for kind, times in (("gpu_ms", gpu), ("host_ms", host)):
        p50, p90, p99 = np.percentile(times, [50, 90, 99])
        found[kind] = {"p50": float(p50), "p90": float(p90), "p99": float(p99), "mean": float(np.mean(times)),
                       "min": float(min(times)), "max": float(max(times))}  # fmt: skip
    return {**found, "iterations": args.iterations, "warmup": args.warmup, "calls_per_second": rate}


if __name__ == "__main__":
    sys.exit(main_of(main))
