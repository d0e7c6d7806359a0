"""The runtimes an ONNX file can be written for: data, one row each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from tokcompile.errors import ExportError
from tokcompile.primitives.forms import FORMS, Forms

# torch.onnx writes 18 and up; from 23 on it writes Attention, which takes no broadcast mask (log sizes) in onnxruntime
OLDEST_OPSET, NEWEST_OPSET = 18, 22

# their result's shape, or the work itself, depends on values: nothing about such a graph is static
DYNAMIC = frozenset({"If", "Loop", "Scan", "NonZero", "Unique", "Compress"})


@dataclass(frozen=True)
class Target:
    """What one runtime takes.

    forms: how the reductions are written. opset: the default. functions: whether it reads model-local functions.
    forbidden: ops it refuses, or op:reduction for one form of an op. top_k: the largest K of its TopK. rules: the
    rewrites of `simplify.py`, for models with and without reductions alike.
    """

    name: str
    forms: Forms
    opset: int = 20
    functions: bool = True
    forbidden: frozenset[str] = DYNAMIC
    top_k: int | None = None
    rules: tuple[str, ...] = ()


SCATTERS = frozenset(f"{op}:{how}" for op in ("ScatterElements", "ScatterND") for how in ("add", "mul", "max", "min"))
TENSORRT = Target("tensorrt", FORMS["tensorrt"], forbidden=DYNAMIC | SCATTERS, top_k=3840)

TARGETS = {
    t.name: t
    for t in (
        Target("onnxruntime", FORMS["onnxruntime"], rules=("split_qkv", "mean_first", "lp_norm", "reshape_once")),
        TENSORRT,
        replace(TENSORRT, name="tensorrt_rtx"),
        # TensorRT 10.3 prefers the function over a plugin, so its plain file has neither
        replace(TENSORRT, name="jetpack6", functions=False),
    )
}


def get_target(name: str) -> Target:
    """The target of that name. Raises: ExportError with the nearest names."""
    if name not in TARGETS:
        near = difflib.get_close_matches(str(name), TARGETS, 2, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TARGETS)}"
        raise ExportError(f"unknown target {name!r}; {hint}")
    return TARGETS[name]


def check_opset(opset: int | None, target: Target) -> int:
    """The opset to write. Raises: ExportError for one that cannot be written."""
    if opset is None:
        return target.opset
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(f"opset={opset!r} cannot be written: it is {OLDEST_OPSET} to {NEWEST_OPSET}")
    return opset
