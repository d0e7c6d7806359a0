"""`python -m benchmarks.tiny_vlm [prepare|train|evaluate|speed|tables] [options]`, in this order: see docs/tiny-vlm.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.tiny_vlm import model
from benchmarks.tiny_vlm.evaluate import evaluate
from benchmarks.tiny_vlm.speed import speed
from benchmarks.tiny_vlm.tables import tables
from benchmarks.tiny_vlm.tower import prepare
from benchmarks.tiny_vlm.train import Settings, train

STEPS = ("prepare", "train", "evaluate", "speed", "tables")


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    if args.step in ("prepare", "train", "evaluate") and not (args.data / "caltech101.csv").is_file():
        print(f"no {args.data / 'caltech101.csv'}: nothing was done; --data names the folder that holds it", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    settings = Settings(seed=args.seed)
    if args.step == "prepare":
        for part, shards in (("train", settings.shards), ("watch", 1)):
            prepare(args.data, args.build / "features", part, range(shards), args.seed)
    elif args.step == "train":
        train(args.data, args.build, settings)
    elif args.step == "evaluate":
        evaluate(args.data, args.build, args.trained, args.only)
    elif args.step == "speed":
        speed(args.build, args.only)
    else:
        tables(args.build)
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.tiny_vlm", description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with caltech101.csv")
    parser.add_argument("--build", type=Path, default=Path("build/tiny_vlm"), help="where features, checkpoints and results go")
    parser.add_argument("--trained", type=Path, default=model.TRAINED, help="by default the file shipped here")
    parser.add_argument("--only", default="", help="for evaluate and speed: conditions whose names contain this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
