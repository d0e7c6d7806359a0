"""Faithful: a traced graph gives what the model gives on the example, and its canonical form what the traced graph gives.

Code may ask whether it is being exported and then compute something else; no comparison with the traced graph would see that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from tokcompile.errors import InputError, TokcompileError, TraceError, UnsupportedGraph

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}
KERNELS = 2e-2  # between a model's own kernels and those of its traced form, after many layers


def check_faithful(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gm: GraphModule, inputs: Sequence[Any]
) -> list[Any] | None:
    """Compares with a call of the model, where it has weights and gives the same twice. inputs: those of the graph, which may
    stand in another order than args and kwargs. Returns: what the graph gave. Raises: TraceError; InputError where the call
    fails, as what is traced has neither values nor, for some ops, a check of dtypes."""
    if not has_values(model, inputs):
        return None

    def own() -> list[Any]:
        given, named = copy.deepcopy((args, kwargs))  # a cache among them grows
        with torch.no_grad():
            return pytree.tree_leaves(model(*given, **named))

    try:
        wanted = own()
    except TokcompileError:
        raise
    except Exception as error:
        raise does_not_run(error) from error
    got, allowed = outputs(gm, inputs), between_kernels(wanted)
    try:
        if len(got) != len(wanted) or (off := worst(got, wanted)) <= allowed or worst(own(), wanted) > allowed:
            return got
    except TokcompileError:  # other shapes: a cache that is given back whole, say
        return got
    raise TraceError(
        f"traced, the model gives something else than when it is called: off by {off:.1e} of the largest entry of an output\n"
        "  its code takes another way while it is exported (torch.compiler.is_exporting() or is_compiling())\n"
        "  what to do: make it compute the same there; or, if the traced form is right, torch.export it yourself and pass "
        "the program"
    )


def does_not_run(error: Exception) -> InputError:
    """What to raise where a call of the model fails."""
    return InputError(
        f"the model does not run on the example inputs: {type(error).__name__}: {error}\n"
        "  what to do: pass inputs that model(*args, **kwargs) accepts"
    )


def check_canonical(canonical: GraphModule, gm: GraphModule, inputs: Sequence[Any], given: Sequence[Any] | None = None) -> None:
    """Compares with the traced graph that it was made from, where that has weights and gives the same twice.

    given: what that one gave, if it was run already. Raises: UnsupportedGraph.
    """
    if not has_values(gm, inputs):
        return
    wanted = outputs(gm, inputs) if given is None else given
    allowed = between_kernels(wanted)
    if (off := worst(outputs(canonical, inputs), wanted)) > allowed and worst(outputs(gm, inputs), wanted) <= allowed:
        raise UnsupportedGraph(
            f"in the form that is reduced, the model gives something else: off by {off:.1e} of the largest entry of "
            "an output; this is a bug in tokcompile\n  what to do: report it, with the model's code"
        )


def between_kernels(wanted: Sequence[Any]) -> float:
    """The difference that other kernels may make to these outputs."""
    return max([KERNELS, *(TOLERANCE.get(o.dtype, 0.0) for o in wanted if isinstance(o, Tensor))])


def has_values(model: torch.nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether it can be run: neither weights nor inputs are only shapes."""
    given = [*model.parameters(), *model.buffers(), *inputs]
    return not any(isinstance(v, FakeTensor) or (isinstance(v, Tensor) and v.is_meta) for v in given)


def outputs(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    with torch.no_grad():
        return list(gm(*copy.deepcopy(list(inputs))))


def worst(got: Sequence[Any], want: Sequence[Any]) -> float:
    """The largest difference, relative to the largest entry of that output. Raises: TokcompileError for other shapes."""
    out = 0.0
    for a, b in zip(got, want):
        if isinstance(a, Tensor) and a.is_floating_point():
            if a.shape != b.shape:
                raise TokcompileError(f"an output changed its shape from {tuple(b.shape)} to {tuple(a.shape)}")
            out = max(out, relative_error(a, b) if not b.isnan().any() else float("inf"))
    return out


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|, where NaN equals NaN, and what stands for infinity equals itself and is not the largest; 0
    or infinity for values that are not floats."""
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    ends = infinite(want)
    if not torch.equal(ends, infinite(got.to(want.dtype))):
        return float("inf")
    got, want = got.double(), want.double()
    compared = (ends == 0) & ~(got.isnan() & want.isnan())
    difference, sizes = (got - want).abs()[compared], want.abs()[compared]
    if not difference.numel():
        return 0.0
    error = float(difference.max()) / max(float(sizes.max()), 1e-6)
    return error if error == error else float("inf")


def infinite(x: Tensor) -> Tensor:
    """1 and -1 where a value is infinite or, as masks have it, about the largest number of its dtype; else 0."""
    return torch.where(x.abs() >= torch.finfo(x.dtype).max / 2, x.sign(), 0).to(torch.int8)
