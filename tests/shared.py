"""Traces that are made once a run: torch.export takes most of the time of a test, and many tests begin with the same model."""

from __future__ import annotations

import functools
import hashlib
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tokcompile.llm import Prefill
from tokcompile.llm.modules import Decode
from tokcompile.passes.calls import CALLS

Module = TypeVar("Module", bound=torch.nn.Module)
SHARED: dict[int, torch.nn.Module] = {}
PROGRAMS: dict[int, ExportedProgram] = {}  # that were traced from them


def shared(model: Module) -> Module:
    """The model, which from now on lives as long as the run and is never changed: equal calls of it are traced once."""
    SHARED[id(model)] = model
    return model


def mark(model):
    """What all models have in common whose traces are the same; None where the model is not shared."""
    if isinstance(model, Prefill) and (inner := mark(model.model)):
        return "prefill", inner
    if isinstance(model, Decode) and (inner := mark(model.model)):
        return "decode", inner, repr(model.layout)
    return id(model) if SHARED.get(id(model)) is model else None


def content(leaf):
    """What a trace can know of an argument."""
    if not isinstance(leaf, torch.Tensor):
        return type(leaf), leaf
    data = leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad, hashlib.sha256(data).digest()


def remembered(export: Callable) -> Callable:
    """`trace.export`, which answers again what it answered for a shared model and equal arguments.

    Programs are not changed by the pipeline, which copies their graphs, but where layers are marked to be traced again:
    saving erases the marks, so that those are not remembered.
    """
    known = {}

    @functools.wraps(export)
    def once(model, args, kwargs):
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        marked = mark(model)
        if marked is None or not all(type(t) is torch.Tensor and t.device.type == "cpu" for t in tensors):
            return export(model, args, kwargs)
        key = marked, spec, tuple(map(content, leaves))
        if key in known:
            program, guards = known[key]
            return program, list(guards)
        program, guards = export(model, args, kwargs)
        if not program.graph_module.meta.get(CALLS):
            known[key] = program, list(guards)
            PROGRAMS[id(program)] = program
        return program, guards

    return once


def compared(check_faithful: Callable) -> Callable:
    """`trace.check_faithful`, which compares a shared model and its trace once."""
    known = set()

    @functools.wraps(check_faithful)
    def once(model, *given):
        marked = mark(model)
        if marked is None or marked not in known:
            known.add(marked)
            return check_faithful(model, *given)
        return None

    return once


def analysed(analyse: Callable) -> Callable:
    """`analyse`, which answers again what it answered for a program of a shared model.

    What is made of an analysis does not change it: `optimize` itself goes on from that of a model which is optimized already.
    """
    known = {}

    @functools.wraps(analyse)
    def once(model, args, kwargs):
        if args is not None or kwargs is not None or PROGRAMS.get(id(model)) is not model:
            return analyse(model, args, kwargs)
        if id(model) not in known:
            known[id(model)] = analyse(model, args, kwargs)
        return known[id(model)]

    return once


class Stack:
    """What torch.fx asks for the lines of code that an op comes from: torch's own makes each frame of each op anew, a sixth of
    a trace's time where pytest's frames are below."""

    frame = staticmethod(functools.cache(traceback.FrameSummary))

    @classmethod
    def extract(cls) -> Stack:
        self, at, found = cls(), sys._getframe(1), []
        while at is not None:
            found.append(cls.frame(at.f_code.co_filename, at.f_lineno, at.f_code.co_name))
            at = at.f_back
        self.found = found
        return self

    def summary(self) -> traceback.StackSummary:
        return traceback.StackSummary(reversed(self.found))
