"""Trace: any model, exported program or saved `.pt2` becomes one static ATen graph with its example inputs."""

from __future__ import annotations

import inspect
import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import wraps
from types import NoneType
from typing import Any, ParamSpec, TypeVar

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from tokcompile.errors import InputError, TokcompileError, TraceError, UnsupportedGraph
from tokcompile.passes.calls import CALLS, MixerCall, watched
from tokcompile.passes.faithful import check_faithful, does_not_run
from tokcompile.passes.functionalise import replace_overwritten
from tokcompile.passes.graph import copy_graph
from tokcompile.passes.guards import Guards, collect, settle
from tokcompile.passes.replay import Recording, as_if_exporting, record, replay
from tokcompile.passes.saved import load_program
from tokcompile.passes.unchanged import unchanged
from tokcompile.replaced import replaced

TRACING = threading.RLock()
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Traced:
    """A static graph over flat inputs, and how to get from the caller's arguments to them and back.

    gm: flat tensors (and constants) in, a flat list out; `meta['val']` holds fake values.
    program: the untouched exported program, whose weights `gm` shares.
    guards: what was fixed from the example inputs while tracing (values read back into Python). checks: the same as
    conditions on later inputs. mixers: the calls that are marked in `gm`. outputs: what `gm` gave on the example, if it ran.
    """

    gm: GraphModule
    inputs: list[Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    program: ExportedProgram | None = None
    arg_names: list[str] | None = None
    output_names: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    checks: list[Guards] = field(default_factory=list)
    mixers: list[MixerCall] = field(default_factory=list)
    outputs: list[Any] | None = None


def trace(model: Any, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None) -> Traced:
    """Traces `model` (nn.Module, ExportedProgram, or the path of a `.pt2`) on example inputs.

    Raises: InputError, TokcompileError, TraceError, ExportError, UnsupportedGraph.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_program(os.fspath(model))
    if not isinstance(kwargs, (Mapping, NoneType)):
        raise InputError(f"kwargs must be a dict of example inputs, not {type(kwargs).__name__}")
    kwargs = dict(kwargs) if kwargs is not None else None  # a processor gives a mapping that torch.export does not take
    guards: list[str] = []
    names: list[str] | None = None
    if isinstance(model, ExportedProgram):
        program = model
        if args is None and kwargs is None:
            if program.example_inputs is None:
                raise InputError("the exported program was saved without example inputs: pass args=(...)")
            args, kwargs = program.example_inputs
    elif isinstance(model, torch.nn.Module):
        check_module(model, args, kwargs)
        names = list(inspect.signature(model.forward).parameters)
        program, guards = export(model, args or (), kwargs or {})
    else:
        raise InputError(f"model must be an nn.Module, an ExportedProgram or the path of a .pt2, not {type(model).__name__}")
    traced = from_program(program, args or (), kwargs or {}, names, guards)
    if not isinstance(model, ExportedProgram):
        with unchanged(model):
            traced.outputs = check_faithful(model, args or (), kwargs or {}, traced.gm, traced.inputs)
    return traced


def from_program(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str] | None, guards: list[str]
) -> Traced:
    """The flat, static graph of an exported program."""
    refuse_dynamic(program)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    kwargs = {k: kwargs[k] for k in in_spec.child(1).context if k in kwargs} if in_spec.num_children > 1 else kwargs
    inputs, given = pytree.tree_flatten((args, kwargs))
    if given != in_spec:
        raise InputError(
            f"the example inputs do not have the structure the program was exported with:\n  given    {given}\n"
            f"  expected {in_spec}"
        )
    if names is None:
        check_shapes(program, inputs)
    # a fresh graph: flat in, flat out (the caller's structure is restored outside), without the module's input hooks
    gm = copy_graph(unlift(program))
    fixed = collect(gm)
    settle(gm)
    replace_overwritten(gm)
    if fixed:
        fixed(inputs)
        guards = list(dict.fromkeys([*guards, *fixed.lines]))
    output_names = [s.arg.name for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"]
    mixers = program.graph_module.meta.get(CALLS, [])
    checks = [fixed] if fixed else []
    return Traced(gm, inputs, in_spec, out_spec, program, names, output_names, guards, checks, mixers)


def check_shapes(program: ExportedProgram, inputs: Sequence[Any]) -> None:
    """Refuses example inputs of another shape or dtype than those that the program was exported with."""
    known = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    for name, value in zip(program.graph_signature.user_inputs, inputs):
        wanted = known.get(str(name))
        if not (isinstance(value, torch.Tensor) and isinstance(wanted, torch.Tensor)):
            continue
        if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
            raise InputError(
                f"the example input {name!r} is {tuple(value.shape)} {value.dtype}, but the program was exported for "
                f"{tuple(wanted.shape)} {wanted.dtype}\n  what to do: export it again, once per input shape"
            )


def unlift(program: ExportedProgram) -> GraphModule:
    """The program as a graph with weights as attributes and without its run-time input guards. It is read and copied, never
    run, so that torch need not write and compile its code, which takes most of the time."""
    options = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    with replaced(GraphModule, recompile=lambda module: None):
        return program.module(**options)


def check_module(model: torch.nn.Module, args: Any, kwargs: Any) -> None:
    """Refuses what cannot be traced: TorchScript, training mode, missing or wrongly shaped example inputs."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("torch.export does not read TorchScript: pass the nn.Module that this one was made from")
    if any(m.training for m in model.modules()):
        name = next(n for n, m in model.named_modules() if m.training)
        way_out = "Pass the ExportedProgram, not its module()." if hasattr(model, "_guards_fn") else "Call model.eval() first."
        raise InputError(
            f"the model is in training mode (module {name or type(model).__name__!r}): dropout and batch norm would be "
            f"compiled in. {way_out}"
        )
    if args is None and not kwargs:
        raise InputError("pass example inputs: tokcompile.optimize(model, (example,)) or kwargs={...}")
    if args is not None and not isinstance(args, tuple):
        raise InputError(f"args must be a tuple of example inputs, not {type(args).__name__}: write (x,) for a single one")


def export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ExportedProgram, list[str]]:
    """torch.export, plainly if that gives a static graph, else with values recorded in one eager run and replayed."""
    program = attempt(model, args, kwargs, [], known_values_only())
    if program is not None:
        return program, []
    failures: list[Exception] = []
    recording = Recording()
    for flags in (as_if_exporting, nullcontext):
        try:
            with flags(), unchanged(model):
                recording = record(lambda: model(*args, **kwargs))
        except Exception as error:
            if flags is as_if_exporting:  # it may refuse to run so, without being traced
                continue
            if isinstance(error, TokcompileError):
                raise
            raise does_not_run(error) from error
        program = attempt(model, args, kwargs, failures, replay(recording)) if recording.reads else None
        if program is not None:
            guards = collect(unlift(program))
            return program, guards.lines if guards else []
    program = attempt(model, args, kwargs, failures, nullcontext())  # what it reads back may change nothing
    if program is not None:
        return program, []
    reason = next(iter(failures), None) or RuntimeError("shapes in the traced graph depend on the values of tensors")
    raise TraceError(refusal(reason, recording)) from reason


def attempt(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    failures: list[Exception],
    context: AbstractContextManager[Any],
) -> ExportedProgram | None:
    """The program where torch.export gives a static one. What it raises, of many kinds, is added to failures."""
    try:
        with context, quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            program = plain_export(model, args, kwargs)
        return None if data_dependent(program) else program
    except Exception as error:
        failures.append(error)
        return None


@contextmanager
def known_values_only() -> Iterator[None]:
    """torch.export goes on with a symbol for a number that it does not know; here it stops, as it would be in vain. Truths are
    left to it: they may be no more than asserted."""

    def unknown(shapes: ShapeEnv, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the value of a tensor is read back into Python")

    with replaced(ShapeEnv, create_unbacked_symint=unknown, create_unbacked_symfloat=unknown):
        yield


def data_dependent(program: ExportedProgram) -> bool:
    """Whether the graph computes with sizes or numbers that are known only at run time."""
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "call_function"]
    return any(isinstance(v, symbols) and v.node.expr.free_symbols for v in values)


def one_at_a_time(fn: Callable[P, R]) -> Callable[P, R]:
    """What traces waits for other threads that do: tracing has one state, and one standard output, for the whole process."""

    @wraps(fn)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with TRACING:
            return fn(*args, **kwargs)

    return alone


@contextmanager
def quiet() -> Iterator[None]:
    """Torch, when it gives up, logs tracebacks of its own, and torch.onnx every step; what matters is in the exception. What
    a user asked for by TORCH_LOGS stays, and so do the logs of models."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir", "onnx")]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for one in loggers:
                one.setLevel(logging.CRITICAL)
            yield
        finally:
            for one, level in zip(loggers, levels):
                one.setLevel(level)


def plain_export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    with torch.no_grad(), no_fast_path(), unchanged(model), watched(model) as calls, _use_lazy_graph_module(True):
        program = torch.export.export(model, args, kwargs, strict=False)
    program.graph_module.meta[CALLS] = calls
    return program


@contextmanager
def no_fast_path() -> Iterator[None]:
    """nn.TransformerEncoder's fused inference kernels hide the attention from the pass."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def refusal(error: Exception, recording: Recording) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    unknown = re.search(r"Found (<class .*?>) in output, which is not a known type", str(error))
    if unknown and "Cache" not in unknown[1]:
        return (
            f"this call returns an object of {unknown[1]}, which torch.export does not know\n"
            "  what to do: torch.export.register_dataclass(TheClass) if it is a dataclass, torch.utils._pytree."
            "register_pytree_node if not; or wrap the model in a module that returns tensors"
        )
    if "not a known type" in str(error) and "Cache" in str(error):
        return (
            "this call returns a key-value cache, which torch.export does not take\n"
            "  what to do: add use_cache=False to the example inputs, or wrap the model in a module that returns tensors "
            "alone; tokcompile.llm and tokcompile.vlm generate with caches"
        )
    return (
        f"torch.export cannot trace this model: {type(error).__name__}: {' '.join(lines[:3])}\n"
        f"  values read back into Python in an eager run: {len(recording.reads)}\n"
        "  what to do: make the forward free of data-dependent shapes and branches for these inputs, or export it "
        "yourself and pass the ExportedProgram, or optimize the part of the model that holds the blocks"
    )


def refuse_dynamic(program: ExportedProgram) -> None:
    """Budgets are fixed at compile time, so every shape must be too."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            for i, size in enumerate(value.shape):
                if not isinstance(size, int):
                    raise UnsupportedGraph(
                        f"input {node.name!r} has a dynamic shape: dimension {i} is {size}",
                        hint="export with static shapes; for several sizes optimize once per size",
                    )
    if data_dependent(program):
        raise UnsupportedGraph(
            "the exported program computes shapes from the values of tensors",
            hint="pass the nn.Module instead: its values on the example inputs are then recorded and fixed",
        )
