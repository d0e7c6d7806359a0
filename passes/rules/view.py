"""Ops that only rearrange axes: labels are regrouped, literal sizes are rewritten from the label."""

from __future__ import annotations

from typing import Any

import torch

from tokcompile.passes.batch import cut_by_sample
from tokcompile.passes.graph import RESHAPES, aten
from tokcompile.passes.placeholders import SAMPLES
from tokcompile.passes.rules.core import Batch, Call, NeedsFull, has_batch, has_tokens, normal, old, plain, rule, tokens_of
from tokcompile.passes.tokens import SplitsTokens, make_seq, new, new_shape, regroup


@rule(*RESHAPES, "aten.view_as", "aten.reshape_as", "aten.view_copy", "aten._reshape_alias")
def view(call: Call) -> Any:
    name = call.tensors()[0]
    if call.node.target is aten.view.dtype:
        return call.emit(call.label(name))
    label = call.label(name)
    try:
        label = regroup(label, call.old_shape)
    except (SplitsTokens, ValueError) as error:
        by_sample = cut_by_sample(call.gather, label, call.old_shape)
        if by_sample is None:
            raise refused(call, error) from error
        label = regroup(by_sample, call.old_shape)
    return call.typed(call.op(aten.reshape.default, call[name], list(new_shape(label))), label)


def refused(call: Call, error: SplitsTokens | ValueError) -> NeedsFull:
    """Why a view needs the whole token axis; what tears tokens apart is kept for the passes that can help it."""
    if isinstance(error, ValueError):
        return NeedsFull(str(error))
    if SAMPLES in call.node.meta and len(call.old_shape) == 3:
        count, length = call.old_shape[:2]
        call.rewriter.cuts |= {i * length for i in range(1, count)}
        call.rewriter.sample = length
        return NeedsFull(f"it gives {count} samples {length} tokens each, and they do not keep as many each")
    call.rewriter.splits.append(error)
    return NeedsFull("it views the tokens as a grid, as windows or as groups")


@rule(
    "aten.permute",
    "aten.transpose",
    "aten.t",
    "aten.movedim",
    "aten.swapaxes",
    "aten.swapdims",
    "aten.numpy_T",
    "aten.mT",
    "aten.adjoint",
    "aten.mH",
    "aten.permute_copy",
)
def permute(call: Call) -> Any:
    """Whatever the op is called, it is run on a tensor whose strides tell the axes apart."""
    label = call.label("self")
    marks = torch.empty_strided([2] * len(label), list(range(1, len(label) + 1)), device="meta")
    args = [marks if a is call.node.args[0] else a for a in call.node.args]
    order = [s - 1 for s in call.node.target(*args, **call.node.kwargs).stride()]
    return call.typed(call.op(aten.permute.default, call["self"], order), tuple(label[i] for i in order))


@rule("aten.view_as_complex", "aten.view_as_real", "aten.real", "aten.imag")
def complex_pairs(call: Call) -> Any:
    """The last axis of (real, imaginary) pairs comes or goes."""
    label = call.label("self")
    rank = len(call.old_shape)
    out = label[:rank] if rank <= len(label) else (*label, (2,))
    return call.emit(out)


@rule("aten.unsqueeze")
def unsqueeze(call: Call) -> Any:
    label = list(call.label("self"))
    label.insert(call["dim"] % (len(label) + 1), ())
    return call.emit(tuple(label))


@rule("aten.squeeze")
def squeeze(call: Call) -> Any:
    label = call.label("self")
    dims = call.args.get("dim", range(len(label)))
    dims = [d % len(label) for d in ([dims] if isinstance(dims, int) else dims)]
    gone = [d for d in dims if old(label[d]) == 1]
    kept = [d for d in range(len(label)) if d not in gone]
    if not gone:
        return call["self"], label
    return call.typed(call.op(aten.squeeze.dims, call["self"], gone), tuple(label[d] for d in kept))


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to")
def expand(call: Call) -> Any:
    """Axes of size 1 are repeated; where the original repeated them to the batch, they become the batch."""
    label, sizes = call.label("self"), call.old_shape
    padded = ((),) * (len(sizes) - len(label)) + tuple(label)
    want = tuple(axis if old(axis) == size else plain((size,))[0] for axis, size in zip(padded, sizes))
    return call.typed(call.op(aten.expand.default, call["self"], list(new_shape(want))), want)


@rule("aten.repeat", "aten.tile")
def repeat(call: Call) -> Any:
    """`r` copies of an axis one after the other: r * axis."""
    label = call.label("self")
    counts = list(call.args.get("repeats", call.args.get("dims")))
    padded = ((),) * (len(counts) - len(label)) + tuple(label)
    counts = [1] * (len(padded) - len(counts)) + counts
    out = tuple(normal((c, *axis)) for c, axis in zip(counts, padded))
    return call.typed(call.op(aten.repeat.default, call["self"], counts), out)


@rule("aten.repeat_interleave")
def repeat_interleave(call: Call) -> Any:
    """Each entry `r` times in a row: axis * r."""
    if call.node.target is not aten.repeat_interleave.self_int or call["dim"] is None:
        raise NeedsFull("it repeats by a tensor of counts")
    label = list(call.label("self"))
    dim = call["dim"] % len(label)
    label[dim] = normal((*label[dim], call["repeats"]))
    size = call.args.get("output_size") and new(label[dim])
    return call.emit(tuple(label), output_size=size)


@rule(
    "aten.roll",
    "aten.flip",
    "aten.rot90",
    "aten.pixel_shuffle",
    "aten.pixel_unshuffle",
)
def moves_positions(call: Call) -> Any:
    """Moves values along axes: fine where those axes hold no tokens."""
    label = call.label("self")
    dims = call.args.get("dims")
    if dims is not None:
        touched = [d % len(label) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    else:
        touched = list(range(len(label)))
    if any(has_tokens(label[d]) or any(isinstance(a, Batch) for a in label[d]) for d in touched) or not touched:
        raise NeedsFull("it moves values along the token axis")
    out = tuple(plain((size,))[0] if d in touched else axis for d, (axis, size) in enumerate(zip(label, call.old_shape)))
    return call.emit(out)


@rule("aten.constant_pad_nd", "aten.pad")
def pad(call: Call) -> Any:
    """Constants before and after: on a token axis they stand around the tokens, such as a mask's for registers."""
    label, amounts = list(call.label("self")), call["pad"]
    constant = call.args.get("mode", "constant") == "constant"
    for i in range(0, len(amounts), 2):
        d, (before, after) = len(label) - 1 - i // 2, amounts[i : i + 2]
        if before == after == 0:
            continue
        seq = tokens_of(label[d])
        if seq is not None and label[d] == (seq,) and constant and min(before, after) >= 0:
            label[d] = (make_seq((before, *seq.parts, after)),)
        elif has_tokens(label[d]) or has_batch(label[d]):
            raise NeedsFull("it moves values along the token axis")
        else:
            label[d] = plain(call.old_shape[d : d + 1])[0]
    return call.emit(tuple(label))


@rule("aten.unfold", "aten.as_strided", "aten.im2col", "aten.col2im")
def strided(call: Call) -> Any:
    raise NeedsFull("it reads tokens by their place on the grid")
