"""Rewrite: one walk over the graph; reductions are spliced in, rules carry their effect downstream, operands that meet a
reduced axis are gathered on demand."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from tokcompile.errors import MethodError, TokcompileError, UnsupportedGraph
from tokcompile.passes.ahead import look_ahead
from tokcompile.passes.crop import Hidden
from tokcompile.passes.find import Block, Structure
from tokcompile.passes.gather import Gatherer, once
from tokcompile.passes.graph import Builder, aten, device_of, packet, shape
from tokcompile.passes.groups import put_back, taken_out, tokens_of_groups
from tokcompile.passes.recover import Recovery, recover_operands, write_outputs
from tokcompile.passes.reduction import RESULTS, ReductionModule
from tokcompile.passes.renumber import Consecutive, numbers_anew
from tokcompile.passes.rules import RULES, Call, NeedsFull
from tokcompile.passes.taps import read_taps, taps_of
from tokcompile.passes.tokens import Batch, Label, Seq, Space, SplitsTokens, is_labelled, make_seq, normal, plain
from tokcompile.recipe import Recipe, Site


@dataclass
class Splice:
    """One reduction about to be spliced in: after node `at`, keeping `k` of the tokens there."""

    recipe: Recipe
    block: Block
    at: Node
    k: int
    site: Site
    prefix: int = 0  # where the tokens start, in the original sequence
    unit: int = 1
    tap_block: Block | None = None
    language: bool = False  # whether text stands around the tokens
    hidden: Hidden = ()  # of each sample, the original tokens that are cut off later

    @property
    def aligned(self) -> bool:
        """Whether the whole token axis can be counted in groups of `unit`, with what stands around the tokens."""
        return self.prefix % self.unit == 0 and shape(self.at)[self.block.token_axis] % self.unit == 0

    @property
    def batch(self) -> int:
        return shape(self.at)[self.block.batch_axis] if self.block.batch_axis is not None else 1


@dataclass
class Rewritten:
    """The new graph, and all that later passes and the report want to know about it."""

    gm: GraphModule
    spaces: list[Space]
    labels: dict[Node, Label]
    recoveries: list[Recovery]
    recovered: set[Node]
    output_labels: list[Label | None]
    extra_outputs: list[str] = field(default_factory=list)
    kept_of: dict[str, int] = field(default_factory=dict)  # of how many tokens the indices among the extra outputs are
    overhead_flops: int = 0  # of the reductions themselves
    checks: list[Consecutive] = field(default_factory=list)  # what is right only for some inputs


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
    ):
        self.old, self.structure, self.outputs, self.recover = gm, structure, outputs, recover
        self.size_weighted_mean, self.inputs = size_weighted_mean, inputs
        mode = detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes])
        assert mode is not None, "propagate_shapes comes before"
        self.builder = Builder(shallow_copy(gm), mode, device_of(gm.graph))
        self.gather = Gatherer(self.builder)
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
        self.spaces: list[Space] = []
        self.kept_of: dict[str, int] = {}
        self.overhead_flops = 0
        self.positioned: set[Space] = set()  # whose several positions, or new numbers, a rotary table was read at
        self.in_sequence: dict[Node, bool] = {}  # rotary tables: whether their positions go on by one
        self.checks: dict[Node, Consecutive] = {}
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
                for splice in self.splices.get(node, ()):
                    self.splice(splice)
        self.check_positions()
        graph = self.builder.graph
        GraphModule(self.builder.root, graph).graph.eliminate_dead_code()
        gm = GraphModule(self.builder.root, graph)  # anew, so that it holds only what is still read
        return Rewritten(
            gm,
            self.spaces,
            self.labels,
            self.recoveries,
            self.recovered,
            output_labels,
            extra,
            self.kept_of,
            self.overhead_flops,
            list(self.checks.values()),
        )

    # -- one node --------------------------------------------------------------------------------------------------

    def step(self, node: Node) -> None:
        if node in self.env:
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
            result = apply(Call(self, node))
        except NeedsFull as why:
            recover_operands(self, node, str(why), known=apply is not None)
            return
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

    def after_last(self, node: Node) -> bool:
        """Whether no block follows: recovering tokens here costs nothing that was gained."""
        return self.structure.order[node] > self.structure.last

    # -- splicing --------------------------------------------------------------------------------------------------

    def splice(self, s: Splice) -> None:
        x, label = self.env[s.at], self.labels.get(s.at)
        self.before.setdefault(s.at, (x, label))
        parent, before, after = self.body(s, label)
        name = f"reduction_{len(self.spaces)}_{s.recipe.name}"
        rows = s.unit if s.aligned else 1
        start = make_seq(before).new * rows
        tap_start = make_seq(self.body(s, self.before[s.at][1])[1]).new * rows
        site = replace(s.site, start=tap_start // s.unit if s.aligned else 0, text=self.text_ranges(s))
        begins = (start, tap_start) if s.aligned else (0, 0)
        module = ReductionModule(s.recipe, site, s.unit, taps_of(self, s), *begins)
        self.builder.root.add_module(name, module)
        above = parent.groups if parent and not s.aligned else parent
        size = above.size if above else None
        standard = self.standard(x, s.block)
        with look_ahead(self, s) if s.recipe.ahead else nullcontext(), FlopCounterMode(display=False) as counter:
            taps = read_taps(self, s)
        self.overhead_flops += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            if s.aligned:
                node = self.run_method(s, name, standard, size, taps)
            else:
                stop = start + s.site.n * s.unit
                body = self.builder.emit(aten.slice.Tensor, standard, 1, start, stop)
                taps = taken_out(self, module.names, taps, tap_start, s.site.n * s.unit)
                node = self.run_method(s, name, body, size, taps)
        self.overhead_flops += counter.get_total_flops()
        results = node.meta["val"]
        new = self.builder.emit(operator.getitem, node, 0)
        index = self.builder.emit(operator.getitem, node, 1)
        space = Space(f"s{len(self.spaces)}", s.site.n, s.k, above, index)
        space.size = self.builder.emit(operator.getitem, node, 2) if results[2] is not None else None
        space.assign = once(lambda: self.assignment_of(node, module, space.n))
        space.proportional = s.recipe.proportional and bool(s.site.options.get("proportional", True))
        space.ordered = bool(module.ordered)
        if s.hidden:
            space.hidden = torch.tensor([[i in one for i in range(space.root_n)] for one in map(set, s.hidden)])
        space.renumber = numbers_anew(self, s)
        if len(results) > len(RESULTS):
            space.positions = self.builder.emit(operator.getitem, node, len(RESULTS))
            space.bands = tuple(s.site.options.get("sections") or ())
        self.spaces.append(space)
        left = space if s.aligned else tokens_of_groups(self, space, s.unit, parent)
        if not s.aligned:
            new = put_back(self, standard, new, start, stop)
        self.env[s.at] = self.native(new, s.block)
        self.labels[s.at] = self.label_after(s, make_seq([*before, left, *after]))
        self.full.pop(s.at, None)

    def check_positions(self) -> None:
        """Raises: UnsupportedGraph where no rotary table was found for tokens with several positions, or with new ones."""
        lost = next((s for s in self.spaces if s.positions is not None and s not in self.positioned), None)
        texts = [s for many in self.splices.values() for s in many if s.language]
        if lost is not None and texts:
            raise UnsupportedGraph(
                f"method {texts[0].recipe.name!r} gives each token several positions, and no rotary table is multiplied to "
                "the tokens after it",
                texts[0].at,
                "positions=1 gives each token one position",
            )
        asked = [s for many in self.splices.values() for s in many if s.site.options.get("renumber")]
        if asked and not any(space.renumber and space in self.positioned for space in self.spaces):
            raise UnsupportedGraph(
                f"{asked[0].recipe.name} was asked to number the tokens that it leaves anew, and no rotary table over "
                "consecutive positions is multiplied to them afterwards",
                asked[0].at,
                "leave renumber out: tokens then keep their positions",
            )

    def run_method(self, s: Splice, name: str, x: Node, size: Node | None, taps: list[Node]) -> Node:
        """Adds the call of a reduction. Raises: MethodError that names the method where its plan fails on fake tensors."""
        try:
            return self.builder.emit(name, x, size, *taps)
        except TokcompileError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise MethodError(
                f"the plan of method {s.recipe.name!r} fails when {s.site.n} tokens are to become {s.k} "
                f"(block {s.block.index}): {type(error).__name__}: {first}; plans must not look at "
                "values of tensors, and every shape must follow from the site"
            ) from error

    def assignment_of(self, node: Node, module: ReductionModule, n: int) -> Node:
        """The fourth result of a reduction, which only dense outputs need: (B, n)."""
        x, index = node.args[0].meta["val"], node.meta["val"][1]
        module.needs_assign = True
        with self.builder.mode:
            assign = torch.empty(index.shape[0], n, dtype=torch.int64, device=index.device)
        node.meta["val"] = (*node.meta["val"][:3], assign, *node.meta["val"][len(RESULTS) :])
        if not module.recipe.track_size:  # dropped tokens are compared with the kept ones
            self.overhead_flops += 2 * index.shape[0] * n * index.shape[1] * x.shape[-1]
        return self.builder.emit(operator.getitem, node, 3)

    def body(self, s: Splice, label: Label | None) -> tuple[Space | None, list[Any], list[Any]]:
        """(the space to be reduced further or None, the parts before it, the parts after it), in groups of `unit` where these
        can be counted through the whole axis."""
        unit, n = (s.unit, s.site.n) if s.aligned else (1, s.site.n * s.unit)
        axis = label[s.block.token_axis] if label is not None and is_labelled(label) else ()
        seq = next((a for a in axis if isinstance(a, Seq)), None)
        parts: list[Any] = list(seq.parts) if seq else [shape(s.at)[s.block.token_axis] // unit]
        start, at = s.prefix // unit, 0
        for i, part in enumerate(parts):
            width = part if isinstance(part, int) else part.root_n
            if isinstance(part, Space) and at == start:
                if part.k != n:
                    raise UnsupportedGraph(
                        f"the plan expects {n} tokens here, but this stream still has {part.k}: it does not come from "
                        "the block that was reduced before",
                        s.at,
                        "reduce within one stack of blocks: where=[...]",
                    )
                return part, parts[:i], parts[i + 1 :]
            fits = isinstance(part, int) and at <= start and start + n <= at + width
            if fits and (not s.aligned or start + n + s.site.suffix == shape(s.at)[s.block.token_axis] // unit):
                rest = at + width - start - n
                return None, [*parts[:i], *[start - at] * (start > at)], [*[rest] * (rest > 0), *parts[i + 1 :]]
            at += width
        raise UnsupportedGraph(f"tokens {s.prefix}.. are not one run of the token axis {parts} here", s.at)

    def text_ranges(self, s: Splice, original: bool = False) -> tuple[tuple[int, int], ...]:
        """The (start, stop) of text among the tokens that the taps are read over, or among the original ones; none in a
        vision tower."""
        if not s.language or s.unit > 1:
            return ()
        label = self.before[s.at][1]
        axis = label[s.block.token_axis] if label is not None and is_labelled(label) else ()
        seq = next((a for a in axis if isinstance(a, Seq)), Seq((shape(s.at)[s.block.token_axis],)))
        visual = sorted((t.prefix, t.prefix + t.site.n) for t in self.splices[s.at])
        ranges, old, new = [], 0, 0
        for part in seq.parts:
            if isinstance(part, int):
                edges = [old, *(min(max(e, old), old + part) for span in visual for e in span), old + part]
                shift = 0 if original else new - old
                ranges += [(a + shift, b + shift) for a, b in zip(edges[::2], edges[1::2]) if b > a]
            old, new = (old + part, new + part) if isinstance(part, int) else (old + part.root_n, new + part.k)
        return tuple(ranges)

    def label_after(self, s: Splice, seq: Seq) -> Label:
        label = list(self.labels.get(s.at) or plain(shape(s.at)))
        label[s.block.token_axis] = normal((seq, s.unit if s.aligned else 1))
        if s.block.batch_axis is not None and s.batch > 1:
            label[s.block.batch_axis] = (Batch(s.batch),)
        return tuple(label)

    def standard(self, x: Node, block: Block) -> Node:
        """The residual stream as (B, L, D)."""
        if block.batch_axis is None:
            return self.builder.emit(aten.unsqueeze.default, x, 0)
        return x if block.token_axis == 1 else self.builder.emit(aten.transpose.int, x, 0, 1)

    def native(self, x: Node, block: Block) -> Node:
        """(B, L, D) back as the model has it."""
        if block.batch_axis is None:
            return self.builder.emit(aten.squeeze.dims, x, [0])
        return x if block.token_axis == 1 else self.builder.emit(aten.transpose.int, x, 0, 1)


def shallow_copy(gm: GraphModule) -> torch.nn.Module:
    """A module that holds the same weights, to which constants and reductions are added without touching `gm`."""
    root = torch.nn.Module()
    root._parameters, root._buffers, root._modules = dict(gm._parameters), dict(gm._buffers), dict(gm._modules)
    for name, value in gm.__dict__.items():
        if isinstance(value, torch.Tensor):
            setattr(root, name, value)
    return root
