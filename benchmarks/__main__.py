"""`python -m benchmarks [quality|speed|scaling|optimize|prefill|gpu|all] [options]`; without a name, all but gpu."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "quality": "benchmarks.quality",
    "speed": "benchmarks.speed",
    "scaling": "benchmarks.scaling",
    "optimize": "benchmarks.optimize_cost",
    "prefill": "benchmarks.prefill",
    "gpu": "benchmarks.gpu",
}
ALL = [module for name, module in BENCHMARKS.items() if name != "gpu"]
USAGE = f"""usage: python -m benchmarks [{"|".join(BENCHMARKS)}|all] [options]

Without a name it runs all but gpu with their defaults, which takes hours; `all` takes only --out FOLDER.
python -m benchmarks NAME --help lists the options of one. Results go to build/benchmarks as JSON and markdown."""


def main(argv: Sequence[str]) -> int:
    name, *rest = argv or ["all"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "all" and (not rest or rest[0] == "--out"):
        return max(run(module, rest) for module in ALL)
    if name not in BENCHMARKS:
        print(USAGE, file=sys.stderr)
        return 2
    return run(BENCHMARKS[name], rest)


def run(module: str, argv: Sequence[str]) -> int:
    return importlib.import_module(module).main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
