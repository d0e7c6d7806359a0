"""The kernels' host library by ctypes: every function takes and gives torch tensors."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from tokcompile.passes.reduction import ReductionModule
from tokcompile.recipe import Site

SOURCES = Path(__file__).parents[2] / "plugins"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HALF = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # tolerances, as shares of the largest value
TYPES = (torch.float32, *HALF)
CANARY = 0xA5
FIELDS = (
    "dtype", "batch", "length", "dim", "start", "n", "k", "unit", "tap_length", "tap_start", "heads", "head_dim",
)  # fmt: skip


def compiled(name, sources, *flags):
    """A host build of `sources`, kept in the temporary folder until they change; skips without g++."""
    if (gxx := shutil.which("g++")) is None:
        pytest.skip("g++ is not installed")
    digest = hashlib.sha256(" ".join([name, *sources, *flags]).encode())
    for path in sorted([*SOURCES.glob("kernels/*"), *SOURCES.glob("host_test/*.cpp"), *SOURCES.glob("host_test/*.h")]):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"tokcompile-kernels-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    target = folder / f"{digest.hexdigest()[:16]}-{name}"
    if not target.exists():
        warn = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
        partial = target.with_name(f"{target.name}-{os.getpid()}")
        files = [str(SOURCES / "host_test" / s) for s in sources]
        done = subprocess.run([gxx, *warn, *flags, *files, "-o", str(partial)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.rename(target)  # in one step: another test process may build the same
    return target


@functools.cache
def library():
    lib = ctypes.CDLL(str(compiled("host.so", ["host.cpp"], "-O1", "-fPIC", "-shared", "-fvisibility=hidden")))
    for name in ("dart", "topk", "tome", "pitome", "divprune", "select"):
        getattr(lib, f"tc_{name}_workspace").restype = ctypes.c_size_t
    return lib


class Text(ctypes.Structure):
    _fields_ = [("pivots", ctypes.c_int32), ("spans", ctypes.c_int32), ("edges", ctypes.c_int32 * 256)]


def text_of(pivots, spans):
    """A tc_text, or the null pointer where there are no spans."""
    edges = [edge for span in spans for edge in span]
    return ctypes.byref(Text(pivots, len(spans), (ctypes.c_int32 * 256)(*edges))) if spans else None


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in FIELDS]


def pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


class Guarded:
    """An output of exactly this shape between canaries, full of what no kernel writes."""

    def __init__(self, shape, dtype):
        count = 1
        for edge in shape:
            count *= edge
        self.bytes = count * torch.empty((), dtype=dtype).element_size()
        self.memory = torch.full((self.bytes + 512,), CANARY, dtype=torch.uint8)
        self.start = -self.memory.data_ptr() % 256 or 256
        self.tensor = self.memory[self.start : self.start + self.bytes].view(dtype).reshape(shape)

    def check(self):
        assert (self.memory[: self.start] == CANARY).all()
        assert (self.memory[self.start + self.bytes :] == CANARY).all()


NUMBERS = {  # a case's numbers beside the shape: all of them, and how many of them the workspace function takes
    "dart": lambda o: ([ctypes.c_int32(o["pivots"]), o.get("text")], 2),
    "topk": lambda o: ([ctypes.c_int32(o.get("fuse", 0))], 1),
    "tome": lambda o: ([], 0),
    "pitome": lambda o: ([ctypes.c_int32(o["all"]), ctypes.c_float(o["margin"]), ctypes.c_float(o["alpha"])], 1),
    "divprune": lambda o: ([], 0),
}
SIZED = ("topk", "tome", "pitome")


def call(name, shape, x, size, taps, options, assign=True):
    """(code, out, index, new_size, assign) of tc_<name>."""
    numbers, sized = NUMBERS[name](options)
    needed = getattr(library(), f"tc_{name}_workspace")(ctypes.byref(shape), *numbers[:sized])
    b, n, k = shape.batch, shape.n, shape.k
    out = Guarded((b, shape.length - (n - k) * shape.unit, shape.dim), x.dtype)
    index, slots = Guarded((b, k), torch.int64), Guarded((b, n), torch.int64) if assign else None
    sizes = Guarded((b, k), torch.float32) if name in SIZED else None
    space = Guarded((needed,), torch.uint8)
    arguments = [x, *([size] if name in SIZED else []), *taps, out.tensor, index.tensor]
    arguments += [sizes.tensor] if sizes else []
    arguments += [slots and slots.tensor, space.tensor]
    code = getattr(library(), f"tc_{name}")(ctypes.byref(shape), *numbers, *map(pointer, arguments), None)
    for guarded in (out, index, slots, sizes, space):
        if guarded:
            guarded.check()
    return code, *(g and g.tensor for g in (out, index, sizes, slots))


class Case:
    """One reduction: the same inputs for the kernel and for the reference that it must reproduce."""

    def __init__(
        self, recipe, kernel, options, kernel_options, *, batch=1, n=40, k=20, before=1, after=0, unit=1, shift=0,
        dim=16, heads=2, head_dim=8, dtype=torch.float32, seed=0, kind="normal", sizes=True, text=(),
    ):  # fmt: skip
        self.recipe, self.kernel, self.kernel_options, self.unit = recipe, kernel, kernel_options, unit
        start, tap_start = before * unit, (before + shift) * unit
        length, tap_length = start + (n + after) * unit, tap_start + (n + after) * unit
        given = recipe.with_options(options)
        self.site = Site(n=n, k=k, prefix=tap_start // unit, start=tap_start // unit, text=tuple(text), options=given)
        if text:  # the kernel takes what its caller chose of it
            after = [span for span in text if span[0] >= tap_start + n]
            self.kernel_options = {**kernel_options, "text": text_of(given["text_pivots"], after)}
        taps = recipe.taps_read()
        self.module = ReductionModule(recipe, self.site, unit, taps, start, tap_start)
        self.module.needs_assign = True
        g = torch.Generator().manual_seed(seed)
        self.x = draw(g, kind, (batch, length, dim)).to(dtype)
        self.taps = []
        for tap in taps:
            if tap == "normed":
                self.taps.append(draw(g, kind, (batch, tap_length, dim)).to(dtype))
            elif tap.endswith("attention"):
                self.taps.append(draw(g, kind, (batch, heads, tap_length)).softmax(-1).to(dtype))
            else:
                self.taps.append(draw(g, kind, (batch, heads, tap_length, head_dim)).to(dtype))
        self.size = torch.randint(1, 5, (batch, n), generator=g).float() if sizes else None
        self.shape = Shape(
            DTYPES[dtype], batch, length, dim, start, n, k, unit, tap_length, tap_start, heads, head_dim
        )  # fmt: skip

    def run(self, assign=True):
        size = self.size if self.kernel in SIZED else None
        return call(self.kernel, self.shape, self.x, size, self.taps, self.kernel_options, assign)

    def expected(self, noise=0.0, dtype=None, seed=0):
        """(out, index, new_size, assign) of the reference, on inputs with relative noise or in another dtype."""
        g = torch.Generator().manual_seed(seed)

        def change(t):
            t = t if dtype is None else t.to(dtype)
            return t * (1 + noise * torch.randn(t.shape, generator=g)) if noise else t

        size = self.size if self.kernel in SIZED else None
        return self.module.reference(change(self.x), size, *map(change, self.taps))

    def unstable(self, which):
        """Whether result `which` of the reference itself changes under noise as small as rounding."""
        want = self.expected()[which]
        return any(not torch.equal(self.expected(1e-6, torch.float32, s)[which], want) for s in range(8))


def draw(g, kind, shape):
    """ "ties": few different rows of +1 and -1, with lengths that are powers of two and so exact cosines."""
    if kind == "normal":
        return torch.randn(shape, generator=g)
    codes = torch.randint(0, 5, shape[:-1], generator=g)
    table = torch.randint(0, 2, (5, shape[-1]), generator=g).float() * 2 - 1
    return table[codes] * torch.tensor([1.0, 2.0])[codes % 2, None]
