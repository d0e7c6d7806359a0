"""Weights that a softmax has made one, over tokens that were merged or are gone: what each op does with them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from tokcompile.passes.graph import packet, shape
from tokcompile.passes.memory import reachable_from
from tokcompile.passes.rules import Call, NeedsFull
from tokcompile.passes.rules.core import rank_of
from tokcompile.passes.rules.sizes import each, mean_of_each, reaches, weighs
from tokcompile.passes.tokens import Axis, Label, has_tokens, old, spaces_on
from tokcompile.passes.weighted import Weights, shares, summed, weights

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter

BENDS = "what it does with weights that a softmax has made one is not the same for shares of them"
NARROWS = "it takes weights that a softmax has given to more tokens at those that are left"
ADDS = {"aten.add", "aten.sub", "aten.rsub"}


class Weighing:
    """What `weighted.py` found in the old graph, asked while the new one is written."""

    def __init__(self, rewriter: Rewriter):
        self.rewriter = rewriter

    @cached_property
    def softmaxes(self) -> Weights:
        return weights(self.rewriter.old.graph)

    def weighted(self, node: Node) -> bool:
        """Whether a softmax over the tokens that are left made the weights of a sum one."""
        sums = self.softmaxes.sums.get(node, ())
        return any(self.over_tokens(softmax) and self.holds_tokens(operand, axis) for softmax, operand, axis in sums)

    def among_those_left(self, total: Node, operand: Node, axis: int) -> bool:
        """Whether a sum that comes later, over an axis of tokens of an operand, is one of those that are left."""
        sums = self.softmaxes.sums.get(total, ())
        return self.divided(total) or any(self.over_tokens(s) for s, n, d in sums if (n, d) == (operand, axis))

    def one_by_one(self, node: Node) -> bool:
        """Whether these weights are those of single tokens again, see `of_members`."""
        sums = self.softmaxes.sums.get(node, ())
        return not any(softmax in self.softmaxes.axes.get(operand, ()) for softmax, operand, _ in sums)

    def several_summed(self, node: Node) -> list[Axis]:
        """The axes along which an op sums products of several weights of one token; none where it sums those of one."""
        sums = self.softmaxes.sums.get(node, ())
        held = {n: axis for softmax, n, axis in sums if self.over_tokens(softmax) and self.holds_tokens(n, axis)}
        return [self.rewriter.labels[n][axis] for n, axis in held.items()] if len(held) > 1 else []

    def bent(self, node: Node) -> list[tuple[Node, int]]:
        """Where an op is not linear in weights of tokens, of which those that stand for several hold the sum: the operands that
        hold them, and their axes there."""
        sums, axes = self.softmaxes.sums.get(node, ()), self.softmaxes.axes
        held = ((softmax, n, axis) for n in node.all_input_nodes for softmax, axis in axes.get(n, {}).items())
        return [
            (n, axis)
            for softmax, n, axis in held
            if self.over_tokens(softmax) and self.holds_tokens(n, axis)
            if (softmax, n, axis) not in sums and softmax not in axes.get(node, {})
        ]

    def narrowed(self, node: Node, label: Label) -> list[Axis]:
        """The axes along which weights of more tokens, as of a map of an earlier depth, meet fewer and would be restricted to
        these. In a block those of dropped tokens may go with them."""
        axes, labels, out = self.softmaxes.axes, self.rewriter.labels, []
        for n in node.all_input_nodes:
            shared = axes.get(n, {}).keys() & axes.get(node, {}).keys()
            for own, there in ((axes[n][softmax], axes[node][softmax]) for softmax in shared):
                before = rank_of(labels[n][own])[0] if self.holds_tokens(n, own) else 0
                out += [label[there]] * (before < rank_of(label[there])[0])
        return out

    def check(self, node: Node, result: Any, behind: bool) -> None:
        """What a rule has written for an op. behind: whether that is behind all blocks. Raises: NeedsFull where it stands for
        something else."""
        if behind and (self.several_summed(node) or self.bent(node)):
            raise NeedsFull(BENDS)
        narrowed = self.narrowed(node, result[1]) if isinstance(result, tuple) and len(node.all_input_nodes) > 1 else []
        if any(behind or weighs(axis) for axis in narrowed):
            raise NeedsFull(NARROWS)

    def of_members(self, node: Node) -> dict[Node, tuple[Node, Label]]:
        """What such an op is given in front of the last block: weights of single tokens, and of a table that is added the mean
        over those that one holds. Raises: NeedsFull where it cannot be."""
        if any(weighs(axis) for axis in self.several_summed(node)):
            raise NeedsFull(BENDS)
        rw = self.rewriter
        out: dict[Node, tuple[Node, Label]] = {}
        for n, axis in self.bent(node):
            label = rw.labels[n]
            if any(space.short for space in spaces_on(label[axis])) and self.softmaxes.counted(n, old(label[axis])):
                raise NeedsFull("it weighs tokens by a share times how many there were")
            if weighs(label[axis]):
                value, _ = out.get(n, (rw.env[n], label))
                out[n] = each(Call(rw, node), value, label, axis), label
                tables = [t for t in node.all_input_nodes if packet(node) in ADDS and not rw.is_labelled(t)]
                out |= {t: mean_of_each(Call(rw, node), t, label, axis) for t in tables if reaches(t, label, axis)}
        return out

    def over_tokens(self, softmax: Node) -> bool:
        return self.holds_tokens(softmax, self.softmaxes.axes[softmax][softmax])

    def holds_tokens(self, node: Node, axis: int) -> bool:
        label = self.rewriter.labels.get(node)
        return label is not None and has_tokens(label[axis])

    @cached_property
    def shares(self) -> Mapping[Node, Set[Node]]:
        structure = self.rewriter.structure
        lengths = {shape(b.mid)[b.token_axis] for b in structure.blocks}
        for s in structure.stages:  # with and without what stands around the patches
            lengths |= {s.n, s.n + s.prefix, s.n + s.suffix}
        return shares(self.rewriter.old.graph, reachable_from(set(self.rewriter.splices)), lengths)

    def divided(self, node: Node) -> bool:
        """Whether what a sum is divided by, or divides, is short of the same tokens."""
        known = self.rewriter.env
        walked = [n for n in self.shares.get(node, ()) if all(i in known for i in n.all_input_nodes)]
        return node in self.shares and all(
            any(self.holds_tokens(i, d) for i in n.all_input_nodes for d in summed(n, i)) for n in walked
        )
