"""Places: at which blocks a method reduces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

from torch.fx import Node

from tokcompile.budget import Schedule
from tokcompile.errors import InputError, PlanError, UnsupportedGraph
from tokcompile.passes.find import Block, Structure
from tokcompile.passes.graph import shape
from tokcompile.passes.layout import Layout
from tokcompile.passes.memory import ancestors_of
from tokcompile.passes.slots import Slot, make_slot
from tokcompile.passes.stages import Stage
from tokcompile.recipe import Recipe

OTHER_BLOCKS = "reduce in other blocks: where=[...]; `tokcompile inspect` lists them"
NO_OTHER_BLOCKS = "all blocks of this model are like that: export it as it is"
OTHER_METHOD = "choose a method that does not read attention"
NOT_SAID = "nothing in this graph says which positions are visual tokens (a language model on embeddings or ids)"
NAME_THEM = "name them: spans=[(start, stop)]"


def choose_slots(
    structure: Structure,
    recipe: Recipe,
    budget: Any,
    where: Sequence[int | str] | None,
    spans: Sequence[tuple[int, int]] | None,
    layout: Layout,
) -> list[Slot]:
    """The blocks to reduce at: the ones named, or the method's own among those that hold visual tokens."""
    if not structure.blocks:
        raise no_blocks(structure)
    if isinstance(budget, Schedule):  # whose counts are in the order of its blocks
        chosen = asked_for(structure.blocks, sorted(budget.counts), spans)
    elif where is not None:
        chosen = sorted({b.index: b for b in asked_for(structure.blocks, where, spans)}.values(), key=lambda b: b.index)
    else:
        chosen = own_blocks(structure, recipe, spans)
    named = where is not None or isinstance(budget, Schedule)
    place = recipe.place_in(spans is not None or chosen[0].language)
    chosen = reducible(chosen, structure, named)
    if place == "block" and recipe.reads_attention() and not recipe.ahead and not recipe.opening:
        chosen = after_attention(chosen, structure, recipe, spans, named)
    lengths = {b.stage.length for b in chosen}
    if len(lengths) > 1:
        raise UnsupportedGraph(
            f"the blocks {[b.index for b in chosen]} hold {sorted(lengths, reverse=True)} tokens: "
            "one method works within one stage",
            hint=f"choose one stage: where={stage_blocks(structure)}",
        )
    return [make_slot(b, place, spans, layout) for b in chosen]


def asked_for(blocks: list[Block], where: Sequence[int | str], spans: Sequence[tuple[int, int]] | None) -> list[Block]:
    """The blocks of these numbers and paths. Raises: PlanError; UnsupportedGraph where their visual tokens are not known."""
    chosen = [b for one in where for b in named_blocks(blocks, one)]
    if not chosen:
        raise PlanError("where=[] names no block: leave it out to reduce at the method's own")
    refuse_apart(chosen)
    unsaid = [b for b in chosen if b.language and not (shows_patches(b.stage) or spans or b.stage.spans)]
    if unsaid:
        raise UnsupportedGraph(NOT_SAID, unsaid[0].mid, NAME_THEM)
    return chosen


def own_blocks(structure: Structure, recipe: Recipe, spans: Sequence[tuple[int, int]] | None) -> list[Block]:
    """Those that the method chooses by itself, in each stream of the blocks with visual tokens. Raises: UnsupportedGraph."""
    candidates = visual_blocks(structure, spans, recipe.steps.language is not None)
    if recipe.reads_attention():
        candidates = looking_at_themselves(candidates)
    language = spans is not None or candidates[0].language
    chosen = [one[i] for one in streams(candidates) for i in recipe.steps.at(len(one), language)]
    refuse_apart(chosen)
    return sorted(chosen, key=lambda b: b.index)


def reducible(chosen: list[Block], structure: Structure, named: bool) -> list[Block]:
    """Those in which tokens can be reduced. Raises: UnsupportedGraph where the user named others, or there is none."""
    refused = [b for b in chosen if b.why_not]
    if refused and (named or len(refused) == len(chosen)):
        raise UnsupportedGraph(
            f"tokens cannot be reduced in block {refused[0].index} ({refused[0].path}): {refused[0].why_not}",
            refused[0].mid,
            OTHER_BLOCKS if any(not b.why_not for b in structure.blocks) else NO_OTHER_BLOCKS,
        )
    return [b for b in chosen if not b.why_not]


def after_attention(
    chosen: list[Block], structure: Structure, recipe: Recipe, spans: Sequence[tuple[int, int]] | None, named: bool
) -> list[Block]:
    """Those of the chosen blocks before which another has attended to the same tokens, or the first such block.

    Raises: UnsupportedGraph where none has, or one that the user named is too early.
    """
    blocks = structure.blocks
    early = [b for b in chosen if not before(b, blocks)]
    if early and named:
        later = next((b.index for b in blocks[early[0].index :] if not b.why_not and before(b, blocks)), None)
        raise UnsupportedGraph(
            f"{recipe.name!r} reads the attention of the block before, and none over the same tokens comes before block "
            f"{early[0].index}",
            early[0].mid,
            f"place it later: where=[{later}] or higher" if later is not None else OTHER_METHOD,
        )
    late = [b for b in chosen if b not in early] or [b for b in visual_blocks(structure, spans) if before(b, blocks)][:1]
    if not late:
        raise UnsupportedGraph(
            f"{recipe.name!r} reads the attention of the block before, and no two blocks hold the same tokens",
            blocks[0].mid,
            OTHER_METHOD,
        )
    return late


def no_blocks(structure: Structure) -> UnsupportedGraph:
    """The refusal of a model in which nothing was found, with what was seen instead."""
    seen = structure.unrecognised[:3] or ["no softmax between two matrix products, no fused attention"]
    more = len(structure.unrecognised) - len(seen)
    return UnsupportedGraph(
        f"no residual attention block was found in this model ({'; '.join(seen)}{f'; and {more} more' if more > 0 else ''})",
        hint="tokcompile reduces the tokens of transformer blocks; run `tokcompile inspect` on the model",
    )


def visual_blocks(structure: Structure, spans: Any, language: bool = False) -> list[Block]:
    """The blocks to choose among: of those whose tokens are visual, the stack in which most is computed.

    language: whether those of a language model come first, where the graph says which of its positions are visual.
    """
    blocks = structure.blocks
    return most_computed(seen_in(blocks, language) if spans is None else reaching(blocks, spans))


def seen_in(blocks: list[Block], language: bool) -> list[Block]:
    """Those that the graph says hold visual tokens: of a tower after a patch embedding, or at placeholders of a prompt.

    Raises: UnsupportedGraph.
    """
    prompted = [b for b in blocks if b.stage.spans]
    if prompted and (language or not any(b.stage.visual and not b.why_not for b in blocks)):
        return prompted
    visual = [b for b in blocks if b.stage.visual] or [b for b in blocks if not b.stage.text]
    causal = [b for b in visual if any(a.causal for a in b.attentions)]
    towers = [b for b in visual if b.stage.visual and not b.language]
    if towers and causal:  # before a language model whose prompt is joined from embeddings and image features
        visual, causal, blocks = towers, [], [b for b in blocks if b not in causal]
    text = [b for b in blocks if b.stage.text]
    if not visual or causal:
        raise UnsupportedGraph(NOT_SAID, (causal or blocks)[0].mid, NAME_THEM)
    before = ancestors_of({text[0].entry}) if text else set()
    return [b for b in visual if b.mid in before] or visual  # others only lead to an output


def reaching(blocks: list[Block], spans: Any) -> list[Block]:
    """Those that hold the positions that the user names, of a text stream where the graph has one: layers that keep no keys
    may go over the last token alone."""
    named = [b for b in blocks if b.stage.text] or blocks
    end = max((stop for _, stop in spans), default=0)
    return [b for b in named if b.stage.length >= end] or named


def most_computed(blocks: list[Block]) -> list[Block]:
    """Those of the stack that costs most; of two that cost the same, the one with the smaller batch, since inner blocks (one
    frame, one column) fold tokens into it."""
    work: dict[tuple[int, int, str], int] = {}
    for b in blocks:
        if not b.why_not:
            work[kind(b)] = work.get(kind(b), 0) + work_of(b)
    if not work:
        return blocks
    most = max(work, key=lambda one: (work[one], -one[1]))
    return [b for b in blocks if kind(b) == most]


def streams(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks apart by whose tokens they hold: several, where a tower is called once for each of several images."""
    out: list[list[Block]] = []
    for block in blocks:
        above: set[Node] | None = None
        for one in reversed(out):
            if one[-1].stage is not block.stage and above is None:
                above = ancestors_of({block.entry})
            if one[-1].stage is block.stage or (above is not None and one[-1].mid in above):
                one.append(block)
                break
        else:
            out.append([block])
    return out


def stack_of(block: Block, blocks: Sequence[Block]) -> list[Block]:
    """The blocks that stand above each other with this one: those of a tower, say, without the language model's."""
    return next(one for one in streams([b for b in blocks if kind(b) == kind(block)]) if block in one)


def kind(block: Block) -> tuple[int, int, str]:
    """(tokens, batch, name without its numbers) of a block: blocks of one stack agree in all three."""
    return block.stage.length, block.batch, re.sub(r"\d+", "#", block.path)


def work_of(block: Block) -> int:
    """What the linear layers of a block cost, up to a factor."""
    return prod(shape(block.mid)) * shape(block.mid)[-1]


def one_block(blocks: Sequence[Block], index: Any) -> Block:
    if isinstance(index, str):
        named = [b for b in blocks if b.path == index]
        if not named:
            raise PlanError(f"no block has the path {index!r}; there are {', '.join(b.path for b in blocks)}")
        return named[0]
    if not isinstance(index, int) or not -len(blocks) <= index < len(blocks):
        raise PlanError(f"block {index!r} is not among the {len(blocks)} blocks found (0 to {len(blocks) - 1})")
    return blocks[index]


def shows_patches(stage: Stage) -> bool:
    """Whether it is known which of the tokens come from an image."""
    return stage.visual and bool(stage.grid or stage.prefix or stage.suffix)


def named_blocks(blocks: Sequence[Block], index: Any) -> list[Block]:
    """The block of a number, or of a module path: one for each of several images that the module is called with."""
    if not isinstance(index, str):
        return [one_block(blocks, index)]
    return [one[0] for one in streams([b for b in blocks if b.path == index])] or [one_block(blocks, index)]


def before(block: Block, blocks: Sequence[Block]) -> Block | None:
    """The last block over the same tokens that has been computed when `block` begins."""
    same = [b for b in blocks[: block.index] if kind(b) == kind(block) and b.stage is block.stage]
    return looking_at_themselves(same)[-1] if same else None


def looking_at_themselves(blocks: list[Block]) -> list[Block]:
    """Those whose tokens attend to each other, where there are such, and not to a caption."""
    return [b for b in blocks if not b.crosses] or blocks


def stage_blocks(structure: Structure) -> str:
    by_length: dict[int, list[int]] = {}
    for b in structure.blocks:
        by_length.setdefault(b.stage.length, []).append(b.index)
    return " or ".join(str(v) for v in by_length.values())


def refuse_apart(chosen: Sequence[Block]) -> None:
    """Raises: InputError where the samples of a batch have their images at other places: one span cannot name them."""
    found = next((b.stage.apart for b in chosen if b.stage.apart), "")
    if found:
        raise InputError(
            f"{found}, and which tokens may be dropped is static\n"
            "  what to do: pad the texts on their left so that the images stand at the same places, or pass one prompt"
        )
