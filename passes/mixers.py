"""Mixers: modules that mix tokens in the order of their sequence (short convolutions, linear attention, state spaces).

No rule can shorten what tracing unrolled for one length, chunk by chunk. Published code calls such a layer with the shorter
sequence, and so does this pass: it traces the call again at the new length, and puts that in place of what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node
from torch.fx.node import map_arg

from tokcompile.passes.calls import MARK, MixerCall, Shorter
from tokcompile.passes.graph import aten, get_attr, packet, shape
from tokcompile.passes.memory import ancestors_of, reachable_from
from tokcompile.passes.tokens import Axis, Label, Seq, has_batch, has_tokens, new, new_shape, old, plain

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter


def shorten(rw: Rewriter, mark: Node) -> None:
    """At a mark: where a mixer is called with reduced tokens, its results become those over the shorter sequence, in order.
    Where that is not possible, the walk goes on into what was traced."""
    values, number, done = mark.args
    labels: dict[Node, Label] = {v: rw.labels[v] for v in values if rw.is_labelled(v)}
    if done or number >= len(rw.mixers) or not labels:
        return
    call, tokens = rw.mixers[number], next(iter(labels.values()))
    axis = next(a for a in tokens if has_tokens(a))
    given = dict(zip(call.holes, values))
    want = {way: labels.get(v) or with_tokens(shape(v), tokens) for way, v in given.items()}
    region, again = Region.of(mark, set(labels)), call.over({way: new_shape(label) for way, label in want.items()})
    if region is None or again is None:
        return
    results = [region.results[i] for i in call.fresh]
    made = again.gm.graph.output_node().args[0]
    kinds = [plain(shape(o)) if shape(o) == shape(n) else with_tokens(shape(o), tokens) for o, n in zip(results, made)]
    changed = any(r in region.inside for i, r in enumerate(region.results) if i not in call.fresh)
    if changed or any(new_shape(label) != shape(n) for label, n in zip(kinds, made)):
        return
    sort, back = orders(rw, axis)

    def restricted(way: str) -> Node:
        v = given[way]
        have = labels.get(v) or plain(shape(v))
        return moved(rw, rw.gather.coerce(rw.env[v], have, want[way], mark), want[way], sort)

    env = {way: restricted(way) for way in again.sizes}
    for old_node, new_node, label in zip(results, written(rw, again, env, call), kinds):
        if old_node in region.inside:
            rw.set(old_node, moved(rw, new_node, label, back), label)
    rw.mixed |= dict.fromkeys(region.inside, axis)
    rw.again.append(call.path)


def written(rw: Rewriter, again: Shorter, tensors: Mapping[str, Node], call: MixerCall) -> list[Node]:
    """The graph of a call in the one under construction: its outputs."""
    env: dict[Node, Any] = {}
    inputs = again.gm.graph.find_nodes(op="placeholder")
    for node, name in zip(inputs, [*again.tensors, *again.weights]):
        if node.users:
            env[node] = tensors[name] if name in tensors else weight(rw, call, name)
    for node in again.gm.graph.nodes:
        if node.op == "get_attr":
            env[node] = rw.builder.constant(get_attr(again.gm, node.target), "mixer")
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = rw.builder.emit(node.target, *args, **kwargs)
    return [env[n] for n in again.gm.graph.output_node().args[0]]


def weight(rw: Rewriter, call: MixerCall, name: str) -> Node:
    """The node of a weight that the whole model has too, by its name or by what it is."""
    if not rw.weights:
        named = [*rw.old.named_parameters(remove_duplicate=False), *rw.old.named_buffers(remove_duplicate=False)]
        rw.weights |= {known: there for there, tensor in named for known in (there, id(tensor))}
    value = get_attr(call.module, name)
    there = rw.weights.get(f"{call.path}.{name}") or rw.weights.get(id(value))
    return rw.builder.attr(there) if there is not None else rw.builder.constant(value, "mixer")


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
