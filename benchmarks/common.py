"""What the benchmarks share: versions, markdown tables, and where results go."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tokcompile
from tokcompile.bench import processor
from tokcompile.files import atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("build") / "benchmarks"
PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


def environment() -> dict[str, Any]:
    """The versions and the processor that a number belongs to."""
    found = {"tokcompile": f"{tokcompile.__version__} ({commit()})", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "processor": processor()}


def commit() -> str:
    """The commit of the working tree, with + where it was changed."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "no git"


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def save(folder: Path, name: str, data: Any, text: str) -> None:
    """Writes name.json and name.md, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(data, indent=1)), (".md", text)):
        with atomic(folder / f"{name}{suffix}") as temporary:
            Path(temporary).write_text(content + "\n", encoding="utf-8")


def peak_megabytes() -> float:
    """The largest resident memory this process has had (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
