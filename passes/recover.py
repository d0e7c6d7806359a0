"""Recover: where an op or an output wants the full token axis, every original token gets the row that stands for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from tokcompile.errors import UnsupportedGraph, module_path
from tokcompile.passes.batch import samples_in_line
from tokcompile.passes.flatten import TOKENWISE
from tokcompile.passes.graph import RESHAPES, aten, packet
from tokcompile.passes.rules.core import Call
from tokcompile.passes.rules.sizes import laid_out
from tokcompile.passes.tokens import Label, Run, Seq, Space, describe, extent, is_labelled, make_seq, spaces_on

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter

ROW_BY_ROW = TOKENWISE | RESHAPES | {"aten.mean"}  # the last where it leaves the tokens: over channels


@dataclass(frozen=True)
class Recovery:
    """One place where tokens were given back: `inside` means that blocks follow, so that part of the gain is lost."""

    node: str
    op: str
    module: str
    reason: str
    inside: bool


def recover_operands(rw: Rewriter, node: Node, reason: str, known: bool) -> None:
    """Copies `node` with all its operands at full length. Raises: UnsupportedGraph where the policy forbids it."""
    inside = not rw.behind_blocks(node)
    rw.met.append(node)
    if rw.recover == "never" or (inside and rw.recover != "anywhere"):
        labels = ", ".join(
            f"{n.name}: {describe(rw.labels[n])}"
            for n in node.all_input_nodes
            if n in rw.labels and not isinstance(rw.labels[n], list)
        )
        way_out = (
            "reduce only after it (where=[later blocks]), or pass recover='anywhere' to gather the tokens back here and lose "
            "part of the gain"
        )
        if packet(node) == "aten.conv1d" and not rw.mixers:
            way_out = (
                f"pass the model itself and not a program: layers that mix along the sequence are traced again; or {way_out}"
            )
        if not known:
            way_out = f"tell the pass what it does: tokcompile.register_rule({packet(node)!r}, rule); or {way_out}"
        raise UnsupportedGraph(f"an op over reduced tokens cannot be rewritten: {reason} ({labels})", node, way_out)
    rw.recoveries.append(Recovery(node.name, packet(node), module_path(node), reason, inside))
    rw.recovered.add(node)
    rw.env[node] = rw.builder.copy(node, lambda n: full_value(rw, n))


def full_value(rw: Rewriter, node: Node) -> Any:
    """The value of an old node with every original token, gathered back at most once."""
    if node not in rw.labels:
        return rw.env[node]
    if node not in rw.full:
        rw.full[node] = full_of(rw, rw.env[node], rw.labels[node], node)
    return rw.full[node]


def full_of(rw: Rewriter, value: Any, label: Any, node: Node) -> Any:
    if isinstance(value, list):
        return [full_of(rw, v, one, node) for v, one in zip(value, label)]
    return given_back(rw, value, label, node) if is_labelled(label) else value


def given_back(rw: Rewriter, value: Node, label: Label, node: Node) -> Node:
    """Every original token gets the row of the one that stands for it, and of what a softmax over tokens has made sum to one
    its share: the same for all of a group."""
    if any(not space.k for axis in label for space in spaces_on(axis)):
        return as_dropped(rw, node)
    full = rw.gather.recover(value, label, node)
    axes = {axis for softmax, axis in rw.weighing.softmaxes.axes.get(node, {}).items() if rw.weighing.over_tokens(softmax)}
    if not axes:
        return full
    like, call = tuple(samples_in_line(rw.gather, one) for one in label), Call(rw, node)
    for axis, held in ((d, [a for a in like[d] if isinstance(a, Seq)]) for d in sorted(axes)):
        for tokens in held:
            group = call.op(aten.to.dtype, rw.gather.members(tokens), full.meta["val"].dtype)
            full = call.op(aten.div.Tensor, full, laid_out(call, group, like, axis))
    return full


def as_dropped(rw: Rewriter, node: Node) -> Node:
    """Where all tokens of a span went, none is left to stand for them: what is computed token by token from the stream is
    computed from it with them in it, as they were when they went. Raises: UnsupportedGraph for all else."""
    if node not in rw.full:
        label, streams = rw.labels[node], {n for b in rw.structure.blocks for n in (b.entry, b.mid, b.end)}
        tokens = [a for axis in label for a in axis if isinstance(a, Seq)]
        if node in streams and all(s.k or s.gone for s in tokens[0].spaces):
            rw.full[node] = with_gone(rw, node, tokens[0])
        elif packet(node) in ROW_BY_ROW and len(tokens) == 1:
            rw.recovered.add(node)
            rw.full[node] = rw.builder.copy(node, lambda n: as_dropped(rw, n) if rw.is_labelled(n) else rw.env[n])
        else:
            raise UnsupportedGraph(
                f"all tokens of a span were dropped, and none is left to stand for them ({describe(label)})",
                node,
                "pass outputs='reduced'; or drop them behind it",
            )
    return rw.full[node]


def with_gone(rw: Rewriter, node: Node, seq: Seq) -> Node:
    """The stream with all of its tokens, those of spans that went altogether as they were then."""
    label, value, emit = rw.labels[node], rw.env[node], rw.builder.emit
    dim = next(i for i, axis in enumerate(label) if seq in axis)
    pieces, parts, at = [], [], 0
    for part in seq.parts:
        count = extent(part)[1]
        if count:
            pieces.append(emit(aten.slice.Tensor, value, dim, at, at + count))
        elif isinstance(part, Space):
            pieces.append(emit(aten.to.dtype, part.gone, value.meta["val"].dtype))
        parts.append(part if count or not isinstance(part, Space) else part.parent or part.n)
        at += count
    new = tuple((make_seq(parts),) if i == dim else axis for i, axis in enumerate(label))
    return rw.gather.recover(emit(aten.cat.default, pieces, dim), new, node)


def write_outputs(rw: Rewriter, node: Node) -> tuple[list[Label | None], list[str]]:
    """Writes the output node: outputs="keep" recovers what is dense; "reduced" leaves it short and adds indices and sizes."""
    values, labels = [], []
    seqs: list[Seq] = []
    for old in node.args[0]:
        value, label = rw.before.get(old, (rw.env.get(old), rw.labels.get(old))) if isinstance(old, Node) else (old, None)
        if rw.outputs == "keep" and is_labelled(label):
            if rw.recover == "never":
                raise UnsupportedGraph(
                    f"an output holds reduced tokens ({describe(label)}), and recover='never' forbids giving them back",
                    old,
                    "pass outputs='reduced', or recover='end'",
                )
            value, label = given_back(rw, value, label, old), None
        for axis in label or ():
            seqs += [a for a in axis if isinstance(a, Seq) and a not in seqs]
        values.append(value)
        labels.append(label)
    names = []
    if rw.outputs == "reduced":
        parents = {s.parent for s in rw.spaces}
        spaces = list(dict.fromkeys(s.groups or s for seq in seqs for s in seq.spaces)) or [
            s for s in rw.spaces if s not in parents
        ]
        for space in (s for s in spaces if s.k):  # of what is gone altogether there are no indices
            extra, own = kept_tokens(rw, space, seqs)
            values += extra
            names += own
    new = rw.builder.graph.output(values)
    new.meta = {}
    return labels, names


def kept_tokens(rw: Rewriter, space: Space, seqs: Sequence[Seq]) -> tuple[list[Node], list[str]]:
    """The extra outputs of a reduced program: which original tokens are left, and how many each one holds."""
    root: Any = space.lineage()[-1].n
    values, names = [rw.gather.within(root, space)], [f"{space.name}_index"]
    rw.kept_of[names[0]] = run_of(root, space, seqs)
    if space.size is not None:
        values.append(space.size)
        names.append(f"{space.name}_size")
    return values, names


def run_of(n: int, space: Space, seqs: Sequence[Seq]) -> Run:
    """The original tokens of a space among those of the first output that holds it."""
    for parts in (seq.parts for seq in seqs if space in seq.parts):
        at = parts.index(space)
        before, after = parts[at - 1] if at else 0, parts[-1] if at == len(parts) - 2 else 0
        return Run(before if isinstance(before, int) else 0, n, after if isinstance(after, int) else 0)
    return Run(0, n, 0)
