"""Matrix products: batch axes are broadcast, the contracted axis must hold the same tokens on both sides."""

from __future__ import annotations

from typing import Any

from tokcompile.passes.graph import aten, shape
from tokcompile.passes.rules.core import Call, Label, NeedsFull, has_batch, has_tokens, old, one_sample, rule
from tokcompile.passes.rules.sizes import weigh

BY_POSITION = "it adds tokens up by a weight per position"


@rule("aten.matmul", "aten.bmm", "aten.mm")
def matmul(call: Call) -> Any:
    a, b = call.tensors()[:2]
    la, lb = call.label(a), call.label(b)
    if len(la) < 2 or len(lb) < 2:
        return vector(call, a, b)
    if len(la) == len(lb) == 2 and has_batch(la[0]) and has_tokens(la[1]) and not call.labelled(b) and of_what_is_left(call):
        return with_own_table(call, a, b)
    left, right, out = product(call, la, lb)
    return call.emit(out, **{a: call.coerce(a, left), b: weigh(call, call.coerce(b, right), right, -2)})


def with_own_table(call: Call, a: str, b: str) -> Any:
    """One row a sample, with a table that each sample reads at its own tokens."""
    (batch, tokens), (_, columns) = call.label(a), call.label(b)
    table = weigh(call, call.coerce(b, (batch, tokens, columns)), (batch, tokens, columns), -2)
    out = call.op(aten.matmul.default, call.op(aten.unsqueeze.default, call[a], 1), table)
    return call.typed(call.op(aten.squeeze.dim, out, 1), (batch, columns))


def product(call: Call, la: Label, lb: Label) -> tuple[Label, Label, Label]:
    """What two operands must be coerced to, and what their product is."""
    one_sample(la, [-1])
    one_sample(lb, [-2])
    if has_batch(lb[-1]):  # a product of samples with samples
        one_sample(la, [-2])
    batch = call.join([la[:-2], lb[:-2]]) if len(la) > 2 or len(lb) > 2 else ()
    if has_tokens(la[-1]) != has_tokens(lb[-2]) and not of_what_is_left(call):
        raise NeedsFull(BY_POSITION)
    inner = call.join_axis([la[-1], lb[-2]])
    # of full rank: an operand without a batch gains one when it is gathered
    return (*batch, la[-2], inner), (*batch, inner, lb[-1]), (*batch, la[-2], lb[-1])


def of_what_is_left(call: Call) -> bool:
    """Whether a sum over tokens weighs those that are left among each other: a table is read at their positions then."""
    return call.rewriter.weighing.weighted(call.node) or call.rewriter.weighing.divided(call.node)


def vector(call: Call, a: str, b: str) -> Any:
    la, lb = call.label(a), call.label(b)
    if len(la) == 1 or has_tokens(la[-1]) or has_tokens(lb[0]):
        raise NeedsFull("it contracts tokens with a vector")
    return call.emit(la[:-1])


@rule("aten.baddbmm", "aten.addmm", "aten.addbmm")
def add_product(call: Call) -> Any:
    first, a, b = call.tensors()[:3]
    left, right, out = product(call, call.label(a), call.label(b))
    right_side = weigh(call, call.coerce(b, right), right, -2)
    return call.emit(out, **{a: call.coerce(a, left), b: right_side, first: call.coerce(first, out)})


@rule("aten.einsum")
def einsum(call: Call) -> Any:
    """Each letter is one axis, the same on every operand that names it."""
    inputs, _, output = call["equation"].partition("->")  # canonicalise has written it out
    terms, labels = inputs.split(","), call.labels("tensors")
    if any(len(set(t)) != len(t) for t in terms):
        raise NeedsFull("an einsum that takes a diagonal")
    for term, label in zip(terms, labels):
        one_sample(label, [d for d, letter in enumerate(term) if letter not in output])
    axes: dict[str, Any] = {}
    for term, label in zip(terms, labels):
        for letter, axis in zip(term, label):
            axes[letter] = call.join_axis([axes[letter], axis]) if letter in axes else axis
    for letter, axis in axes.items():
        holders = [has_tokens(label[term.index(letter)]) for term, label in zip(terms, labels) if letter in term]
        alone = len(holders) == 1 or not (all(holders) or of_what_is_left(call))
        if has_tokens(axis) and letter not in output and alone:
            raise NeedsFull(BY_POSITION)
    samples = [c for c, axis in axes.items() if has_batch(axis)]
    if len(samples) > 1:
        raise NeedsFull("it multiplies samples with samples")
    batch = "".join(samples)
    operands = []
    todo = {letter for letter, axis in axes.items() if has_tokens(axis) and letter not in output}
    for i, (term, label, value) in enumerate(zip(terms, labels, call["tensors"])):
        lead = (axes[batch],) if batch and batch not in term else ()
        want = (*lead, *(axes[c] for c in term))
        gathered = call.coerce_node(value, label, want)
        for letter in todo & set(term):
            gathered = weigh(call, gathered, want[-len(shape(gathered)) :], term.index(letter) - len(term))
        todo -= set(term)
        if len(shape(gathered)) > len(term):  # a table that had no batch has gained one
            terms[i] = batch + term
        operands.append(gathered)
    return call.emit(tuple(axes[c] for c in output), equation=f"{','.join(terms)}->{output}", tensors=operands)


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.conv_transpose2d", "aten.conv_transpose1d")
def convolution(call: Call) -> Any:
    """Fine where tokens lie on the batch axis; a 1 x 1 kernel is a linear map and keeps them anywhere but on channels."""
    label = call.label("input")
    out = call.old_shape
    if has_tokens(label[1]) or (any(has_tokens(axis) for axis in label[2:]) and not is_one_by_one(call)):
        raise NeedsFull("it convolves over the token grid")
    one_sample(label, [1])
    channels = (out[1],) if out[1] != 1 else ()
    spatial = [axis if old(axis) == size else ((size,) if size != 1 else ()) for axis, size in zip(label[2:], out[2:])]
    return call.emit((label[0], channels, *spatial))


def is_one_by_one(call: Call) -> bool:
    weight = call.label("weight")
    ones = all(old(axis) == 1 for axis in weight[2:])
    padding = call.args.get("padding", 0)
    zero = padding in (0, "valid") or (isinstance(padding, (list, tuple)) and not any(padding))
    return ones and zero and all(s == 1 for s in call.args.get("stride", [1]))


@rule(
    "aten.max_pool2d",
    "aten.avg_pool2d",
    "aten.adaptive_avg_pool2d",
    "aten.adaptive_avg_pool1d",
    "aten.avg_pool1d",
    "aten.max_pool1d",
    "aten.upsample_nearest2d",
    "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d",
    "aten.adaptive_max_pool2d",
    "aten.adaptive_max_pool1d",
    "aten.max_pool2d_with_indices",
    "aten.grid_sampler",
)
def over_the_grid(call: Call) -> Any:
    raise NeedsFull("it works on the token grid")
