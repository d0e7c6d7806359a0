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
    return _Find(gm).run()


class _Find:
    """dependent: what the inputs reach. laid_out: see `streams`. features: of images, placed among embeddings."""

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.dependent = user_dependent(gm.graph)
        self.attentions = list(attentions(gm.graph, self.dependent))
        self.laid_out = streams(gm.graph, self.attentions)
        self.features = ancestors_of(n for n in gm.graph.nodes if SAMPLES in n.meta)
        self.found = Structure(order=self.order)

    def run(self) -> Structure:
        by_mid: dict[Node, Block] = {}
        for attention in self.attentions:
            attention.causal = attention.causal or is_causal(self.gm, attention, self.dependent)
            found = self.residual(attention)
            if isinstance(found, str):
                name = f"{attention.node.name} ({module_path(attention.node) or 'no module'})"
                self.found.unrecognised.append(f"{name}: {found}")
            elif found[1] in by_mid:
                by_mid[found[1]].attentions.append(attention)
            else:
                by_mid[found[1]] = self.block(attention, *found)
        for block in self.found.blocks:
            self.set_end(block)
        return self.found

    def ancestors(self, node: Node, start: Node | None = None) -> set[Node]:
        """What a node is computed from, itself included, as far as it depends on the inputs and stands at `start` or behind."""
        least = 0 if start is None else self.order[start]
        return ancestors_of({node}, lambda n: n in self.dependent and self.order[n] >= least)

    def residual(self, attention: Attention) -> tuple[Node, Node] | str:
        """(entry, mid): the residual stream going in, and the add, or step towards it, that joins the attention's result to
        it."""
        before = self.ancestors(attention.q)
        after: set[Node] = {attention.node}
        of_values = attention.fused  # before that, maps are added to maps
        for node in behind(attention.node):
            if not any(n in after for n in node.all_input_nodes):
                continue
            after.add(node)
            of_values |= attention.v in node.all_input_nodes
            if not of_values:
                continue
            if packet(node) == "aten.lerp" or (packet(node) in ADD and len(node.all_input_nodes) == 2):
                x, y = node.args[0], node.args[1]
                stream = unscaled(x if y in after else y, self.dependent)
                if (x in after) != (y in after) and shape(stream) == shape(node) and stream in before:
                    return stream, node
            if packet(node) == SDPA or packet(node) in SOFTMAX:
                break
        return "no residual add after it (cross or pooling attention, or the last step of a head): left alone"

    def block(self, attention: Attention, entry: Node, mid: Node) -> Block:
        """A new one, with which a new stage may begin."""
        token_axis, batch_axis, why_not = axes(attention, mid)
        stage = self.stage(entry, mid, token_axis)
        crosses = entry not in self.ancestors(attention.k, entry)
        number, path = len(self.found.blocks), common_path(attention.node, mid)
        block = Block(number, path, [attention], entry, mid, None, token_axis, batch_axis, stage, False, why_not, crosses)
        self.found.blocks.append(block)
        return block

    def stage(self, entry: Node, mid: Node, token_axis: int) -> Stage:
        """That of the last block, if its tokens come in here too; else another one."""
        blocks, stages = self.found.blocks, self.found.stages
        if blocks and shape(blocks[-1].mid) == shape(mid) and self.follows(blocks[-1], entry):
            return blocks[-1].stage
        upstream = self.ancestors(entry)
        queries, features = entry not in self.laid_out, entry in self.features
        made = make_stage(entry, token_axis, shape(mid)[token_axis], self.dependent, upstream, queries, features)
        # the same tokens again, and not those of another image that went through the same tower
        known = next((b.stage for b in blocks if b.stage == made and b.mid in upstream), None)
        if known is None:
            stages.append(made)
        return known or made

    def follows(self, block: Block, entry: Node) -> bool:
        """Whether a stream at `entry` comes out of `block`, so that it holds the same tokens."""
        between = self.ancestors(entry, block.mid)
        return block.mid in between and not any(SPANS in n.meta for n in between)  # placed in a prompt, as long by chance

    def set_end(self, block: Block) -> None:
        """The next add that has `mid` as an operand, before the next attention."""
        later = [a.node for b in self.found.blocks[block.index + 1 :] for a in b.attentions]
        limit = min((self.order[n] for n in later), default=1 << 60)
        users = [*block.mid.users, *(v for u in block.mid.users if unscaled(u, {block.mid}) is block.mid for v in u.users)]
        ends = [u for u in users if packet(u) in ADD and self.order[u] < limit]
        block.end = min(ends, key=self.order.__getitem__, default=None)
        if block.end is not None:
            branch = [n for n in block.end.all_input_nodes if n is not block.mid]
            block.parallel = not any(block.mid in self.ancestors(n, block.mid) for n in branch)


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


def common_path(*nodes: Node) -> str:
    """The innermost module that all nodes are in."""
    names = zip(*(module_path(n).split(".") for n in nodes))
    return ".".join(some[0] for some in takewhile(lambda some: len({*some}) == 1, names))
