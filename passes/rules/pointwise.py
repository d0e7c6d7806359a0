"""Ops that act on each element, or on each row of the last axes: the label is that of the broadcast operands."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch.fx import Node

from tokcompile.passes.graph import aten, get_attr, packet, shape
from tokcompile.passes.origin import LAYOUT
from tokcompile.passes.renumber import as_numbered, last_rows, rows_axis
from tokcompile.passes.rotary import by_channel
from tokcompile.passes.rules.contract import BY_POSITION
from tokcompile.passes.rules.core import Call, Label, NeedsFull, has_batch, has_tokens, old, one_sample, plain, rule, tokens_of
from tokcompile.passes.rules.sizes import reaches
from tokcompile.passes.weighted import NORMS, ORDER, SUMS, along, behind

UNARY = [
    "abs", "neg", "exp", "exp2", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "reciprocal", "square", "sin",
    "cos", "tan", "tanh", "sigmoid", "erf", "relu", "relu6", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "elu", "celu", "selu", "leaky_relu", "softplus", "log_sigmoid", "clamp", "clamp_min", "clamp_max",
    "round", "floor", "ceil", "trunc", "sign", "bitwise_not", "logical_not", "isnan", "isinf", "isfinite",
    "nan_to_num", "to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout", "positive", "pow", "type_as",
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "float", "half", "bfloat16", "frac", "logit",
    "threshold", "softsign", "tanhshrink", "fill", "zero", "sinh", "cosh", "atan", "asin", "acos", "feature_dropout",
]  # fmt: skip
BINARY = [
    "add", "sub", "mul", "div", "floor_divide", "remainder", "fmod", "maximum", "minimum", "where",
    "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and",
    "bitwise_or", "bitwise_xor", "atan2", "addcmul", "addcdiv", "lerp", "rsub", "fmax", "fmin", "prelu", "copysign", "hypot",
    "ldexp", "nextafter", "xlogy", "copy",
]  # fmt: skip
OVER_ALL = SUMS | NORMS | {
    "aten.logsumexp", "aten.amax", "aten.amin", "aten.max", "aten.min", "aten.prod", "aten.all", "aten.any",
}  # fmt: skip
ENTRY_BY_ENTRY = {f"aten.{name}" for name in BINARY}
ONE_BY_ONE = ORDER | LAYOUT | {f"aten.{name}" for name in UNARY}  # do the same with each entry, wherever it lies


@rule(*(f"aten.{name}" for name in UNARY + BINARY))
def pointwise(call: Call) -> Any:
    names = call.tensors()
    if call.node.target in (aten.type_as.default,):
        names = names[:1]
    label = call.join(call.label(name) for name in names)
    if adds_up_by_position(call, names, label):
        raise NeedsFull(BY_POSITION)
    return call.emit(label, **{name: operand(call, name, label) for name in names})


def adds_up_by_position(call: Call, names: list[str], label: Label) -> bool:
    """Whether a sum over tokens follows, or a mean, or the largest of all, to which each of them comes with its own entry of a
    table, such as a mask: that of one that stands for others is not theirs."""
    tables = [call.old_args[name] for name in names if not call.labelled(name)]
    axes = [d for d, axis in enumerate(label) if has_tokens(axis) and any(reaches(table, label, d) for table in tables)]
    through = ONE_BY_ONE | ENTRY_BY_ENTRY if call.rewriter.behind_blocks(call.node) else ONE_BY_ONE  # no residual stream
    sums = (found for d in axes for found in sums_behind(call.node, d, through))
    return any(not call.rewriter.weighing.among_those_left(*found) for found in sums)


def sums_behind(node: Node, axis: int, through: Set[str]) -> Iterator[tuple[Node, Node, int]]:
    """(sum or the like, its operand, axis there) along an axis of a value, with nothing between that looks at other tokens."""
    todo, seen = [(node, axis)], {(node, axis)}
    while todo:
        value, axis = todo.pop()
        for user in value.users:
            if packet(user) in OVER_ALL and axis in along(user, value):
                yield user, value, axis
            elif packet(user) in through and (there := behind(user, value, axis)) is not None and (user, there) not in seen:
                seen.add((user, there))
                todo.append((user, there))


def operand(call: Call, name: str, label: Label) -> Node:
    """An operand at the tokens that are left; tables over positions may stand for other ones than the tokens themselves."""
    table = rotary(call, name, label) or last_rows(call, name, label)
    return table or call.coerce(name, label if call.labelled(name) else as_numbered(call.gather, label))


def rotary(call: Call, name: str, label: Label) -> Node | None:
    """A rotary table that is multiplied to tokens with several positions each; None for any other operand."""
    seq = tokens_of(label[-2]) if packet(call.node) == "aten.mul" and len(label) > 2 else None
    if seq is None or not any(s.positions is not None for space in seq.spaces for s in space.lineage()):
        return None
    node = call.old_args[name]
    sizes = shape(node)
    lead = [size for size in sizes[:-2] if size != 1]  # a batch of its own at most, where the label has it too
    if call.labelled(name) or rows_axis(node, seq.old) != len(sizes) - 2:
        return None
    if lead not in ([], [old(label[0])][: len(sizes) == len(label)]) or (has_batch(label[0]) and len(label[0]) > 1):
        return None
    call.rewriter.positioned.update(s for space in seq.spaces for s in space.lineage())
    return by_channel(call.gather, call[name], seq, holds_pairs(call, node), len(label), call.node)


def holds_pairs(call: Call, node: Node) -> bool:
    """Whether a table that the graph holds as a constant has each frequency in two neighbouring channels."""
    width = shape(node)[-1]
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    value = get_attr(call.rewriter.old, node.target) if node.op == "get_attr" else None
    if value is None or value.is_meta or width % 2 or value.shape[-1] % width:  # sine and cosine may be one constant
        return False
    halves = torch.equal(value[..., : width // 2], value[..., width // 2 : width])
    return not halves and torch.equal(value[..., 0::2], value[..., 1::2])


@rule(
    "quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor",
    "aten.fake_quantize_per_tensor_affine",
)  # fmt: skip
def quantize(call: Call) -> Any:
    """One scale for the whole tensor: it acts on each element."""
    return call.emit(call.label(call.tensors()[0]))


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def last_axes_norm(call: Call) -> Any:
    """Normalises the last axes of each token."""
    label = call.label("input")
    count = len(call["normalized_shape"])
    if any(has_tokens(axis) for axis in label[-count:]):
        raise NeedsFull("it normalises over tokens")
    return call.emit(label)


@rule("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.instance_norm", "aten.cudnn_batch_norm")
def batch_norm(call: Call) -> Any:
    """At inference an affine map per channel (axis 1)."""
    label = call.label("input")
    if has_tokens(label[1]) or call.args.get("training") or call.args.get("use_input_stats"):
        raise NeedsFull("it normalises over tokens")
    return call.emit(label)


@rule("aten.group_norm", "aten.native_group_norm")
def group_norm(call: Call) -> Any:
    """Statistics over all positions: only harmless where no position is a token."""
    label = call.label("input")
    if any(has_tokens(axis) for axis in label[1:]):
        raise NeedsFull("its statistics run over all tokens")
    return call.emit(label)


@rule("aten.linear")
def linear(call: Call) -> Any:
    label = call.label("input")
    if has_tokens(label[-1]) or any(has_tokens(a) for a in call.label("weight")):
        raise NeedsFull("it mixes tokens by a weight per position")
    return call.emit((*label[:-1], plain(call.old_shape[-1:])[0]))


@rule("aten.glu")
def glu(call: Call) -> Any:
    label = list(call.label("self"))
    dim = call["dim"] % len(label)
    if has_tokens(label[dim]):
        raise NeedsFull("it pairs tokens with each other")
    one_sample(tuple(label), [dim])
    label[dim] = plain(call.old_shape[dim : dim + 1])[0]
    return call.emit(tuple(label))


@rule("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty", "aten.sym_size")
def fresh(call: Call) -> Any:
    """Takes only the dtype of its operand: the result is a full, unlabelled tensor."""
    return call.emit(plain(call.old_shape))
