"""Mixers: modules that mix tokens in the order of their sequence (short convolutions, linear attention, state spaces).

No rule can shorten what tracing unrolled for one length, chunk by chunk. Published code calls such a layer with the shorter
sequence, and so does this pass: it knows from the trace how the module was called, traces it again at the new length, and
puts that in place of what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tokcompile.errors import TokcompileError
from tokcompile.passes.graph import aten, copy_graph, get_attr, packet, shape
from tokcompile.passes.memory import ancestors_of, reachable_from
from tokcompile.passes.tokens import Axis, Label, Seq, has_batch, has_tokens, is_labelled, new, new_shape, old, plain

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter

MARK = "tokcompile.called"
MIXERS = "mixers"  # the key in the meta of the program that was traced from a model
_OPS = torch.library.Library("tokcompile", "FRAGMENT")
_OPS.define("called(Tensor[] values, int call, bool done) -> ()")
_OPS.impl("called", lambda values, call, done: None, "CompositeExplicitAutograd")
torch.fx.node.has_side_effect(torch.ops.tokcompile.called.default)  # so that no pass takes it for dead code


@dataclass(frozen=True)
class Hole:
    """Where a tensor stands among the arguments of a call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def filled(self, sizes: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(sizes), dtype=self.dtype, device=self.device)


@dataclass
class Mixer:
    """One call of such a module: its arguments, with holes for tensors, and where it left tensors behind, in its result
    or in an argument such as a cache."""

    path: str
    module: nn.Module
    arguments: Any
    holes: list[Hole]
    left: list[str] = field(default_factory=list)
    made: dict[tuple[tuple[int, ...], ...], Shorter | None] = field(default_factory=dict)

    def with_weights_of(self, gm: GraphModule) -> Mixer:
        """The same call of a module that has the weights of a graph."""
        module = copy.deepcopy(self.module)
        for name, _ in self.module.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, get_attr(gm, f"{self.path}.{name}" if self.path else name))
        return replace(self, module=module, made={})

    def over(self, sizes: Sequence[tuple[int, ...]]) -> Shorter | None:
        """The call traced again on tensors of these sizes; None where the module does not take them, or reads values."""
        key = tuple(sizes)
        if key not in self.made:
            from tokcompile.passes.canonicalise import canonicalise
            from tokcompile.passes.trace import trace

            try:
                inputs = [hole.filled(size) for hole, size in zip(self.holes, sizes)]
                traced = trace(Again(self).eval(), tuple(inputs))
                self.made[key] = None if traced.checks else Shorter(canonicalise(traced.gm, traced.inputs))
            except TokcompileError:
                self.made[key] = None
        return self.made[key]


class Again(nn.Module):
    """The call of a mixer as a function of the tensors among its arguments."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.module, self.mixer = mixer.module, mixer
        self.train(mixer.module.training)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        memo = {id(hole): tensor for hole, tensor in zip(self.mixer.holes, tensors)}
        args, kwargs = copy.deepcopy(self.mixer.arguments, memo)
        out = self.module(*args, **kwargs)
        found = tensors_in((out, args, kwargs))
        if list(found) != self.mixer.left:
            raise RuntimeError("at another length it gives other tensors")
        return list(found.values())


def is_mixer(module: nn.Module) -> bool:
    """Whether a module convolves along its sequence, channel by channel, so that each token sees those before it."""
    return any(
        isinstance(c, nn.Conv1d)
        and c.groups == c.in_channels == c.out_channels
        and c.kernel_size[0] > 1
        and c.stride == (1,)
        and not isinstance(c.padding, str)
        and c.padding[0] >= c.dilation[0] * (c.kernel_size[0] - 1)
        for c in module.children()
    )


def tensors_in(value: Any) -> dict[str, Tensor]:
    """Every tensor that a value holds, in lists, dictionaries and objects such as caches, by the way that leads there."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def look(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, (list, tuple)):
            for i, one in enumerate(value):
                look(one, f"{path}.{i}")
        elif isinstance(value, dict):
            for name, one in value.items():
                look(one, f"{path}.{name}")
        elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
            if id(value) not in seen:
                seen.add(id(value))
                look(vars(value), path)

    look(value, "")
    return found


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Mixer]]:
    """While tracing: marks in the graph where each mixer of a model is called and where it is done."""
    calls: list[Mixer] = []
    open_calls: list[int] = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = tensors_in((args, kwargs))
            holes = [Hole(tuple(t.shape), t.dtype, t.device) for t in given.values()]
            memo = {id(t): hole for t, hole in zip(given.values(), holes)}
            calls.append(Mixer(path, module, copy.deepcopy((args, kwargs), memo), holes))
            open_calls.append(len(calls) - 1)
            torch.ops.tokcompile.called(list(given.values()), open_calls[-1], False)

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call = open_calls.pop()
        found = tensors_in((out, args, kwargs))
        calls[call].left = list(found)
        torch.ops.tokcompile.called(list(found.values()), call, True)

    handles = []
    for path, module in model.named_modules() if not isinstance(model, Again) else ():
        if is_mixer(module):
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def erase_marks(graph: Graph) -> None:
    """Also in a program that is to be saved, which does not hold the model itself."""
    for node in marks(graph):
        graph.erase_node(node)


def unmarked(gm: GraphModule) -> GraphModule:
    """The graph to be run or written, without marks; `gm` is kept."""
    if marks(gm.graph):
        gm = copy_graph(gm)
        erase_marks(gm.graph)
        gm.recompile()
    return gm


def marks(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if packet(n) == MARK]


def shorten(rw: Rewriter, mark: Node) -> None:
    """At a mark: where a mixer is called with reduced tokens, its results become those over the shorter sequence, in order.
    Where that is not possible, the walk goes on into what was traced."""
    values, call, done = mark.args
    have = [rw.labels.get(v) for v in values]
    tokens = next((label for label in have if is_labelled(label)), None)
    if done or call >= len(rw.mixers) or tokens is None:
        return
    mixer = rw.mixers[call]
    region = Region.of(mark, {v for v, label in zip(values, have) if is_labelled(label)})
    axis = next(a for a in tokens if has_tokens(a))
    if region is None:
        return
    want: list[Label] = [
        label if label is not None and is_labelled(label) else with_tokens(shape(v), tokens) for v, label in zip(values, have)
    ]
    again = mixer.over([new_shape(label) for label in want])
    if again is None or len(again.outputs) != len(region.results):
        return
    labels = [
        plain(shape(o)) if shape(o) == shape(n) else with_tokens(shape(o), tokens)
        for o, n in zip(region.results, again.outputs)
    ]
    if any(new_shape(label) != shape(n) for label, n in zip(labels, again.outputs)):
        return
    sort, back = orders(rw, axis)
    given = [
        moved(rw, rw.gather.coerce(rw.env[v], own or plain(shape(v)), label, mark), label, sort) if used else rw.env[v]
        for v, own, label, used in zip(values, have, want, again.reads)
    ]
    for old_node, new_node, label in zip(region.results, again.write(rw, given), labels):
        if old_node in region.inside:
            rw.set(old_node, moved(rw, new_node, label, back), label)
    rw.mixed |= dict.fromkeys(region.inside, axis)
    rw.again.append(mixer.path)


def orders(rw: Rewriter, axis: Axis) -> tuple[Node, Node] | tuple[None, None]:
    """(B, new) indices that put the tokens of an axis in the order of their sequence, and back; None where they are in it."""
    seq = next(atom for atom in axis if isinstance(atom, Seq))
    if all(s.in_order for s in seq.spaces):
        return None, None
    if seq not in rw.orders:
        sort = rw.builder.unpack(rw.builder.emit(aten.sort.default, rw.gather.index(seq.old, seq), 1))[1]
        rw.orders[seq] = sort, rw.builder.unpack(rw.builder.emit(aten.sort.default, sort, 1))[1]
    return rw.orders[seq]


def moved(rw: Rewriter, x: Node, label: Label, order: Node | None) -> Node:
    """x with its tokens in another order."""
    atoms = [atom for axis in label for atom in axis]
    at = next((i for i, atom in enumerate(atoms) if isinstance(atom, Seq)), None)
    if order is None or at is None:
        return x
    flat = rw.gather.reshape(x, [new((atom,)) for atom in atoms])
    picked, _ = rw.gather.pick(flat, atoms, at, order, new((atoms[at],)), None)
    return rw.gather.reshape(picked, list(shape(x)))


def with_tokens(sizes: Sequence[int], tokens: Label) -> Label:
    """The label of a tensor beside another: its first axis of that length holds the tokens, and one of the batch's size in
    front of it the batch."""
    axis = next(a for a in tokens if has_tokens(a))
    batch = next((a for a in tokens if has_batch(a)), None)
    label = list(plain(sizes))
    if old(axis) not in sizes:
        return tuple(label)
    at = list(sizes).index(old(axis))
    label[at] = axis
    for d in range(at):
        if batch is not None and sizes[d] == old(batch):
            label[d] = batch
            break
    return tuple(label)


@dataclass
class Region:
    """What a call of a mixer wrote into the graph: inside, the nodes that depend on its tokens; results, those that its end
    mark names, in order."""

    inside: set[Node]
    results: list[Node]

    @classmethod
    def of(cls, mark: Node, tokens: set[Node]) -> Region | None:
        """None where the end is not to be seen. What is read from outside too, such as a view that two modules share, stays
        as it was traced."""
        node, between = mark.next, set()
        while node.op != "root" and not (packet(node) == MARK and node.args[1:] == (mark.args[1], True)):
            between.add(node)
            node = node.next
        if node.op == "root":
            return None
        results = list(node.args[0])
        inside = {n for n in between & reachable_from(tokens) if packet(n) != MARK}
        shared = {n for n in inside - set(results) if any(u not in inside and packet(u) != MARK for u in n.users)}
        return cls(inside - ancestors_of(shared), results)


@dataclass
class Shorter:
    """A mixer's graph over a shorter sequence; outputs: its tensors, in the order of the end mark."""

    gm: GraphModule

    @property
    def inputs(self) -> list[Node]:
        return list(self.gm.graph.find_nodes(op="placeholder"))

    @property
    def reads(self) -> list[bool]:
        return [bool(n.users) for n in self.inputs]

    @property
    def outputs(self) -> list[Node]:
        return list(self.gm.graph.output_node().args[0])

    def write(self, rw: Rewriter, given: Sequence[Node]) -> list[Node]:
        """The same nodes in the graph under construction."""
        env: dict[Node, Any] = dict(zip(self.inputs, given))
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                env[node] = weight(rw, get_attr(self.gm, node.target))
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = rw.builder.emit(node.target, *args, **kwargs)
        return [env[n] for n in self.outputs]


def weight(rw: Rewriter, value: Tensor) -> Node:
    """The node of a weight that the whole model has too, or of a constant."""
    if not rw.weights:
        named = [*rw.old.named_parameters(remove_duplicate=False), *rw.old.named_buffers(remove_duplicate=False)]
        rw.weights |= {id(tensor): name for name, tensor in named}
    name = rw.weights.get(id(value))
    if name is None:
        return rw.builder.constant(value, "mixer")
    return rw.builder.attr(name)
