"""The C interface of launch.h in Python: it reads and writes raw memory as a library would, and reckons with the reference.

What it finds wrong in the arguments it says by an exception, so that the tests see what the ops pass.
"""

import ctypes

import torch

from tokcompile.passes.reduction import ReductionModule
from tokcompile.plugins import torch_ops
from tokcompile.recipe import Site

DTYPES = {code: dtype for dtype, code in torch_ops.DTYPES.items()}
WORKSPACE = 1000  # an odd size, which has to be there and aligned


def memory(address, shape, dtype):
    """A tensor over raw memory; without elements where there is no pointer."""
    if address is None:
        return None
    assert address % dtype.itemsize == 0
    count = torch.Size(shape).numel()
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


class StandIn:
    """Has tc_<name> and tc_<name>_workspace for every kernel; `calls` are the names that were run."""

    def __init__(self, code=0):
        self.calls, self.code = [], code

    def __getattr__(self, name):
        kernel = torch_ops.KERNELS[name.removeprefix("tc_").removesuffix("_workspace")]
        if name.endswith("_workspace"):
            return lambda shape, *sized: self.workspace(kernel, sized)
        return lambda shape, *rest: self.run(kernel, shape._obj, rest)

    def workspace(self, kernel, sized):
        if kernel.text:
            assert isinstance(sized[-1]._obj, torch_ops.Text)
            sized = sized[:-1]
        assert [type(v) for v in sized] == list(kernel.numbers[: kernel.sized])
        return WORKSPACE

    def run(self, kernel, s, rest):
        self.calls.append(kernel.name)
        if self.code:
            return self.code
        count = len(kernel.numbers)
        numbers, pointers = [n.value for n in rest[:count]], list(rest[count:])
        text = pointers.pop(0)._obj if kernel.text else None
        workspace, stream = pointers[-2:]
        assert workspace % torch_ops.ALIGN == 0
        assert stream is None
        ctypes.memset(workspace, 0xFF, WORKSPACE)
        self.write(kernel, s, numbers, pointers[:-2], text)
        return 0

    def write(self, kernel, s, numbers, pointers, text=None):
        """The reference's results into the memory of the outputs."""
        dtype, b = DTYPES[s.dtype], s.batch
        shapes = {
            "normed": (b, s.tap_length, s.dim),
            "k": (b, s.heads, s.tap_length, s.head_dim),
            "rotated_k": (b, s.heads, s.tap_length, s.head_dim),
            "cls_attention": (b, s.heads, s.tap_length),
        }
        taps = [memory(pointers.pop(1 + kernel.sizes), shapes[name], dtype) for name in kernel.taps]
        x = memory(pointers.pop(0), (b, s.length, s.dim), dtype)
        size = memory(pointers.pop(0), (b, s.n), torch.float32) if kernel.sizes else None
        recipe, options = kernel.options(numbers)
        spans = [tuple(text.edges[2 * i : 2 * i + 2]) for i in range(text.spans)] if text else []
        if text:
            options = {**options, "text_pivots": text.pivots}
        begin = s.tap_start // s.unit
        site = Site(s.n, s.k, begin, start=begin, text=tuple(spans), options=recipe.with_options(options))
        module = ReductionModule(recipe, site, s.unit, kernel.taps, s.start, s.tap_start)
        module.needs_assign = True
        found = module.reference(x, size, *taps)
        new = memory(pointers.pop(0), found[0].shape, dtype)
        index = memory(pointers.pop(0), (b, s.k), torch.int64)
        new_size = memory(pointers.pop(0), (b, s.k), torch.float32) if kernel.sizes else None
        assign = memory(pointers.pop(0), (b, s.n), torch.int64)
        assert not pointers
        for to, value in zip((new, index, new_size, assign), found):
            if to is not None:
                to.copy_(value)
