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

# how a reduction may stand in a file: one node with a function beside it, plain ops, or one node for the plugin alone
FUNCTIONS, PLAIN, PLUGIN, BOTH = "functions", "plain", "plugin", "both"
FILE_FORMS = (FUNCTIONS, PLAIN, PLUGIN, BOTH)


@dataclass(frozen=True)
class Target:
    """What one runtime takes.

    forms: how the reductions are written. opset: the default; newest_opset: the last one it reads. file: how a reduction
    stands in its file by default, see `FILE_FORMS`. forbidden: ops it refuses, or op:reduction for one form of an op.
    top_k: the largest K of its TopK. rules: the rewrites of `simplify.py`, for models with and without reductions alike.
    tensorrt: the TensorRT version it is known by, "" for other runtimes. sm: compute capabilities of its devices.
    """

    name: str
    forms: Forms
    opset: int = 20
    newest_opset: int = NEWEST_OPSET
    file: str = FUNCTIONS
    forbidden: frozenset[str] = DYNAMIC
    top_k: int | None = None
    rules: tuple[str, ...] = ()
    tensorrt: str = ""
    sm: tuple[int, ...] = ()


SCATTERS = frozenset(f"{op}:{how}" for op in ("ScatterElements", "ScatterND") for how in ("add", "mul", "max", "min"))
# from 10.7 on a registered plugin is preferred to the function of the same name: one file serves with and without
TENSORRT = Target(
    "tensorrt",
    FORMS["tensorrt"],
    forbidden=DYNAMIC | SCATTERS,
    top_k=3840,
    rules=("hidden_rows",),
    tensorrt="10.7",
    sm=(80, 86, 89, 90, 100, 120),
)

# in this order: head_mean, row_bias_channel and look_up pass by the reshapes that the others leave and reshape_once takes out
RULES = (
    "hidden_rows", "split_qkv", "transpose_whole", "lp_norm", "slice_last", "drop_batch", "reshape_once", "head_mean",
    "row_bias_channel", "look_up",
)  # fmt: skip

TARGETS = {
    t.name: t
    for t in (
        Target("onnxruntime", FORMS["onnxruntime"], rules=RULES),
        TENSORRT,
        # before 10.7 the function would win over the plugin, so there is a file for each
        replace(TENSORRT, name="tensorrt_10", tensorrt="10.0", newest_opset=20, file=BOTH),
        replace(TENSORRT, name="tensorrt_11", tensorrt="11.0"),
        replace(TENSORRT, name="tensorrt_rtx", tensorrt="1.7", sm=(75, 80, 86, 89, 120, 121)),
        replace(TENSORRT, name="jetpack6", tensorrt="10.3", newest_opset=20, file=BOTH, sm=(87,)),
        replace(TENSORRT, name="jetpack7", tensorrt="10.13", sm=(87, 110)),
    )
}


def get_target(name: str) -> Target:
    """The target of that name, in which - is _. Raises: ExportError with the nearest names."""
    wanted = str(name).replace("-", "_")
    if wanted not in TARGETS:
        near = difflib.get_close_matches(wanted, TARGETS, 2, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TARGETS)}"
        raise ExportError(f"unknown target {name!r}; {hint}")
    return TARGETS[wanted]


def check_opset(opset: int | None, target: Target) -> int:
    """The opset to write. Raises: ExportError for one that cannot be written, or that the target cannot read."""
    if opset is None:
        return target.opset
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(f"opset={opset!r} cannot be written: it is {OLDEST_OPSET} to {NEWEST_OPSET}")
    if opset > target.newest_opset:
        raise ExportError(
            f"opset={opset} is newer than what {target.name} (TensorRT {target.tensorrt}) reads\n"
            f"  what to do: opset={target.newest_opset} or lower; the default is {target.opset}"
        )
    return opset


def file_form(form: str | None, inline: bool, target: Target) -> str:
    """How reductions are written. Raises: ExportError for a form that is none, or one this runtime has no plugin for."""
    form = (PLAIN if inline else target.file) if form is None else form
    if form not in FILE_FORMS:
        raise ExportError(f"form={form!r} is none of {', '.join(FILE_FORMS)}")
    if form in (PLUGIN, BOTH) and not target.tensorrt:
        raise ExportError(f"form={form!r} is for TensorRT: {target.name} has no such plugin; use functions or plain")
    if inline and form != PLAIN:
        raise ExportError(f"inline=True is form='plain', not form={form!r}")
    return form
