"""Find: attention blocks, the residual stream, prefix and suffix tokens and the patch grid, read off the graph alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from math import prod
from typing import Any

from torch.fx import Graph, GraphModule, Node

from tokcompile.errors import module_path
from tokcompile.passes.causal import hides_the_future
from tokcompile.passes.graph import bind, packet, shape, user_dependent
from tokcompile.passes.memory import ancestors_of, reachable_from
from tokcompile.passes.placeholders import SAMPLES, SPANS
from tokcompile.passes.stages import Stage, make_stage

SDPA = "aten.scaled_dot_product_attention"
SOFTMAX = {"aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.special_softmax"}
MATMUL = {"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum"}
ADD = {"aten.add", "aten.add_"}
# what may stand between a score matmul and its softmax, or between the softmax and the value matmul; sinks are joined to the
# scores, and cut off after the softmax
BETWEEN = {
    "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.where", "aten.masked_fill", "aten.to", "aten._to_copy",
    "aten.view", "aten.reshape", "aten.permute", "aten.transpose", "aten.expand", "aten.contiguous", "aten.clone",
    "aten.linear", "aten.conv2d", "aten.type_as", "aten.dropout", "aten.clamp", "aten.float", "aten._unsafe_view",
    "aten.flatten", "aten.unsqueeze", "aten.squeeze", "aten.maximum", "aten.nan_to_num", "aten.tanh", "aten.expand_as",
    "aten.slice_scatter", "aten.cat", "aten.slice", "aten.mT", "aten.swapaxes", "aten.swapdims", "aten.movedim",
    "aten.select",
}  # fmt: skip


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
    crosses: bool = False  # its keys come from elsewhere: it says nothing about its own tokens

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

    @cached_property
    def leading(self) -> set[Node]:
        """What the blocks are computed from: whatever happens to tokens elsewhere costs nothing that was gained in them."""
        return ancestors_of({n for b in self.blocks for n in (b.mid, b.end) if n is not None})

    @cached_property
    def inside(self) -> set[Node]:
        """What lies between the beginning and the end of a block."""
        spans = (reachable_from({b.entry}) & ancestors_of({b.end or b.mid}) for b in self.blocks)
        return set().union(*spans)

    def sites(self) -> list[Block]:
        return [b for b in self.blocks if b.why_not is None]


def find(gm: GraphModule) -> Structure:
    """Reads the structure of a canonical graph with fake values."""
    graph = gm.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    dependent = user_dependent(graph)
    structure = Structure(order=order)
    by_mid: dict[Node, Block] = {}
    found_attentions = list(attentions(graph, dependent))
    laid_out = streams(graph, found_attentions)
    features = ancestors_of({n for n in graph.nodes if SAMPLES in n.meta})  # of images, placed among embeddings
    for attention in found_attentions:
        attention.causal = attention.causal or is_causal(gm, attention, dependent)
        found = residual(attention, order, dependent)
        name = f"{attention.node.name} ({module_path(attention.node) or 'no module'})"
        if isinstance(found, str):
            structure.unrecognised.append(f"{name}: {found}")
        elif found[1] in by_mid:
            by_mid[found[1]].attentions.append(attention)
        else:
            block = make_block(attention, *found, structure, dependent, found[0] not in laid_out, found[0] in features)
            by_mid[block.mid] = block
            structure.blocks.append(block)
    set_ends(structure, dependent)
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


def is_causal(gm: GraphModule, attention: Attention, dependent: set[Node]) -> bool:
    """Whether the mask of an attention lets no query see a later key, as in a language model."""
    if attention.fused or not attention.node.args:
        return hides_the_future(gm, attention.mask)
    scores = attention.node.args[0]
    if packet(scores) == "aten.where":  # where(mask, filling, scores), or the other way round
        return hides_the_future(gm, scores.args[0], marks_hidden=scores.args[2] in dependent)
    if packet(scores) == "aten.masked_fill":
        return hides_the_future(gm, scores.args[1], marks_hidden=True)
    return any(hides_the_future(gm, n) for n in scores.all_input_nodes)


def walk(node: Any, dependent: set[Node], *, back: bool, source: Node | None = None, depth: int = 16) -> Any:
    """The matmul that feeds a softmax (back), or the one it feeds together with the operand it comes in by."""
    if not isinstance(node, Node) or depth == 0 or node not in dependent:
        return None
    if packet(node) in MATMUL and not mixes_heads(node, dependent):
        return node if back else (node, source)
    norm_of_heads = not back and packet(node) == "aten.layer_norm"
    if packet(node) not in BETWEEN | MATMUL and not norm_of_heads:
        return None
    nexts = node.all_input_nodes if back else list(node.users)
    for n in nexts:
        found = walk(n, dependent, back=back, source=node, depth=depth - 1)
        if found is not None:
            return found
    return None


def mixes_heads(node: Node, dependent: set[Node]) -> bool:
    """Whether a product only mixes scores by a square weight, as of heads that talk to each other."""
    given = [n for n in operands(node) if isinstance(n, Node)]
    weights = [shape(n) for n in given if n not in dependent]
    same = any(prod(shape(n)) == prod(shape(node)) for n in given if n in dependent)
    return same and len(weights) == 1 and len(weights[0]) > 1 and weights[0][-1] == weights[0][-2] != shape(node)[-1]


def unfused(softmax: Node, scores: Node, value: tuple[Node, Node], dependent: set[Node]) -> Attention:
    q, k = operands(scores)[:2]
    if keys_first(softmax, scores):
        q, k = k, q
    matmul, weights = value
    v = next((o for o in operands(matmul) if o is not weights), operands(matmul)[-1])
    return Attention(softmax, q, k, v, False)


def keys_first(softmax: Node, scores: Node) -> bool:
    """Whether the product of queries and keys has the keys, over which the softmax runs, as its first operand."""
    if shape(scores) != shape(softmax):
        return False
    rank = len(shape(scores))
    dim = bind(softmax)["dim"] % rank
    if packet(scores) != "aten.einsum":
        return bool(dim == rank - 2)
    inputs, _, output = scores.args[0].partition("->")
    first, second = inputs.split(",")[:2]
    return output[dim] in first and output[dim] not in second


def operands(node: Node) -> list[Node]:
    if packet(node) == "aten.einsum":
        return list(node.args[1])
    if packet(node) == "aten.baddbmm":
        return [node.args[1], node.args[2]]
    return [node.args[0], node.args[1]]


def ancestors(node: Node, dependent: set[Node], stop: int, order: dict[Node, int]) -> set[Node]:
    """What a node is computed from, itself included, as far as it depends on the inputs and stands at `stop` or behind it."""
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
    """(entry, mid): the residual stream going in, and the add, or step towards it, that joins the attention's result to it."""
    before = ancestors(attention.q, dependent, 0, order)
    after: set[Node] = {attention.node}
    for node in behind(attention.node):
        if not any(n in after for n in node.all_input_nodes):
            continue
        after.add(node)
        if packet(node) == "aten.lerp" or (packet(node) in ADD and len(node.all_input_nodes) == 2):
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


def behind(node: Node) -> Iterator[Node]:
    """The ops after `node` in the order of the graph."""
    node = node.next
    while node.op != "root":
        if node.op == "call_function":
            yield node
        node = node.next


def streams(graph: Graph, found: Sequence[Attention]) -> set[Node]:
    """What the inputs reach without going through the keys, values or mask of an attention: streams whose tokens come from
    the inputs. The queries of a decoder are weights, and only look at these."""
    queries = {a.node: a.q for a in found}
    values = {a.v for a in found if not a.fused}
    reached: set[Node] = set()
    for node in graph.nodes:
        inputs = [queries[node]] if node in queries else node.all_input_nodes
        if packet(node) in MATMUL:
            inputs = [n for n in inputs if n not in values]
        if node.op == "placeholder" or any(n in reached for n in inputs):
            reached.add(node)
    return reached


def make_block(
    attention: Attention, entry: Node, mid: Node, structure: Structure, dependent: set[Node], queries: bool, features: bool
) -> Block:
    token_axis, batch_axis, why_not = axes(attention, mid)
    length = shape(mid)[token_axis]
    last = structure.blocks[-1] if structure.blocks else None
    if last is not None and shape(last.mid) == shape(mid) and follows(last, entry, dependent, structure.order):
        stage = last.stage
    else:
        upstream = ancestors(entry, dependent, 0, structure.order)
        stage = make_stage(entry, token_axis, length, dependent, upstream, queries, features)
        # the same tokens again, and not those of another image that went through the same tower
        stage = next((b.stage for b in structure.blocks if b.stage == stage and b.mid in upstream), stage)
    if not any(one is stage for one in structure.stages):
        structure.stages.append(stage)
    path = common_path(attention.node, mid)
    crosses = entry not in ancestors(attention.k, dependent, structure.order[entry], structure.order)
    return Block(
        len(structure.blocks),
        path,
        [attention],
        entry,
        mid,
        None,
        token_axis,
        batch_axis,
        stage,
        why_not=why_not,
        crosses=crosses,
    )


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
    between = ancestors(entry, dependent, order[block.mid], order)
    return block.mid in between and not any(SPANS in n.meta for n in between)  # placed in a prompt, as long by chance


def set_ends(structure: Structure, dependent: set[Node]) -> None:
    """Block end: the next add that has `mid` as an operand, before the next attention."""
    for block in structure.blocks:
        later = [a.node for b in structure.blocks[block.index + 1 :] for a in b.attentions]
        limit = min((structure.order[n] for n in later), default=1 << 60)
        users = [*block.mid.users, *(v for u in block.mid.users if unscaled(u, {block.mid}) is block.mid for v in u.users)]
        ends = [u for u in users if packet(u) in ADD and structure.order[u] < limit]
        block.end = min(ends, key=structure.order.__getitem__, default=None)
        if block.end is not None:
            branch = [n for n in block.end.all_input_nodes if n is not block.mid]
            start = structure.order[block.mid]
            block.parallel = not any(block.mid in ancestors(n, dependent, start, structure.order) for n in branch)


def common_path(*nodes: Node) -> str:
    """The innermost module that all nodes are in."""
    names = zip(*(module_path(n).split(".") for n in nodes))
    return ".".join(some[0] for some in takewhile(lambda some: len({*some}) == 1, names))
