"""Find: attention blocks, the residual stream, prefix and suffix tokens and the patch grid, read off the graph alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tokcompile.errors import module_path
from tokcompile.passes.graph import bind, get_attr, packet, shape, to_int, user_dependent
from tokcompile.passes.placeholders import SPANS, WRITES

SDPA = "aten.scaled_dot_product_attention"
SOFTMAX = {"aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.special_softmax"}
MATMUL = {"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum"}
ADD = {"aten.add", "aten.add_"}
# what may stand between a score matmul and its softmax, or between the softmax and the value matmul
BETWEEN = {
    "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.where", "aten.masked_fill", "aten.to", "aten._to_copy",
    "aten.view", "aten.reshape", "aten.permute", "aten.transpose", "aten.expand", "aten.contiguous", "aten.clone",
    "aten.linear", "aten.conv2d", "aten.type_as", "aten.dropout", "aten.clamp", "aten.float", "aten._unsafe_view",
    "aten.flatten", "aten.unsqueeze", "aten.squeeze", "aten.maximum", "aten.nan_to_num", "aten.tanh", "aten.expand_as",
    "aten.slice_scatter",
}  # fmt: skip
LAYOUT = {"aten.permute", "aten.transpose", "aten.contiguous", "aten.clone", "aten.t", "aten.movedim", "aten.swapaxes",
          "aten.swapdims", "aten.mT", "aten.numpy_T", "aten.adjoint"}  # fmt: skip
INDEX = {"aten.index", "aten.index_select", "aten.gather"}
VIEWS = {"aten.view", "aten.reshape", "aten.flatten", "aten._unsafe_view", "aten.unflatten"}


@dataclass
class Attention:
    """One attention: `node` is the fused op or the softmax; q, k, v as the graph has them."""

    node: Node
    q: Node
    k: Node
    v: Node
    fused: bool
    scale: float | None = None
    mask: Node | None = None
    causal: bool = False


@dataclass
class Stage:
    """A run of blocks over the same tokens: `length` in all, of which `n` between prefix and suffix are visual.

    text: whether it is the stream of a language model; spans: where image features were written into it, if anywhere.
    """

    length: int
    prefix: int
    suffix: int
    grid: tuple[int, ...] | None
    visual: bool
    text: bool = False
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def n(self) -> int:
        return self.length - self.prefix - self.suffix


@dataclass
class Block:
    """A residual block: x -> mid = x + attention -> end = mid + MLP."""

    index: int
    path: str
    attentions: list[Attention]
    entry: Node
    mid: Node
    end: Node | None
    token_axis: int
    batch_axis: int | None
    stage: Stage
    parallel: bool = False
    why_not: str | None = None  # set where tokens cannot be reduced here, with the reason

    @property
    def language(self) -> bool:
        """Whether this is a language model's block, in which text stands around the visual tokens."""
        return self.stage.text or any(a.causal for a in self.attentions)

    @property
    def out(self) -> Node:
        """Where the attention's result has been added: the place between attention and MLP, where there is one."""
        return (self.end or self.mid) if self.parallel else self.mid


@dataclass
class Structure:
    """All that was found, and what was not recognised and why."""

    blocks: list[Block] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    unrecognised: list[str] = field(default_factory=list)
    order: dict[Node, int] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The position in the graph after which no block follows."""
        nodes = [n for b in self.blocks for n in (b.mid, b.end) if n is not None]
        return max((self.order[n] for n in nodes), default=-1)

    def sites(self) -> list[Block]:
        return [b for b in self.blocks if b.why_not is None]


def find(gm: GraphModule) -> Structure:
    """Reads the structure of a canonical graph with fake values."""
    graph = gm.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    dependent = user_dependent(graph)
    structure = Structure(order=order)
    by_mid: dict[Node, Block] = {}
    for attention in attentions(graph, dependent):
        attention.causal = attention.causal or hides_the_future(gm, attention)
        found = residual(attention, order, dependent)
        name = f"{attention.node.name} ({module_path(attention.node) or 'no module'})"
        if isinstance(found, str):
            structure.unrecognised.append(f"{name}: {found}")
        elif found[1] in by_mid:
            by_mid[found[1]].attentions.append(attention)
        else:
            block = make_block(attention, *found, structure, dependent)
            by_mid[block.mid] = block
            structure.blocks.append(block)
    set_ends(structure)
    return structure


def attentions(graph: Graph, dependent: set[Node]) -> Iterator[Attention]:
    """Every fused attention, and every softmax between two matmuls."""
    for node in graph.nodes:
        if node not in dependent:
            continue
        name = packet(node)
        if name == SDPA:
            a = bind(node)
            yield Attention(node, a["query"], a["key"], a["value"], True, a["scale"], a["attn_mask"], a["is_causal"])
        elif name in SOFTMAX:
            scores = walk(node.args[0], dependent, back=True)
            value = next((v for u in node.users if (v := walk(u, dependent, back=False, source=node))), None)
            if scores is not None and value is not None:
                yield unfused(node, scores, value, dependent)


def hides_the_future(gm: GraphModule, attention: Attention) -> bool:
    """Whether a constant mask lets no query see a later key, as in a language model."""
    mask = attention.mask
    if not attention.fused:
        added = [n for n in attention.node.args[0].all_input_nodes if n.op == "get_attr"] if attention.node.args else []
        mask = added[0] if added else None
    if (
        mask is None
        or mask.op != "get_attr"
        or len(shape(mask)) < 2
        or shape(mask)[-1] != shape(mask)[-2]
        or shape(mask)[-1] < 2
    ):
        return False
    value = get_attr(gm, mask.target)
    if value.is_meta:
        return False
    visible = value if value.dtype is torch.bool else value > -1e4
    return not bool(visible.reshape(-1, *visible.shape[-2:])[0].triu(1).any())


def walk(node: Any, dependent: set[Node], *, back: bool, source: Node | None = None, depth: int = 16) -> Any:
    """The matmul that feeds a softmax (back), or the one it feeds together with the operand it comes in by."""
    if not isinstance(node, Node) or depth == 0 or node not in dependent:
        return None
    if packet(node) in MATMUL:
        return node if back else (node, source)
    if packet(node) not in BETWEEN:
        return None
    nexts = node.all_input_nodes if back else list(node.users)
    for n in nexts:
        found = walk(n, dependent, back=back, source=node, depth=depth - 1)
        if found is not None:
            return found
    return None


def unfused(softmax: Node, scores: Node, value: tuple[Node, Node], dependent: set[Node]) -> Attention:
    q, k = operands(scores)[:2]
    matmul, weights = value
    v = next((o for o in operands(matmul) if o is not weights), operands(matmul)[-1])
    return Attention(softmax, q, k, v, False)


def operands(node: Node) -> list[Node]:
    if packet(node) == "aten.einsum":
        return list(node.args[1])
    if packet(node) == "aten.baddbmm":
        return [node.args[1], node.args[2]]
    return [node.args[0], node.args[1]]


def ancestors(node: Node, dependent: set[Node], stop: int, order: dict[Node, int]) -> set[Node]:
    seen: set[Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in seen or n not in dependent or order[n] < stop:
            continue
        seen.add(n)
        todo.extend(n.all_input_nodes)
    return seen


def residual(attention: Attention, order: dict[Node, int], dependent: set[Node]) -> tuple[Node, Node] | str:
    """(entry, mid): the residual stream going in, and the add that joins the attention's result to it."""
    before = ancestors(attention.q, dependent, 0, order)
    after: set[Node] = {attention.node}
    nodes = iter(sorted_users(attention.node, order))
    for node in nodes:
        inputs = [n for n in node.all_input_nodes if n in after]
        if not inputs:
            continue
        after.add(node)
        if packet(node) in ADD and len(node.all_input_nodes) == 2:
            x, y = node.args[0], node.args[1]
            stream = x if y in after else y
            if (x in after) != (y in after) and shape(stream) == shape(node) and unscaled(stream, dependent) in before:
                return unscaled(stream, dependent), node
        if packet(node) == SDPA or packet(node) in SOFTMAX:
            break
    return "no residual add after it (cross or pooling attention, or the last step of a head): left alone"


def unscaled(node: Node, dependent: set[Node]) -> Node:
    """The stream before a scale of its own (`x * s + f(x)`): what is multiplied by something that no input reaches."""
    while packet(node) in ("aten.mul", "aten.div"):
        inputs = [n for n in node.all_input_nodes if n in dependent]
        if len(inputs) != 1 or shape(inputs[0]) != shape(node):
            break
        node = inputs[0]
    return node


def sorted_users(node: Node, order: dict[Node, int]) -> Iterator[Node]:
    """The nodes after `node` in graph order."""
    n = node.next
    while n.op != "root":
        if n.op == "call_function" and n in order:
            yield n
        n = n.next


def make_block(attention: Attention, entry: Node, mid: Node, structure: Structure, dependent: set[Node]) -> Block:
    token_axis, batch_axis, why_not = axes(attention, mid)
    length = shape(mid)[token_axis]
    last = structure.blocks[-1] if structure.blocks else None
    if last is not None and shape(last.mid) == shape(mid) and follows(last, entry, dependent, structure.order):
        stage = last.stage
    else:
        stage = make_stage(entry, token_axis, length, dependent)
        stage = next((one for one in structure.stages if one == stage), stage)
    if stage not in structure.stages:
        structure.stages.append(stage)
    path = common_path(entry, attention.node, mid)
    return Block(len(structure.blocks), path, [attention], entry, mid, None, token_axis, batch_axis, stage, why_not=why_not)


def axes(attention: Attention, mid: Node) -> tuple[int, int | None, str | None]:
    """Which axis of the residual stream holds the tokens, and which the batch."""
    sizes = shape(mid)
    tokens = shape(attention.q)[-2] if attention.fused else shape(attention.node)[-2]
    if len(sizes) == 2:
        return 0, None, None
    if len(sizes) == 3:
        if sizes[1] != tokens and sizes[0] == tokens:
            return 0, 1, None
        return 1, 0, None
    why = f"the residual stream is {'x'.join(map(str, sizes))}: its tokens lie on two axes (a grid), not on one"
    return len(sizes) - 2, 0, why


def follows(block: Block, entry: Node, dependent: set[Node], order: dict[Node, int]) -> bool:
    """Whether a stream at `entry` comes out of `block`, so that it holds the same tokens."""
    return block.mid in ancestors(entry, dependent, order[block.mid], order)


def set_ends(structure: Structure) -> None:
    """Block end: the next add that has `mid` as an operand, before the next attention."""
    for block in structure.blocks:
        later = [a.node for b in structure.blocks[block.index + 1 :] for a in b.attentions]
        limit = min((structure.order[n] for n in later), default=1 << 60)
        users = [*block.mid.users, *(v for u in block.mid.users if unscaled(u, {block.mid}) is block.mid for v in u.users)]
        ends = [u for u in users if packet(u) in ADD and structure.order[u] < limit]
        block.end = min(ends, key=structure.order.__getitem__, default=None)
        if block.end is not None:
            block.parallel = not depends(block.end, block.mid, structure.order)


def depends(end: Node, mid: Node, order: dict[Node, int]) -> bool:
    """Whether the other operand of `end` was computed from `mid` (a block in sequence, not in parallel)."""
    todo = [n for n in end.all_input_nodes if n is not mid]
    seen: set[Node] = set()
    while todo:
        n = todo.pop()
        if n is mid:
            return True
        if n not in seen and order[n] > order[mid]:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return False


def common_path(*nodes: Node) -> str:
    """The module that the attention and the residual add of a block have in common."""
    paths = [module_path(n).split(".") for n in nodes[1:]]
    out = []
    for names in zip(*paths):
        if len(set(names)) > 1:
            break
        out.append(names[0])
    return ".".join(out)


def make_stage(entry: Node, axis: int, length: int, dependent: set[Node]) -> Stage:
    upstream = ancestors(entry, dependent, 0, {n: i for i, n in enumerate(entry.graph.nodes)})
    spans = placeholder_spans(upstream, length)
    if spans:
        return Stage(length, spans[0][0], length - spans[-1][1], None, visual=False, text=True, spans=spans)
    prefix, suffix, grid, source = origin(entry, axis, dependent)
    body = length - prefix - suffix
    if grid is not None and body != _prod(grid):
        grid = None
    above = {packet(n) for n in upstream}
    # in a language model that image features were written into, nothing says which positions are visual
    text = packet(source) == "aten.embedding" or bool(above & WRITES)
    visual = not text and bool(above & {"aten.conv2d", "aten.conv3d", "aten.convolution", "aten.im2col", "aten.conv1d"})
    return Stage(length, prefix, suffix, grid, visual, text)


def placeholder_spans(upstream: set[Node], length: int) -> tuple[tuple[int, int], ...]:
    """The places of image features in a prompt of that length, from all writes that lie before."""
    written = [n for n in upstream if SPANS in n.meta and shape(n)[-2] == length]
    return tuple(sorted({span for n in written for span in n.meta[SPANS]}))


def _prod(sizes: tuple[int, ...]) -> int:
    out = 1
    for s in sizes:
        out *= s
    return out


def origin(node: Node, axis: int, dependent: set[Node]) -> tuple[int, int, tuple[int, ...] | None, Node]:
    """Walks back from a block's input to where its tokens were laid out: (prefix, suffix, grid, the op that did it)."""
    prefix = suffix = 0
    while node in dependent and node.op == "call_function":
        name, a = packet(node), bind(node)
        rank = len(shape(node)) if isinstance(node.meta["val"], torch.Tensor) else 0
        if name == "aten.cat" and (to_int(a["dim"]) or 0) % rank == axis:
            tensors = a["tensors"]
            user = [t for t in tensors if t in dependent] or list(tensors)
            body = max(user, key=lambda t: shape(t)[axis])
            at = tensors.index(body)
            prefix += sum(shape(t)[axis] for t in tensors[:at])
            suffix += sum(shape(t)[axis] for t in tensors[at + 1 :])
            node = body
        elif name == "aten.slice" and (a["dim"] or 0) % rank == axis:
            size = shape(a["self"])[axis]
            start, end = slice_bounds(a["start"], a["end"], size)
            prefix, suffix, node = prefix - start, suffix - (size - end), a["self"]
        elif name in LAYOUT:
            axis, node = moved(node, axis), node.all_input_nodes[0]
        elif name in VIEWS:
            source = node.all_input_nodes[0]
            before = view_sources(shape(source), shape(node), axis)
            if before is None:
                break
            if len(before) > 1:
                # what an index laid out is no raster: groups of neighbours in the order of windows
                grid = None if packet(source) in INDEX else tuple(shape(source)[i] for i in before)
                return max(prefix, 0), max(suffix, 0), grid, source
            axis, node = before[0], source
        else:
            length = shape(node)[axis] if rank else None
            follow = [
                n
                for n in node.all_input_nodes
                if n in dependent
                and isinstance(n.meta["val"], torch.Tensor)
                and len(shape(n)) == rank
                and shape(n)[axis] == length
            ]
            if not follow:
                break
            node = follow[0]
    return max(prefix, 0), max(suffix, 0), None, node


def slice_bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    start, stop, _ = slice(start, end).indices(size)
    return start, stop


def moved(node: Node, axis: int) -> int:
    """The axis of the input that axis `axis` of a permuted tensor came from: the op is run on strides that tell them apart."""
    source = node.all_input_nodes[0]
    rank = len(shape(source))
    if packet(node) in ("aten.contiguous", "aten.clone"):
        return axis
    marks = torch.empty_strided([2] * rank, list(range(1, rank + 1)), device="meta")
    args = [marks if a is source else a for a in node.args]
    return int(node.target(*args, **node.kwargs).stride()[axis]) - 1


def view_sources(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> list[int] | None:
    """The axes that a view joined into axis `axis`, or None where it cut one apart."""
    lead = _prod(after[:axis])
    total, out, product = 1, [], 1
    for i, size in enumerate(before):
        if total == lead and product < after[axis] and size > 1:
            out.append(i)
            product *= size
        elif total < lead:
            total *= size
    return out if total == lead and product == after[axis] and out else None
