"""Arguments: those of a call as the flat inputs of a graph, refused where it was compiled for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from tokcompile.errors import InputError

if TYPE_CHECKING:
    from tokcompile.passes.trace import Traced


def flat_caller(traced: Traced) -> Callable[..., list[Any]]:
    """A function (*args, **kwargs) -> flat inputs that refuses any other structure, shape, dtype or fixed value."""
    expected = [(tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v for v in traced.inputs]
    spec, names = traced.in_spec, traced.arg_names
    positional, keywords = spec.child(0).num_children, list(spec.child(1).context or ())

    def flatten(*args: Any, **kwargs: Any) -> list[Any]:
        args, kwargs = rearrange(args, kwargs, positional, keywords, names)
        flat, given = pytree.tree_flatten((args, kwargs))
        if given != spec:
            raise InputError(f"called with other arguments than it was compiled for:\n{difference(args, kwargs, given, spec)}")
        for i, (value, want) in enumerate(zip(flat, expected)):
            check_input(i, value, want)
        if not torch.compiler.is_compiling():
            for check in traced.checks:
                check(flat)
        return flat

    return flatten


def rearrange(
    args: tuple[Any, ...], kwargs: dict[str, Any], positional: int, keywords: list[str], names: list[str] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves arguments between positions and keywords so that they stand as they did at compile time."""
    kwargs = dict(kwargs)
    given = list(args)
    if names:
        while len(given) < positional and names[len(given)] in kwargs:
            given.append(kwargs.pop(names[len(given)]))
        for name in reversed(names[positional : len(given)]):
            kwargs[name] = given.pop()
    return tuple(given), {k: kwargs[k] for k in keywords if k in kwargs} | kwargs


def difference(args: Sequence[Any], kwargs: dict[str, Any], given: pytree.TreeSpec, spec: pytree.TreeSpec) -> str:
    """What a call has, and what it should have: numbers of arguments and their names, or else their structure."""
    count, names = spec.child(0).num_children, list(spec.child(1).context or ())
    if (len(args), sorted(kwargs)) == (count, sorted(names)):
        return f"  given    {given}\n  expected {spec}"
    rows = (("given   ", len(args), kwargs), ("expected", count, names))
    return "\n".join(f"  {word} {number} by position, and by name {', '.join(some) or 'none'}" for word, number, some in rows)


def check_input(i: int, value: Any, want: Any) -> None:
    """want: (shape, dtype) of a tensor, or any other value as it is. Raises: InputError."""
    shape, dtype = want if isinstance(want, tuple) else (want, "")
    if isinstance(value, torch.Tensor):
        if not isinstance(want, tuple) or tuple(value.shape) != shape or value.dtype != dtype:
            raise InputError(
                f"input {i} is {tuple(value.shape)} {value.dtype}, but the model was compiled for {shape} {dtype}: "
                "shapes and budgets are static, optimize once per input shape"
            )
    elif isinstance(want, tuple):
        raise InputError(f"input {i} is of type {type(value).__name__}, but the model was compiled for a tensor")
    elif value != want:
        raise InputError(f"input {i} is {value!r}, but the model was compiled for {want!r}")
