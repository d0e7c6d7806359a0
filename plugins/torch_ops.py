"""The CUDA kernels as PyTorch ops `tokcompile::dart`, `topk`, `tome`, `pitome` and `divprune`: what `ReductionModule` runs
on a GPU, in eager mode, under torch.compile and inside CUDA graphs.

They call the C interface of kernels/launch.h in a shared library, which is built on first use (see torch_library.py) and
loaded once a process. Without nvcc or a GPU, and on the CPU, the plain PyTorch reference runs.

TOKCOMPILE_KERNELS: a library to load instead of building one, or "off". TOKCOMPILE_HOST_KERNELS: a build of the same
interface for the CPU, used on CPU tensors (for tests).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tokcompile.methods import dart, divprune, evit, fastervlm, fastv, fopru, pitome, pyramiddrop, tome, topk
from tokcompile.recipe import Recipe, Site

if TYPE_CHECKING:
    from tokcompile.passes.reduction import ReductionModule

log = logging.getLogger("tokcompile")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ALIGN = 256  # of the workspace, as launch.h asks
VECTOR = 16  # bytes that a kernel may load at once
REFUSED = 1  # cudaErrorInvalidValue: nothing was enqueued
SPANS = 128  # TC_TEXT_SPANS
ATTENTION = ("cls_attention", "last_attention", "received_attention")
SCHEMA = (
    "(Tensor x, Tensor? size, Tensor[] taps, int[] place, float[] numbers, int[] text, bool assign)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


class Shape(ctypes.Structure):
    """tc_shape."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "dtype", "batch", "length", "dim", "start", "n", "k", "unit", "tap_length", "tap_start", "heads", "head_dim",
        )
    ]  # fmt: skip


class Text(ctypes.Structure):
    """tc_text."""

    _fields_ = [("pivots", ctypes.c_int32), ("spans", ctypes.c_int32), ("edges", ctypes.c_int32 * (2 * SPANS))]


@dataclass(frozen=True)
class Kernel:
    """One entry of launch.h. taps: those it reads; an attention row of any name is read as cls_attention. sizes: whether it
    has arguments for sizes; merges: whether we use them. numbers: the C types of its own arguments, of which the first
    `sized` also go to its workspace function. options: from these numbers to the recipe and the options that mean the same.
    text: whether it has an argument for text, in both functions."""

    name: str
    taps: tuple[str, ...]
    sizes: bool
    merges: bool
    numbers: tuple[Any, ...]
    sized: int
    options: Callable[[Sequence[float]], tuple[Recipe, dict[str, Any]]]
    text: bool = False


INT, FLOAT = ctypes.c_int32, ctypes.c_float
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "dart", dart.DART.taps_read(), False, False, (INT,), 1, lambda v: (dart.DART, {"pivots": int(v[0])}), text=True,
        ),
        Kernel("topk", topk.TOPK.taps_read(), True, False, (INT,), 1, lambda v: (evit.EVIT, {"fuse": bool(v[0])})),
        Kernel("tome", tome.TOME.taps_read(), True, True, (), 0, lambda v: (tome.TOME, {})),
        Kernel(
            "pitome", pitome.PITOME.taps_read(), True, True, (INT, FLOAT, FLOAT), 1,
            lambda v: (pitome.PITOME, {"variant": "B" if v[0] else "P", "margin": v[1], "alpha": v[2]}),
        ),
        Kernel("divprune", (), False, False, (), 0, lambda v: (divprune.DIVPRUNE, {})),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """A reduction as a call of one kernel. place: n, k, unit, start, tap_start. text: how many pivots come from text, then
    where it starts and stops in the taps, (pivots, start, stop, start, ...); empty for none."""

    name: str
    place: tuple[int, ...]
    numbers: tuple[float, ...]
    text: tuple[int, ...] = ()


def kernel_for(module: ReductionModule) -> Use | None:
    """The kernel that does what a reduction's recipe does; None for a recipe that is not ours, and where none fits."""
    recipe, site, unit = module.recipe, module.site, module.unit
    try:
        found = kernel_of_plan(recipe, site)
    except (KeyError, TypeError, ValueError):  # options that make no sense: the plan itself says so better
        return None
    if found is None or not 0 < site.k < site.n:  # with nothing to remove the reference only copies
        return None
    name, numbers = found
    kernel = KERNELS[name]
    if recipe.track_size != kernel.merges or not reads(kernel, module.names):
        return None
    text = text_of(site) if kernel.text else ()
    if text and (unit > 1 or len(text) > 1 + 2 * SPANS):
        return None
    if name == "tome":  # the reference counts even and odd from site.prefix, the kernel from where the taps begin
        prefix, begin = site.prefix, module.tap_start // unit
        if (prefix % 2, prefix > 0) != (begin % 2, begin > 0):
            return None
    return Use(name, (site.n, site.k, unit, module.start, module.tap_start), numbers, text)


def reads(kernel: Kernel, names: tuple[str, ...]) -> bool:
    """Whether taps of these names are what the kernel takes."""
    return names == kernel.taps or (kernel.taps == ("cls_attention",) and len(names) == 1 and names[0] in ATTENTION)


def text_of(site: Site) -> tuple[int, ...]:
    """`Use.text` of a DART reduction."""
    count, spans = dart.text_after(site)
    return (count, *(edge for span in spans for edge in span)) if count else ()


def kernel_of_plan(recipe: Recipe, site: Site) -> tuple[str, tuple[float, ...]] | None:
    """(kernel, its numbers). The plan has to be our own function: a recipe of the same name may hold another."""
    options = site.options
    if recipe.plan is dart.plan:
        if options["text_pivots"] < 0:
            return None
        return ("dart", (float(min(options["pivots"], site.k)),)) if options["pivots"] >= 1 else None
    if recipe.plan in (topk.plan, fastv.plan, fastervlm.plan, pyramiddrop.plan):
        return "topk", (0.0,)
    if recipe.plan is fopru.plan:
        return ("topk", (0.0,)) if options["strategy"] == "rank" else None
    if recipe.plan is evit.plan:
        return "topk", (float(bool(options["fuse"])),)
    if recipe.plan is tome.plan:
        return "tome", ()
    if recipe.plan is pitome.plan:
        margin = options["margin"] * (1 - site.block / site.depth)
        return "pitome", (float(pitome.variant(site) == "B"), margin, float(options["alpha"]))
    if recipe.plan is divprune.plan:
        return "divprune", ()
    return None


def applies(use: Use, x: Tensor, size: Tensor | None, taps: Sequence[Tensor], analysing: bool) -> bool:
    """Whether the op stands for the reduction here. analysing: whether the compiler is still learning what the plan does.

    Not in exported programs, which must run where this package is not; and not where gradients are wanted.
    """
    if exporting() or torch.jit.is_tracing() or (analysing and isinstance(x, FakeTensor)):
        return False
    if size is not None and not KERNELS[use.name].merges:
        return False
    tensors = (x, *taps)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if x.dtype not in DTYPES or any(t.device != x.device for t in tensors):
        return False
    # halves become float32 exactly; nothing else is converted
    if any(t.dtype != x.dtype and not (x.dtype == torch.float32 and t.dtype in DTYPES) for t in taps):
        return False
    return available(x.device.type)


@torch.compiler.assume_constant_result  # torch 2.11 takes is_exporting() itself for true whenever it compiles
def exporting() -> bool:
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def available(device: str) -> bool:
    return library(device) is not None


def call(use: Use, x: Tensor, size: Tensor | None, taps: Sequence[Tensor], assign: bool) -> tuple[Tensor | None, ...]:
    """What `ReductionModule.reference` gives, from the op."""
    op = getattr(torch.ops.tokcompile, use.name).default
    taps = [t.to(x.dtype) for t in taps]
    new, index, new_size, slots = op(x, size, taps, use.place, use.numbers, use.text, assign)
    return new, index, new_size if KERNELS[use.name].merges else None, slots if assign else None


# -- the ops ---------------------------------------------------------------------------------------------------------------

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
OPS = torch.library.Library("tokcompile", "FRAGMENT")


def results(kernel: Kernel, x: Tensor, place: Sequence[int], assign: bool) -> Outputs:
    """Empty outputs: new x, index, new sizes and assignment, the last two without elements where there are none."""
    n, k, unit, *_ = place
    b, length, dim = x.shape
    return (
        x.new_empty((b, length - (n - k) * unit, dim)),
        x.new_empty((b, k), dtype=torch.int64),
        x.new_empty((b, k) if kernel.merges else (0,), dtype=torch.float32),
        x.new_empty((b, n) if assign else (0,), dtype=torch.int64),
    )


def run(
    kernel: Kernel, x: Tensor, size: Tensor | None, taps: Sequence[Tensor], place: Sequence[int],
    numbers: Sequence[float], text: Sequence[int], assign: bool,
) -> Outputs:  # fmt: skip
    """The kernel where there is a library for the device and it takes the arguments, else the reference."""
    lib = library(x.device.type) if x.dtype in DTYPES and all(t.dtype == x.dtype for t in taps) else None
    if lib is not None:
        out = results(kernel, x, place, assign)
        code = launch(lib, kernel, x, size, taps, place, numbers, text, out)
        if code == 0:
            return out
        if code != REFUSED:
            raise RuntimeError(f"tokcompile::{kernel.name} failed with CUDA error {code} for {describe(x, place)}")
        note(f"the kernel of tokcompile::{kernel.name} does not take {describe(x, place)}; plain PyTorch runs there")
    return reference(kernel, x, size, taps, place, numbers, text, assign)


def describe(x: Tensor, place: Sequence[int]) -> str:
    return f"x {tuple(x.shape)} {x.dtype}, (n, k, unit, start, tap_start) = {tuple(place)}"


def launch(
    lib: ctypes.CDLL, kernel: Kernel, x: Tensor, size: Tensor | None, taps: Sequence[Tensor], place: Sequence[int],
    numbers: Sequence[float], text: Sequence[int], out: Outputs,
) -> int:  # fmt: skip
    """Enqueues one kernel on the current stream. Inputs are kept until then; after it, the allocator knows the stream."""
    x, taps = dense(x), [dense(t) for t in taps]
    size = None if size is None else dense(size.float())
    tap_shapes = tuple(t.shape for t in taps)
    go, arguments, needed = prepared(lib, kernel, x.dtype, x.shape, tap_shapes, tuple(place), tuple(numbers), tuple(text))
    with on_device(x):
        space = torch.empty(needed + ALIGN, dtype=torch.uint8, device=x.device)
        workspace = -(-space.data_ptr() // ALIGN) * ALIGN
        new, index, new_size, slots = out
        given = [x, *([size] if kernel.sizes else []), *taps, new, index, *([new_size] if kernel.sizes else []), slots]
        return go(*arguments, *map(pointer, given), workspace, stream_of(x))


@functools.lru_cache(maxsize=1024)
def prepared(
    lib: ctypes.CDLL, kernel: Kernel, dtype: torch.dtype, x: torch.Size, taps: tuple[torch.Size, ...],
    place: tuple[int, ...], numbers: tuple[float, ...], text: tuple[int, ...],
) -> tuple[Callable[..., int], tuple[Any, ...], int]:  # fmt: skip
    """(function, its first arguments, bytes of workspace): what every call with these shapes shares, as making it anew
    takes longer than a kernel."""
    shape = ctypes.byref(shape_of(dtype, x, dict(zip(kernel.taps, taps)), place))
    own = [kind(int(v) if kind is INT else v) for kind, v in zip(kernel.numbers, numbers)]
    more = [ctypes.byref(c_text(text))] if kernel.text else []
    needed = getattr(lib, f"tc_{kernel.name}_workspace")(shape, *own[: kernel.sized], *more)
    return getattr(lib, f"tc_{kernel.name}"), (shape, *own, *more), needed


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of x the current one, which mostly it is already: asking costs less than switching."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def stream_of(x: Tensor) -> int | None:
    """The current stream of the device of x."""
    if not x.is_cuda:
        return None
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # what inductor's own code calls; no object around it
    return raw(x.device.index) if raw else torch.cuda.current_stream(x.device).cuda_stream


def c_text(text: Sequence[int]) -> Text:
    """`Use.text` as the kernel takes it."""
    pivots, *edges = text or (0,)
    return Text(pivots, len(edges) // 2, (ctypes.c_int32 * (2 * SPANS))(*edges))


def shape_of(dtype: torch.dtype, x: torch.Size, taps: dict[str, torch.Size], place: Sequence[int]) -> Shape:
    n, k, unit, start, tap_start = place
    b, length, dim = x
    heads, head_dim, tap_length = 0, 0, length
    for name, tap in taps.items():
        if name == "normed":
            tap_length = tap[1]
        else:  # keys: (B, H, L, d) or an attention row: (B, H, L)
            heads, tap_length, head_dim = (*tap[1:], 0)[:3]
    return Shape(DTYPES[dtype], b, length, dim, start, n, k, unit, tap_length, tap_start, heads, head_dim)


def dense(t: Tensor) -> Tensor:
    """Contiguous, and beginning where vector loads may."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % VECTOR else t


def pointer(t: Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()


def reference(
    kernel: Kernel, x: Tensor, size: Tensor | None, taps: Sequence[Tensor], place: Sequence[int],
    numbers: Sequence[float], text: Sequence[int], assign: bool,
) -> Outputs:  # fmt: skip
    """The same in plain PyTorch: the op's meaning."""
    from tokcompile.passes.reduction import ReductionModule

    n, k, unit, start, tap_start = place
    recipe, options = kernel.options(numbers)
    count, *edges = text or (0,)
    if kernel.text:
        options = {**options, "text_pivots": count}
    begin, spans = tap_start // unit, tuple(zip(edges[::2], edges[1::2]))
    site = Site(n, k, begin, start=begin, text=spans, options=recipe.with_options(options))
    module = ReductionModule(recipe, site, unit, kernel.taps, start, tap_start)
    module.needs_assign = assign
    if size is None and kernel.merges:
        size = torch.ones(x.shape[0], n, dtype=torch.float32, device=x.device)
    found = module.reference(x, size, *taps)
    empty = results(kernel, x, place, False)
    # an op may return neither its inputs nor views of them
    own = [e if f is None else f.clone(memory_format=torch.contiguous_format) for f, e in zip(found, empty)]
    return own[0], own[1], own[2].float() if kernel.merges else empty[2], own[3]


def register(kernel: Kernel) -> None:
    """Makes `tokcompile::<name>` an op that torch.compile takes as one opaque call.

    By itself, as `torch.library.custom_op` adds more Python to a call than the kernels take on a GPU; what that is for,
    gradients, is not wanted here (see `applies`).
    """
    OPS.define(kernel.name + SCHEMA)
    OPS.impl(kernel.name, functools.partial(run, kernel), "CompositeExplicitAutograd")
    fake = lambda x, size, taps, place, numbers, text, assign: results(kernel, x, place, assign)  # noqa: E731
    torch.library.register_fake(f"tokcompile::{kernel.name}", fake, lib=OPS)


for _kernel in KERNELS.values():
    register(_kernel)


# -- the library -----------------------------------------------------------------------------------------------------------


@functools.cache
def library(device: str) -> ctypes.CDLL | None:
    """The kernels for "cuda" or "cpu"; None where the reference has to do. Asked once a process."""
    from tokcompile.plugins.torch_library import BuildError, build

    try:
        if device == "cpu":
            path = os.environ.get("TOKCOMPILE_HOST_KERNELS", "")
            return load(Path(path)) if path else None
        given = os.environ.get("TOKCOMPILE_KERNELS", "")
        if given.lower() in ("off", "0", "no"):
            return None
        if device != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
            return None
        return load(Path(given) if given else build())
    except (OSError, AttributeError, BuildError) as error:
        note(f"tokcompile's CUDA kernels are not used, plain PyTorch runs instead: {error}")
        return None


def load(path: Path) -> ctypes.CDLL:
    """The library with the types of its functions set. Raises: OSError; AttributeError where a function is missing."""
    lib = ctypes.CDLL(str(path))
    shape, address = ctypes.POINTER(Shape), ctypes.c_void_p
    for kernel in KERNELS.values():
        workspace, run_it = getattr(lib, f"tc_{kernel.name}_workspace"), getattr(lib, f"tc_{kernel.name}")
        more = [ctypes.POINTER(Text)] if kernel.text else []
        workspace.argtypes, workspace.restype = [shape, *kernel.numbers[: kernel.sized], *more], ctypes.c_size_t
        pointers = 1 + 2 * kernel.sizes + len(kernel.taps) + 3 + 2  # x, sizes, taps, three results, workspace and stream
        run_it.argtypes, run_it.restype = [shape, *kernel.numbers, *more, *[address] * pointers], ctypes.c_int32
    return lib


@functools.cache
def note(text: str) -> None:
    """Says it once."""
    log.warning(text)
