"""Record and replay: lets torch.export trace a model that reads tensor values back into Python.

One eager run records, in order, what `.item()`, `.tolist()`, `bool()`, `nonzero()` and boolean masks gave; while tracing
the same calls return the recorded VALUES. What was fixed that way is reported as a guard: the traced graph is right for
inputs that give the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SCALARS = {
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.equal,
    torch.Tensor.equal,
}
_POSITIONS = {
    torch.nonzero,
    torch.Tensor.nonzero,
    torch.argwhere,
    torch.Tensor.argwhere,
    torch.unique_consecutive,
    torch.unique,
    torch.Tensor.unique,
}

_REPEATS = {torch.repeat_interleave, torch.Tensor.repeat_interleave}


@dataclass
class Recording:
    """The values of one eager run, as (what was called, value) in order."""

    values: list[tuple[str, Any]] = field(default_factory=list)

    def guards(self) -> list[str]:
        out = []
        for name, value in self.values:
            text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            out.append(f"{name} gave {text[:80]}")
        return out


def record(run: Callable[[], Any]) -> Recording:
    """Runs `run` eagerly and keeps what was read back into Python."""
    recording = Recording()
    with torch.no_grad(), _Record(recording):
        run()
    return recording


@contextmanager
def replay(recording: Recording) -> Iterator[None]:
    """While tracing, gives each such call the value that it had in the recorded run."""
    with _Replay(recording):
        yield


def _has_boolean_mask(func: Any, args: tuple[Any, ...]) -> bool:
    if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, torch.Tensor) and i.dtype is torch.bool for i in index)


def _repeats_by_tensor(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return func in _REPEATS and isinstance(kwargs.get("repeats", args[-1] if len(args) < 2 else args[1]), torch.Tensor)


def _positions(mask: torch.Tensor) -> list[torch.Tensor]:
    return [p.clone() for p in mask.nonzero(as_tuple=True)]


def _substitute(args: tuple[Any, ...], positions: list[list[torch.Tensor]]) -> tuple[Any, ...]:
    """The same indexing with each boolean mask replaced by the positions of its True entries."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    out: list[Any] = []
    for i in index:
        out.extend(positions.pop(0) if isinstance(i, torch.Tensor) and i.dtype is torch.bool else [i])
    return (args[0], tuple(out), *args[2:])


class _Record(TorchFunctionMode):
    def __init__(self, recording: Recording):
        super().__init__()
        self.values = recording.values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if _has_boolean_mask(func, args):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [i for i in index if isinstance(i, torch.Tensor) and i.dtype is torch.bool]
            self.values.append((f"{name}(mask)", [_positions(m) for m in masks]))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is torch.Tensor.tolist:  # while tracing, torch turns it into one item() per element
            self.values += [("item", v) for v in torch.utils._pytree.tree_leaves(result)]
        elif func in _SCALARS:
            self.values.append((name, result))
        elif _repeats_by_tensor(func, args, kwargs):
            dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
            self.values.append((name, result.shape[dim] if dim is not None else result.numel()))
        elif func in _POSITIONS:
            self.values.append((name, torch.utils._pytree.tree_map(lambda t: t.clone(), result)))
        return result


class _Replay(TorchFunctionMode):
    def __init__(self, recording: Recording):
        super().__init__()
        self.values = iter(list(recording.values))

    def next(self, name: str) -> Any:
        recorded, value = next(self.values, (None, None))
        if recorded != name:
            raise RuntimeError(f"replay is out of step: the trace called {name}, the eager run had called {recorded}")
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if _has_boolean_mask(func, args):
            return func(*_substitute(args, [[p.clone() for p in m] for m in self.next(f"{name}(mask)")]), **kwargs)
        if func is torch.Tensor.tolist:
            leaves, spec = torch.utils._pytree.tree_flatten(torch.empty(args[0].shape, device="cpu").tolist())
            return torch.utils._pytree.tree_unflatten([self.next("item") for _ in leaves], spec)
        if func in _SCALARS:
            return self.next(name)
        if _repeats_by_tensor(func, args, kwargs):
            return func(*args, **{**kwargs, "output_size": self.next(name)})
        if func in _POSITIONS:
            return torch.utils._pytree.tree_map(lambda t: t.clone(), self.next(name))
        return func(*args, **kwargs)
