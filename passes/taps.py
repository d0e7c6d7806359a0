"""Taps: the tensors a method reads, taken from the graph beside the fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node
from torch.fx.node import map_arg

from tokcompile.passes import attention_maps
from tokcompile.passes.attention_maps import some_rows
from tokcompile.passes.graph import aten, packet, shape
from tokcompile.passes.heads import heads
from tokcompile.passes.memory import ancestors_of, reachable_from
from tokcompile.passes.seen import masks_of, text_seen, without_hidden_text
from tokcompile.passes.splice import Splice, body, standard, text_ranges
from tokcompile.passes.tokens import Space, extent, is_labelled, seq_on

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter


def read_taps(rw: Rewriter, s: Splice) -> list[Node]:
    """One node per tap of the splice, each over the whole sequence: (B, H, L, d), (B, H, L), (B, L) or (B, L, D)."""
    return [READERS[name](rw, s) for name in taps_of(rw, s)]


def taps_of(rw: Rewriter, s: Splice) -> tuple[str, ...]:
    """The taps that this splice can have: none before any attention, nothing of the text where there is none."""
    if s.recipe.opening and s.tap_block is None:
        return ()
    text = bool(text_ranges(rw, s))
    missing = () if text else ("embeds", "text_embeds", "text_seen")
    if "text_seen" in s.recipe.taps and not (text and masks_of(rw, s)):
        missing = (*missing, "text_seen")
    return tuple(name for name in s.recipe.taps_read() if name not in missing)


def embeds(rw: Rewriter, s: Splice) -> Node:
    """(B, n0, D): the reducible tokens as they came into the first block, all that came into it."""
    x, parts = first_input(rw, s)
    parent = body(s, rw.before[s.at][1])[0]
    whole = parent.root_n if parent is not None else s.site.n
    count = next((p.k for p, old, _ in parts if old == s.prefix and isinstance(p, Space)), whole)
    start = place_in(parts, s.prefix)
    return rw.builder.emit(aten.slice.Tensor, x, 1, start, start + count)


def text_embeds(rw: Rewriter, s: Splice) -> Node:
    """(B, T, D): all text tokens as they came into the first block, in their order."""
    x, parts = first_input(rw, s)
    ranges = [(place_in(parts, start), stop - start) for start, stop in text_ranges(rw, s, original=True)]
    return some_rows(rw, x, 1, tuple((at, at + count) for at, count in ranges))


Parts = list[tuple[int | Space, int, int]]  # those of a token axis, and where each begins: in the original one, and in this


def first_input(rw: Rewriter, s: Splice) -> tuple[Node, Parts]:
    """(B, L, D): what came into the first block over these tokens, fewer where they were reduced before, as in a tower."""
    first = next(b for b in rw.structure.blocks if b.stage is s.block.stage)
    value, label = rw.before.get(first.entry) or (rw.env[first.entry], rw.labels.get(first.entry))
    seq = seq_on(label[first.token_axis]) if label is not None and is_labelled(label) else None
    parts, old, new = [], 0, 0
    for part in seq.parts if seq else (shape(first.entry)[first.token_axis],):
        parts.append((part, old, new))
        old, new = (at + by for at, by in zip((old, new), extent(part)))
    return standard(rw, value, first), parts


def place_in(parts: Parts, original: int) -> int:
    """Where a token of the text stands, or the first one of a space that begins there."""
    _, old, new = next(p for p in reversed(parts) if p[1] <= original)
    return new + original - old


# what a norm over the last axis is written with, where it is not one op
NORM = {"aten.layer_norm", "aten.rms_norm", "aten.to", "aten._to_copy", "aten.pow", "aten.square", "aten.mul", "aten.add",
        "aten.sub", "aten.div", "aten.rsqrt", "aten.sqrt", "aten.mean", "aten.var"}  # fmt: skip


def normed(rw: Rewriter, s: Splice) -> Node:
    """(B, L, D): the residual stream after the model's final norm; as it is where no such norm is found."""
    x = standard(rw, rw.before[s.at][0], s.block)
    last = [b for b in rw.structure.blocks if b.stage is s.block.stage][-1]
    end = last.end or last.mid
    new: dict[Node, Node] = {end: x}
    for node in final_norm(end, rw.structure.order):
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: new[n] if n in new else rw.env_or_copy(n))
        new[node] = x = rw.builder.emit(node.target, *args, **kwargs)
    return x


def final_norm(end: Node, order: dict[Node, int]) -> list[Node]:
    """The nodes of the norm that reads the last block's result, in order; its last one has a weight per channel."""
    inside, found = {end}, end
    for node in sorted(reachable_from({end}, lambda n: packet(n) in NORM), key=order.__getitem__):
        weights = [n for n in node.all_input_nodes if n not in inside]
        if packet(node) not in NORM or any(n.op != "get_attr" for n in weights) or not keeps_tokens(node, end):
            continue
        inside.add(node)
        if weights and shape(node) == shape(end) and all(shape(n)[-1:] == shape(end)[-1:] for n in weights):
            found = node
    return sorted(ancestors_of({found}, lambda n: n is not end and n in inside), key=order.__getitem__)


def keeps_tokens(node: Node, end: Node) -> bool:
    """Whether an op leaves every token its own: same leading sizes, the last one whole or one."""
    size, full = shape(node), shape(end)
    return len(size) == len(full) and size[:-1] == full[:-1] and size[-1] in (1, full[-1])


READERS: dict[str, Any] = {
    "q": lambda rw, s: heads(rw, s, "q"),
    "k": lambda rw, s: heads(rw, s, "k"),
    "v": lambda rw, s: heads(rw, s, "v"),
    "rotated_k": lambda rw, s: without_hidden_text(rw, s, heads(rw, s, "k", rotated=True)),
    "cls_attention": attention_maps.cls_attention,
    "received_attention": attention_maps.received_attention,
    "last_attention": attention_maps.last_attention,
    "earlier_attention": attention_maps.earlier_attention,
    "earlier_cls_attention": attention_maps.earlier_cls_attention,
    "text_attention": attention_maps.text_attention,
    "scores": attention_maps.scores,
    "embeds": embeds,
    "text_embeds": text_embeds,
    "text_seen": text_seen,
    "normed": normed,
}
