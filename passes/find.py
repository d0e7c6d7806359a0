"""Find: attention blocks, the residual stream, prefix and suffix tokens and the patch grid, read off the graph alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

from torch.fx import Graph, GraphModule, Node

from tokcompile.errors import module_path
from tokcompile.passes.attentions import MATMUL, SDPA, SOFTMAX, Attention, attentions, is_causal
from tokcompile.passes.graph import packet, shape, user_dependent
from tokcompile.passes.memory import ancestors_of, reachable_from
from tokcompile.passes.placeholders import SAMPLES, SPANS
from tokcompile.passes.stages import Stage, make_stage

ADD = {"aten.add", "aten.add_"}


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
    def batch(self) -> int:
        """How many samples its stream holds, as far as they have an axis."""
        return shape(self.mid)[self.batch_axis] if self.batch_axis is not None else 1

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


def ancestors(node: Node, dependent: set[Node], stop: int, order: dict[Node, int]) -> set[Node]:
    """What a node is computed from, itself included, as far as it depends on the inputs and stands at `stop` or behind it."""
    return ancestors_of({node}, lambda n: n in dependent and order[n] >= stop)


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
