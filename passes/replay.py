"""Record and replay: lets torch.export trace a model that reads tensor values back into Python.

One eager run, in which the model sees the same `torch.compiler.is_exporting()` as in the trace, records what `.item()`,
`.tolist()`, `bool()`, `nonzero()` and boolean masks gave, each with the place in the model's source that asked. While
tracing, the same place is given the recorded VALUES in the same order, and a guard is left in the graph: it is right for
inputs that give the same values.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch._export import non_strict_utils
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tokcompile.errors import TraceError
from tokcompile.passes.guards import mark, same, scalar_holds, true_at
from tokcompile.replaced import replaced

_SCALARS = {
    torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__,
    torch.Tensor.__contains__, torch.is_nonzero, torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose,
}  # fmt: skip
_POSITIONS = {
    torch.nonzero, torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere, torch.unique_consecutive,
    torch.Tensor.unique_consecutive, torch.unique, torch.Tensor.unique, torch.bincount, torch.Tensor.bincount,
}  # fmt: skip
_REPEATS = {torch.repeat_interleave, torch.Tensor.repeat_interleave}
_MASKED = {torch.masked_select, torch.Tensor.masked_select}
_INDEXED = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_FACTORIES = {torch.arange, torch.linspace, torch.zeros, torch.ones, torch.empty, torch.full}
_SIZED = {  # the arguments after the tensor itself are sizes
    torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.expand, torch.Tensor.repeat, torch.Tensor.narrow,
    torch.Tensor.split, torch.Tensor.unflatten, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty,
    torch.reshape, torch.narrow, torch.split, torch.nn.functional.pad, torch.nn.functional.interpolate,
}  # fmt: skip

# frames of torch, of these passes, of decorators and of generated code differ between the two runs
_IGNORED = (*(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, __file__)), contextlib.__file__, "<")

Site = tuple[tuple[str, int], ...]
Holds = Callable[[Any], "torch.Tensor | None"]


class Read(NamedTuple):
    """One value read back into Python: the source lines that led to it (innermost first), what was called, what it gave."""

    site: Site
    name: str
    value: Any

    def __str__(self) -> str:
        """`item gave 2 (modeling_x.py:12)`."""
        value = self.value[0] if isinstance(self.value, tuple) else self.value  # positions: with what they were found in
        if isinstance(value, torch.Tensor):
            text = f"a tensor of shape {tuple(value.shape)}"
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            text = "1 position" if len(value[0]) == 1 else f"{len(value[0])} positions"
        else:
            text = repr(value)
        return f"{self.name} gave {text[:60]}{place(self.site)}"


@dataclass
class Recording:
    """The values of one eager run, in order."""

    reads: list[Read] = field(default_factory=list)


def place(site: Site) -> str:
    """` (modeling_x.py:12)`."""
    return f" ({os.path.basename(site[0][0])}:{site[0][1]})" if site else ""


def record(run: Callable[[], Any]) -> Recording:
    """Runs `run` eagerly and keeps what was read back into Python."""
    recording = Recording()
    with torch.no_grad(), _Record(recording):
        run()
    return recording


def replay(recording: Recording) -> _Replay:
    """A context in which each such call has the value that it had in the recorded run. Raises: TraceError."""
    return _Replay(recording)


@contextlib.contextmanager
def as_if_exporting() -> Iterator[None]:
    """Models ask whether they are being exported and then skip checks or take another branch: here they do too. And `max` and
    `min` of a tensor give one, as torch.export has it."""
    flags = {name: True for name in ("_is_compiling_flag", "_is_exporting_flag") if hasattr(torch.compiler, name)}
    with replaced(torch.compiler, **flags), getattr(non_strict_utils, "_override_builtin_ops", contextlib.nullcontext)():
        yield


class _Reads(TorchFunctionMode):
    """Calls `read` for everything that asks for values; the subclasses record or replay."""

    outermost: FrameType | None = None

    def __enter__(self) -> Any:
        self.outermost = sys._getframe(1)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.outermost = None
        super().__exit__(*exception)

    def site(self) -> Site:
        """The source lines below the `with` statement, without torch's own: they are the same in both runs."""
        out = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.outermost:
            if not frame.f_code.co_filename.startswith(_IGNORED):
                out.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        return tuple(out)

    def read(self, name: str, compute: Callable[[], Any], holds: Holds) -> Any:
        """The value; `holds(value)` says whether the tensors at hand give it."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func is torch.Tensor.tolist:
            return self.items(args[0])
        if func in _SCALARS:
            return self.read(name, lambda: func(*args, **kwargs), lambda value: scalar_holds(name, value, args, kwargs))
        if func in _POSITIONS or (func is torch.where and len(args) == 1 and not kwargs):
            result, _ = self.read(name, lambda: (func(*args, **kwargs), args[0]), lambda value: same(args[0], value[1]))
            return _copies(result)
        if func in _INDEXED and _reads_values(args[1]):
            return func(args[0], self.index(name, args[1]), *args[2:], **kwargs)
        if func in _MASKED:
            values, mask = torch.broadcast_tensors(args[0], kwargs.get("mask", args[-1]))
            return values[tuple(self.positions(name, mask))]
        if _repeats_by_tensor(func, args, kwargs):
            return self.repeat(func, args, kwargs)
        if func is torch.tensor and isinstance(args[0], (list, tuple)) and _holds_tensors(args[0]):
            return _stacked(args[0], **kwargs)  # it would read the elements, though no shape depends on them
        if func in _FACTORIES:
            return func(*self.numbers(args), **self.numbers(kwargs))
        if func in _SIZED:
            return func(args[0], *self.numbers(args[1:]), **self.numbers(kwargs))
        return func(*args, **kwargs)

    def items(self, tensor: torch.Tensor) -> Any:
        """`tensor.tolist()`."""
        return self.read("tolist", tensor.tolist, lambda value: same(tensor, value))

    def numbers(self, value: Any) -> Any:
        """`value` with each one-element tensor that stands for a number replaced by the number."""

        def number(v: Any) -> Any:
            scalar = isinstance(v, torch.Tensor) and v.ndim == 0
            return self.read("item", v.item, lambda value: same(v, value)) if scalar else v

        return tree_map(number, value)

    def positions(self, name: str, mask: torch.Tensor) -> list[torch.Tensor]:
        read = self.read(f"{name}(mask)", lambda: list(mask.nonzero(as_tuple=True)), lambda at: true_at(mask, at))
        return _copies(read)

    def index(self, name: str, index: Any) -> tuple[Any, ...]:
        """An index with boolean masks as positions and with tensors that bound slices as numbers."""
        out: list[Any] = []
        for i in index if isinstance(index, tuple) else (index,):
            if _is_mask(i):
                out += self.positions(name, i)
            elif isinstance(i, slice):
                out.append(slice(*(self.numbers(bound) for bound in (i.start, i.stop, i.step))))
            else:
                out.append(self.numbers(i))
        return tuple(out)

    def repeat(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`repeat_interleave` with the length of its result given."""
        bound = dict(zip(("input", "repeats", "dim"), args)) | kwargs
        values, repeats, dim = bound.get("input"), bound.get("repeats", bound.get("input")), bound.get("dim")
        assert isinstance(repeats, torch.Tensor)
        assert isinstance(values, torch.Tensor)
        times = 1 if repeats.numel() != 1 or repeats is values else values.numel() if dim is None else values.shape[dim]

        def length() -> int:
            result = func(*args, **kwargs)
            return int(result.numel() if dim is None else result.shape[dim])

        size = self.read("repeat_interleave", length, lambda n: repeats.sum() * times == n)
        return func(*args, **{**kwargs, "output_size": size})


class _Record(_Reads):
    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def read(self, name: str, compute: Callable[[], Any], holds: Holds) -> Any:
        value = compute()
        self.recording.reads.append(Read(self.site(), name, _copies(value)))
        return value


class _Replay(_Reads):
    def __init__(self, recording: Recording):
        super().__init__()
        self.values: dict[tuple[Site, str], deque[Any]] = defaultdict(deque)
        for site, name, value in recording.reads:
            self.values[site, name].append(value)

    def __enter__(self) -> Any:
        super().__enter__()
        self.outermost = sys._getframe(1)
        self.fake_tolist = vars(FakeTensor).get("tolist")
        if self.fake_tolist is not None:  # it would ask for one element after the other
            FakeTensor.tolist = lambda tensor: self.items(tensor)  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.fake_tolist is not None:
            FakeTensor.tolist = self.fake_tolist  # type: ignore[method-assign]
        super().__exit__(*exception)

    def read(self, name: str, compute: Callable[[], Any], holds: Holds) -> Any:
        site = self.site()
        values = self.values.get((site, name))
        if not values:
            raise TraceError(
                f"the trace called {name}{place(site)}, the eager run had not: the model takes another way while it is traced"
            )
        value = values.popleft()
        condition = holds(value)
        if condition is not None:
            mark(condition, str(Read(site, name, value)))
        return value


def _copies(value: Any) -> Any:
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, value)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _stacked(data: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> torch.Tensor:
    """`torch.tensor` of nested lists with tensors in them."""
    parts = [torch.as_tensor(part) if not isinstance(part, (list, tuple)) else _stacked(part) for part in data]
    return torch.stack(parts).to(dtype=dtype, device=device)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and index.ndim > 0


def _reads_values(index: Any) -> bool:
    """Whether what an index selects, and so the shape of the result, depends on the values of tensors."""
    for i in index if isinstance(index, tuple) else (index,):
        if _is_mask(i) or (isinstance(i, torch.Tensor) and i.ndim == 0):
            return True
        if isinstance(i, slice) and any(isinstance(bound, torch.Tensor) for bound in (i.start, i.stop, i.step)):
            return True
    return False


def _repeats_by_tensor(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return func in _REPEATS and isinstance(kwargs.get("repeats", args[-1] if len(args) < 2 else args[1]), torch.Tensor)
