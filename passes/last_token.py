"""Last token: where a method ranks by the attention of a prompt's last token, that token may not be padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

from tokcompile.errors import InputError, UnsupportedGraph
from tokcompile.passes.attentions import Attention
from tokcompile.passes.causal import SAME_MASK, hiding, visible
from tokcompile.passes.fixed import program_of, read_by, value_of
from tokcompile.passes.graph import aten, packet, shape
from tokcompile.passes.memory import reachable_from
from tokcompile.passes.renumber import names_behind

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter
    from tokcompile.passes.splice import Splice

# what is masked stays so
THROUGH = SAME_MASK | {"aten.sub", "aten.view", "aten.reshape", "aten.clamp", "aten.maximum", "aten.type_as"}
WAY_OUT = "pad prompts on the left, as for generation, or choose a method that reads the visual tokens alone ('divprune')"


@dataclass(frozen=True)
class LastTokenSeen:
    """What a method takes for granted that ranks by the attention of the last token: the mask of no sample hides that token.

    program: computes from the flat inputs what the mask says of that token; name: of what it comes from; marks_hidden: see
    `hides_the_future`.
    """

    program: GraphModule
    name: str
    method: str
    marks_hidden: bool

    @property
    def guard(self) -> str:
        return f"the mask from {self.name} does not hide the last token, by whose attention {self.method!r} ranks"

    @property
    def broken(self) -> str:
        return f"the mask from {self.name} hides the last token of a prompt, by whose attention {self.method!r} ranks"

    def hides(self, inputs: Sequence[Any]) -> bool:
        """Whether the mask hides it; of inputs without data there is no telling."""
        mask = value_of(self.program, inputs)
        return mask is not None and not bool(visible(mask, self.marks_hidden).all())

    def check(self, inputs: Sequence[Any]) -> None:
        """Raises: InputError."""
        if self.hides(inputs):
            raise InputError(f"{self.broken}\n  what to do: {WAY_OUT}")


def check_last_token(rw: Rewriter, s: Splice, attention: Attention) -> None:
    """Raises: UnsupportedGraph where the example's mask hides the last token; later inputs are checked when they come."""
    if not s.language or s.tap_block is None:
        return
    moving, length = reachable_from({s.tap_block.entry}), shape(s.at)[s.block.token_axis]
    scores = attention.mask if attention.fused else attention.node.args[0]
    for mask, marks_hidden in masks_in(rw.old, scores, moving):
        if len(shape(mask)) < 2 or not set(shape(mask)[-2:]) <= {1, length}:
            continue
        program = at_the_end(program_of(rw.old, mask))
        if not read_by(program, rw.inputs):
            continue
        check = LastTokenSeen(program, names_behind(mask), s.recipe.name, marks_hidden)
        if check.hides(rw.inputs):
            raise UnsupportedGraph(f"in the example {check.broken}", attention.node, WAY_OUT)
        rw.checks.setdefault(mask, check)


def at_the_end(program: GraphModule) -> GraphModule:
    """The program of a mask cut down, in place, to how its last query sees its last key."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    with program.graph.inserting_before(output):
        row = program.graph.call_function(aten.select.int, (output.args[0], -2, -1))
        output.args = (program.graph.call_function(aten.select.int, (row, -1, -1)),)
    program.recompile()
    return program


def masks_in(gm: GraphModule, scores: Any, moving: Set[Node], marks_hidden: bool = False) -> Iterator[tuple[Node, bool]]:
    """The masks and biases that scores, or a mask, are joined from, and whether true entries of each hide. moving: what is
    computed from tokens, which scores are and these are not."""
    if not isinstance(scores, Node):
        return
    name = packet(scores)
    if scores not in moving:
        yield scores, marks_hidden
    elif name in THROUGH:
        yield from masks_in(gm, scores.args[0], moving)
    elif name == "aten.cat":  # sinks behind the scores
        yield from masks_in(gm, scores.args[0][0], moving)
    elif name == "aten.add":
        yield from (found for n in scores.all_input_nodes for found in masks_in(gm, n, moving))
    elif name == "aten.masked_fill":
        yield from masks_in(gm, scores.args[0], moving)
        yield from masks_in(gm, scores.args[1], moving, hiding(gm, scores.args[2]))
    elif name == "aten.where":
        seen, yes, no = scores.args
        yield from masks_in(gm, seen, moving, hiding(gm, yes))
        yield from (found for n in (yes, no) for found in masks_in(gm, n, moving))
