"""Rewrite: one walk over the graph; reductions are spliced in, rules carry their effect downstream, operands that meet a
reduced axis are gathered on demand."""

from __future__ import annotations

import operator
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tokcompile.errors import TokcompileError, UnsupportedGraph
from tokcompile.passes.calls import MARK, MixerCall
from tokcompile.passes.crop import Hidden
from tokcompile.passes.find import Structure
from tokcompile.passes.gather import Gatherer
from tokcompile.passes.graph import Builder, device_of, fake_mode, packet, user_dependent, without_dead_code
from tokcompile.passes.insert import Seen, check_positions, insert
from tokcompile.passes.last_token import LastTokenSeen
from tokcompile.passes.memory import ancestors_of
from tokcompile.passes.mixers import shorten
from tokcompile.passes.recover import Recovery, recover_operands, write_outputs
from tokcompile.passes.renumber import Consecutive
from tokcompile.passes.rules import RULES, Call, NeedsFull
from tokcompile.passes.segments import runs
from tokcompile.passes.splice import Splice
from tokcompile.passes.tokens import Axis, Label, Run, Seq, Space, SplitsTokens, is_labelled
from tokcompile.passes.weighing import Weighing

WAY_OUT = "place reductions behind it (where=...), or pass recover='anywhere', which gives tokens back inside at a cost"


@dataclass
class Rewritten:
    """The new graph, and all that later passes and the report want to know about it."""

    gm: GraphModule
    spaces: list[Space]
    labels: dict[Node, Label]
    recoveries: list[Recovery]
    recovered: set[Node]
    output_labels: list[Label | None]
    averaged: set[Node] = field(default_factory=set)  # sums that a number of tokens divides: means of those that are left
    extra_outputs: list[str] = field(default_factory=list)
    kept_of: dict[str, Run] = field(default_factory=dict)  # what the indices among the extra outputs are indices of
    overhead_flops: int = 0  # of the reductions themselves
    checks: list[Consecutive | LastTokenSeen] = field(default_factory=list)  # what is right only for some inputs
    mixed: dict[Node, Axis] = field(default_factory=dict)  # old nodes of mixers that were traced again, see mixers.py,
    again: list[str] = field(default_factory=list)  # and the paths of these


class Rewriter:
    """Walks the old graph once, writing the new one. env: old node -> new node (a list where an op gives several)."""

    def __init__(
        self,
        gm: GraphModule,
        structure: Structure,
        splices: Sequence[Splice],
        *,
        inputs: Sequence[Any] = (),
        outputs: str = "keep",
        recover: str = "end",
        size_weighted_mean: bool = True,
        mixers: Sequence[MixerCall] = (),
    ):
        self.old, self.structure, self.outputs, self.recover = gm, structure, outputs, recover
        self.size_weighted_mean, self.inputs = size_weighted_mean, inputs
        self.builder = Builder(shallow_copy(gm), fake_mode(gm.graph), device_of(gm.graph))
        self.gather = Gatherer(self.builder)
        self.weighing = Weighing(self)
        self.env: dict[Node, Any] = {}
        self.labels: dict[Node, Any] = {}
        self.before: dict[Node, tuple[Node, Label | None]] = {}  # at a splice: the value as it was before the reduction
        self.full: dict[Node, Any] = {}
        self.met: list[Node] = []  # ops that wanted the whole token axis
        self.splits: list[SplitsTokens] = []  # views that tear tokens apart, and slices that cut them: hints for
        self.cuts: set[int] = set()  # another try in groups or in segments,
        self.sample = 0  # see `Layout`
        self.hidden: Hidden = ()
        self.recoveries: list[Recovery] = []
        self.recovered: set[Node] = set()
        self.averaged: set[Node] = set()
        self.spaces: list[Space] = []
        self.kept_of: dict[str, Run] = {}
        self.overhead_flops = 0
        self.reduced: dict[tuple[Any, ...], Seen] = {}  # reductions of segments that are alike
        self.positioned: set[Space] = set()  # whose several positions, or new numbers, a rotary table was read at
        self.in_sequence: dict[Node, bool] = {}  # rotary tables: whether their positions go on by one
        self.checks: dict[Node, Consecutive | LastTokenSeen] = {}
        self.mixers = mixers  # whose calls are traced again over fewer tokens
        self.mixed: dict[Node, Axis] = {}  # what stood there, with the token axis that it has now
        self.again: list[str] = []  # their paths
        self.weights: dict[int | str, str] = {}  # names, by themselves and by ids
        self.orders: dict[Seq, tuple[Node, Node]] = {}  # see mixers.py
        self.splices: dict[Node, list[Splice]] = {}
        for splice in splices:
            self.splices.setdefault(splice.at, []).append(splice)

    def run(self) -> Rewritten:
        output_labels: list[Label | None] = []
        extra: list[str] = []
        for node in self.old.graph.nodes:
            self.builder.origin = node
            if node.op == "output":
                output_labels, extra = write_outputs(self, node)
            else:
                self.step(node)
                for run in runs(self, node):
                    insert(self, run)
        check_positions(self)
        return Rewritten(
            without_dead_code(self.builder.root, self.builder.graph),
            self.spaces,
            self.labels,
            self.recoveries,
            self.recovered,
            output_labels,
            self.averaged,
            extra,
            self.kept_of,
            self.overhead_flops,
            list(self.checks.values()),
            self.mixed,
            self.again,
        )

    # -- one node --------------------------------------------------------------------------------------------------

    def step(self, node: Node) -> None:
        if node in self.env or node in self.mixed:
            return
        if packet(node) == MARK:
            shorten(self, node)
            return
        if node.target is operator.getitem and isinstance(self.env.get(node.args[0]), list):
            self.set(node, self.env[node.args[0]][node.args[1]], self.labels[node.args[0]][node.args[1]])
            return
        if not any(self.is_labelled(n) for n in node.all_input_nodes):
            self.env[node] = self.builder.copy(node, self.plain_value)
            return
        apply = RULES.get(packet(node))
        try:
            if apply is None:
                raise NeedsFull("there is no rule for it")
            behind = self.behind_blocks(node)
            result = apply(Call(self, node, None if behind else self.weighing.of_members(node)))
            self.weighing.check(node, result, behind)
        except NeedsFull as why:
            recover_operands(self, node, str(why), known=apply is not None)
            return
        except UnsupportedGraph as error:
            if error.node is not None:
                raise
            raise UnsupportedGraph(error.reason, node, error.hint or WAY_OUT) from error
        except TokcompileError:
            raise
        except Exception as error:
            raise UnsupportedGraph(
                f"the rule for this op failed: {type(error).__name__}: {error}", node, "see docs/writing-a-rule.md"
            ) from error
        if isinstance(result, list):
            self.env[node] = [value for value, _ in result]
            self.labels[node] = [label if is_labelled(label) else None for _, label in result]
        else:
            self.set(node, *result)

    def set(self, node: Node, value: Node, label: Label | None) -> None:
        self.env[node] = value
        if is_labelled(label):
            self.labels[node] = label

    def plain_value(self, node: Node) -> Any:
        value = self.env[node]
        if isinstance(value, list):  # an op whose several results are passed on as a whole
            raise UnsupportedGraph("a tuple of reduced tensors is passed on whole", node)
        return value

    def is_labelled(self, node: Node) -> bool:
        label = self.labels.get(node)
        return any(map(is_labelled, label)) if isinstance(label, list) else is_labelled(label)

    def env_or_copy(self, node: Node) -> Node:
        """The new node of a weight that the walk may not have come to yet."""
        if node not in self.env:
            self.env[node] = self.builder.attr(node.target)
        return self.env[node]

    @cached_property
    def reduced_later(self) -> Set[Node]:
        """Of what is computed from the inputs, what has all its tokens, and loses some further down."""
        return ancestors_of(set(self.splices)) & user_dependent(self.old.graph)

    def behind_blocks(self, node: Node) -> bool:
        """Whether no block depends on it: recovering tokens here costs nothing that was gained."""
        return node not in self.structure.leading


def shallow_copy(gm: GraphModule) -> torch.nn.Module:
    """A module that holds the same weights, to which constants and reductions are added without touching `gm`."""
    root = torch.nn.Module()
    root._parameters, root._buffers, root._modules = dict(gm._parameters), dict(gm._buffers), dict(gm._modules)
    for name, value in gm.__dict__.items():
        if isinstance(value, torch.Tensor):
            setattr(root, name, value)
    return root
