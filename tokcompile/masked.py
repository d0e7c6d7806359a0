"""The second oracle's other side: the ORIGINAL graph, in which nobody may attend to the dropped tokens."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tokcompile.passes.attentions import SDPA, SOFTMAX
from tokcompile.passes.graph import bind, packet, shape
from tokcompile.passes.rewrite import Rewritten
from tokcompile.passes.tokens import Axis, Batch, Label, Seq, Space, has_tokens, new_shape, old

# what is hidden is to them
FILLED = {
    "aten.amax": -inf, "aten.max": -inf, "aten.logsumexp": -inf, "aten.amin": inf, "aten.min": inf, "aten.all": True,
    "aten.any": False, "aten.prod": 1,
}  # fmt: skip
REDUCTIONS = {"aten.mean", "aten.sum", "aten.linalg_vector_norm", *FILLED}
EXPONENTIALS = {*SOFTMAX, "aten.log_softmax", "aten._log_softmax"}
PRODUCTS = {"aten.matmul", "aten.bmm", "aten.baddbmm"}


class MaskedRun(Interpreter):
    """Runs the original graph, full length, with the dropped tokens hidden wherever tokens are mixed.

    Which axis of which tensor holds tokens is read from the labels of the rewritten graph. outputs: the original
    outputs; clean: for each, whether it depends on the reduction and neither a recovery nor a mixer lies before it (else the
    two runs differ on purpose).
    """

    def __init__(self, gm: GraphModule, rewritten: Rewritten, kept: dict[Space, Tensor]):
        super().__init__(gm)
        self.extra_traceback = False
        self.labels, self.recovered, self.mixed = rewritten.labels, rewritten.recovered, rewritten.mixed
        self.averaged = rewritten.averaged
        self.kept = kept
        self.reduced: set[Node] = set()  # what depends on a reduction
        self.outputs: list[Any] = []
        self.dirty: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        if n in self.recovered or n in self.mixed or any(i in self.dirty for i in n.all_input_nodes):
            self.dirty.add(n)
        if n in self.labels or any(i in self.reduced for i in n.all_input_nodes):
            self.reduced.add(n)
        if n.op == "output":
            values = self.fetch_args_kwargs_from_env(n)[0][0]
            self.outputs = list(values)
            self.clean = [isinstance(a, Node) and a in self.reduced and a not in self.dirty for a in n.args[0]]
            return values
        if n.op == "call_function" and n not in self.recovered:
            special = self.special(n)
            if special is not None:
                return special
        return super().run_node(n)

    def special(self, n: Node) -> Any:
        name, args = packet(n), bind(n)
        value = {k: self.env[v] for k, v in args.items() if isinstance(v, Node)}
        if name == SDPA and self.tokens(args["key"], -2):
            return self.attention(n, args, value)
        if name in EXPONENTIALS | {"aten.topk"} and self.tokens(args["self"], args["dim"]):
            hidden = ~self.visible(args["self"], args["dim"])
            return self.call(n, args, value, self=value["self"].masked_fill(hidden, float("-inf")))
        if (
            name in REDUCTIONS
            and args.get("dim") is not None
            and any(self.tokens(args["self"], d) for d in as_list(args["dim"]))
        ):
            return self.reduction(n, name, args, value)
        if name in PRODUCTS:
            left = next(k for k, v in args.items() if (isinstance(v, Node) and k not in ("self",)) or name != "aten.baddbmm")
            left = "batch1" if name == "aten.baddbmm" else left
            if self.tokens(args[left], -1):
                return self.call(n, args, value, **{left: self.weighed(n, args[left], -1, value[left])})
        if name == "aten.einsum":
            return self.einsum(n, args)
        return None

    def einsum(self, n: Node, args: dict[str, Any]) -> Any:
        """With what is hidden as zeros in one operand of each sum over tokens."""
        inputs, _, output = args["equation"].partition("->")
        values, seen = [self.env[v] for v in args["tensors"]], set(output)
        for i, (term, operand) in enumerate(zip(inputs.split(","), args["tensors"])):
            for d, letter in enumerate(term):
                if letter not in seen and self.tokens(operand, d):
                    values[i] = self.weighed(n, operand, d, values[i])
                    seen.add(letter)
        return self.call(n, args, {}, tensors=values)

    def attention(self, n: Node, args: dict[str, Any], value: dict[str, Any]) -> Any:
        scores = (*shape(args["query"])[:-1], shape(args["key"])[-2])
        visible = self.visible(args["key"], -2).transpose(-1, -2)  # (..., 1 or d, keys)
        visible = visible[..., :1, :]
        if args["enable_gqa"] and visible.shape[-3] not in (1, scores[-3]):
            visible = visible.repeat_interleave(scores[-3] // visible.shape[-3], -3)
        mask = value.get("attn_mask")
        if args["is_causal"]:
            mask = torch.ones(scores[-2:], dtype=torch.bool).tril()
        if mask is None:
            mask = visible.expand(scores)
        elif mask.dtype is torch.bool:
            mask = mask & visible
        else:
            mask = mask.masked_fill(~visible, float("-inf"))
        return self.call(n, args, value, attn_mask=mask, is_causal=False)

    def reduction(self, n: Node, name: str, args: dict[str, Any], value: dict[str, Any]) -> Any:
        x = value["self"]
        for dim in (d for d in as_list(args["dim"]) if self.tokens(args["self"], d)):
            if name in FILLED:
                x = x.masked_fill(~self.visible(args["self"], dim), FILLED[name])
            else:
                x = self.weighed(n, args["self"], dim, x)
        return self.call(n, args, value, self=x)

    def call(self, n: Node, args: dict[str, Any], value: dict[str, Any], /, **changed: Any) -> Any:
        args = {**{k: value.get(k, v) for k, v in args.items()}, **changed}
        schema = n.target._schema.arguments
        return n.target(
            *(args[a.name] for a in schema if not a.kwarg_only),
            **{a.name: args[a.name] for a in schema if a.kwarg_only},
        )

    def tokens(self, node: Any, dim: int) -> bool:
        label = self.labels.get(node)
        return isinstance(label, tuple) and has_tokens(label[dim])

    def visible(self, node: Node, dim: int) -> Tensor:
        """A boolean mask, broadcastable to the OLD shape of `node`, of what is kept along axis `dim`."""
        label = self.labels[node]
        dim = dim % len(label)
        out = torch.ones([1] * len(label), dtype=torch.bool)
        batch_at = next((d for d, axis in enumerate(label) if any(isinstance(a, Batch) for a in axis)), None)
        keep = self.keep(next(a for a in label[dim] if isinstance(a, Seq)))  # (B, old tokens)
        sizes: list[int] = []
        for d, axis in enumerate(label):
            sizes += [1] * max(len(axis), 1) if d not in (dim, batch_at) else self.atom_sizes(axis, d == dim)
        if batch_at is None:
            keep = keep[:1]
        mask = (keep.T if batch_at is not None and batch_at > dim else keep).reshape(sizes)
        want = [int(s) if d in (dim, batch_at) else 1 for d, s in enumerate(shape(node))]
        full = [old((a,)) if d in (dim, batch_at) else 1 for d, axis in enumerate(label) for a in (axis or (1,))]
        return out & mask.expand(full).reshape(want)

    def weighed(self, n: Node, node: Node, dim: int, value: Tensor) -> Tensor:
        """The value of `node` for a sum along `dim`: zero at hidden tokens, where it may be no number, and scaled where `n`
        is a mean, so that it is one of the others."""
        visible = self.visible(node, dim)
        value = value.masked_fill(~visible, 0)
        if packet(n) == "aten.mean" or n in self.averaged:
            value = value * (visible.shape[dim] / visible.sum(dim, keepdim=True)).to(value.dtype)
        return value

    def atom_sizes(self, axis: Axis, is_tokens: bool) -> list[int]:
        return [a.size if isinstance(a, Batch) else a.old if is_tokens and isinstance(a, Seq) else 1 for a in (axis or (1,))]

    def keep(self, seq: Seq) -> Tensor:
        parts = []
        batch = rows_in(seq, self.kept)
        for part in seq.parts:
            if isinstance(part, int):
                parts.append(torch.ones(batch, part, dtype=torch.bool))
            else:
                parts.append(torch.zeros(batch, part.root_n, dtype=torch.bool).scatter(1, chosen(part, self.kept), True))
        return torch.cat(parts, 1)


def chosen(space: Space, kept: dict[Space, Tensor]) -> Tensor:
    """(B, k) what a space kept, of its own or from its sources."""
    return kept[space] if space.derive is None else space.derive(lambda source: chosen(source, kept))


def rows_in(seq: Seq, kept: dict[Space, Tensor]) -> int:
    return max((chosen(s, kept).shape[0] for s in seq.spaces), default=1)


def as_list(dim: Any) -> list[int]:
    return [dim] if isinstance(dim, int) else list(dim)


def kept_rows(value: Tensor, label: Label, kept: dict[Space, Tensor]) -> Tensor:
    """The rows of an original output that the reduced one still has."""
    atoms = [a for axis in label for a in axis]
    x = value.reshape([old((a,)) for a in atoms])
    where = next((i for i, a in enumerate(atoms) if isinstance(a, Batch)), None)
    for at, atom in enumerate(atoms):
        if isinstance(atom, Seq):
            index, start, batch = [], 0, rows_in(atom, kept)
            for part in atom.parts:
                if isinstance(part, int):
                    index.append(torch.arange(start, start + part).expand(batch, -1))
                    start += part
                else:
                    index.append(chosen(part, kept) + start)
                    start += part.root_n
            rows = torch.cat(index, 1)
            if where is None:
                x = x.index_select(at, rows[0])
            else:
                samples = [x.select(where, b).index_select(at - (where < at), rows[b]) for b in range(batch)]
                x = torch.stack(samples, where)
    return x.reshape(new_shape(label))
