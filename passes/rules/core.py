"""The rule registry and `Call`, the view that a rule has of the op it rewrites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tokcompile.errors import TokcompileError, UnsupportedGraph
from tokcompile.passes.batch import flat, unbatched
from tokcompile.passes.graph import bind, is_tensor, shape
from tokcompile.passes.tokens import (
    Axis,
    Batch,
    Label,
    Seq,
    has_batch,
    has_tokens,
    is_labelled,
    new_shape,
    normal,
    old,
    plain,
    spaces_on,
    tokens_of,
)  # fmt: skip

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter

Rule = Callable[["Call"], Any]
RULES: dict[str, Rule] = {}


class NeedsFull(Exception):
    """An op needs the whole token axis (a convolution over the grid, a sort over tokens): tokens must be recovered."""


def one_sample(label: Label, dims: Iterable[int]) -> None:
    """Raises: NeedsFull where an op mixes samples along `dims`, token by token: each of them keeps other tokens."""
    mixed = {d % len(label) for d in dims}
    left = any(has_tokens(axis) for d, axis in enumerate(label) if d not in mixed)
    if left and any(has_batch(label[d]) and not has_tokens(label[d]) for d in mixed):
        raise NeedsFull("it mixes samples that keep other tokens")


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Registers a rule for op packets such as "aten.softmax" (all overloads)."""

    def register(fn: Rule) -> Rule:
        for op in ops:
            RULES[op] = fn
        return fn

    return register


def register_rule(op: str, fn: Rule) -> Rule:
    """Tells the pass what your own op does to token axes.

    op: "namespace.name". fn: takes a `Call` and returns `call.emit(label)`, or raises `NeedsFull`.

    Example:
        >>> import tokcompile
        >>> def pointwise(call):                       # the op keeps the shape of its first operand
        ...     return call.emit(call.label("x"))
        >>> _ = tokcompile.register_rule("mylib.fancy_gelu", pointwise)
    """
    if "::" in op:
        op = op.replace("::", ".")
    if not callable(fn):
        raise TokcompileError(f"the rule for {op!r} must be callable, not {type(fn).__name__}")
    RULES[op] = fn
    return fn


class Call:
    """One op under rewriting: named arguments in the new graph, their labels, and their old shapes.

    A label types every axis; `call.label(name)` types a tensor that holds no reduced tokens by its plain sizes.
    """

    def __init__(self, rewriter: Rewriter, node: Node, instead: Mapping[Node, tuple[Node, Label]] | None = None):
        """instead: what is taken for operands in place of what the new graph has for them."""
        self.rewriter, self.node, self.instead = rewriter, node, instead or {}
        self.old_args = bind(node)
        self.args = torch.fx.node.map_aggregate(self.old_args, lambda a: self.given(a) if isinstance(a, Node) else a)
        self.gather = rewriter.gather

    # -- reading ---------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def old_shape(self) -> tuple[int, ...]:
        """The shape of the op's result in the original graph."""
        return shape(self.node)

    def is_tensor(self, name: str) -> bool:
        return is_tensor(self.old_args.get(name))

    def given(self, old_node: Node) -> Any:
        return self.instead[old_node][0] if old_node in self.instead else self.rewriter.env[old_node]

    def label_of(self, old_node: Node) -> Label:
        if old_node in self.instead:
            return self.instead[old_node][1]
        return self.rewriter.labels.get(old_node) or plain(shape(old_node))

    def label(self, name: str) -> Label:
        return self.label_of(self.old_args[name])

    def labels(self, name: str) -> list[Label]:
        return [self.label_of(n) for n in self.old_args[name]]

    def labelled(self, name: str) -> bool:
        return self.is_tensor(name) and is_labelled(self.label(name))

    def tensors(self) -> list[str]:
        return [name for name in self.old_args if self.is_tensor(name)]

    # -- writing ---------------------------------------------------------------------------------------------------

    def op(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Any other op, unlabelled."""
        return self.rewriter.builder.emit(target, *args, **kwargs)

    def emit(self, label: Label | list[Label], /, **overrides: Any) -> Any:
        """The same op on the arguments in hand, its result typed `label`; the shape is checked on fake tensors."""
        args = {**self.args, **overrides}
        schema = self.node.target._schema
        positional = [args[a.name] for a in schema.arguments if not a.kwarg_only]
        keywords = {a.name: args[a.name] for a in schema.arguments if a.kwarg_only and args[a.name] != a.default_value}
        out = self.op(self.node.target, *positional, **keywords)
        return self.typed(out, label)

    def typed(self, value: Node, label: Label | list[Label]) -> Any:
        """(value, label), after checking that the shape is what the label says."""
        if isinstance(label, list):
            return [self.typed(v, one) for v, one in zip(self.rewriter.builder.unpack(value), label)]
        if shape(value) != new_shape(label):
            raise UnsupportedGraph(
                f"the rule for this op gives {shape(value)}, its label says {new_shape(label)}: a bug in the rule",
                self.node,
            )
        return value, label

    def coerce(self, name: str, want: Label) -> Node:
        """The named operand restricted to the tokens of `want`, aligned from the right."""
        return self.coerce_node(self.args[name], self.label(name), want)

    def coerce_node(self, value: Node, have: Label, want: Label) -> Node:
        return self.gather.coerce(value, *unbatched(self.gather, have, want), self.node)

    def join(self, labels: Iterable[Label]) -> Label:
        """The label of a broadcast of operands, aligned from the right."""
        labels = list(labels)
        rank = max(len(one) for one in labels)
        padded = [((),) * (rank - len(one)) + tuple(one) for one in labels]
        return tuple(self.join_axis([one[d] for one in padded]) for d in range(rank))

    def join_axis(self, axes: list[Axis]) -> Axis:
        """The most refined of several axes that are broadcast together."""
        best: Axis = ()
        for axis in axes:
            if old(axis) == 1:
                continue
            if old(best) != 1 and old(axis) != old(best):
                raise UnsupportedGraph(f"axes of {old(best)} and {old(axis)} tokens meet", self.node)
            if old(best) == 1 or self.rank(axis) > self.rank(best):
                best = axis
        return best

    def rank(self, axis: Axis) -> tuple[int, bool, int]:
        """`rank_of`, where samples may have become a batch after some reductions."""
        return rank_of(flat(self.gather, axis))[0], *rank_of(axis)[1:]


def rank_of(axis: Axis) -> tuple[int, bool, int]:
    """How much an axis says: tokens over plain, a later reduction over an earlier one, a batch over a size."""
    return max((len(s.lineage()) for s in spaces_on(axis)), default=0), has_batch(axis), len(axis)


__all__ = [
    "RULES", "Axis", "Batch", "Call", "Label", "NeedsFull", "Seq", "has_batch", "has_tokens", "is_labelled", "normal", "old",
    "plain", "register_rule", "rule", "tokens_of",
]  # fmt: skip
