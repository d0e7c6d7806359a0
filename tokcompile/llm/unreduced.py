"""The decode step of a model that attends in its own way: with a bias by distance (ALiBi), or in code of its own.

What such a model computes from its cache belongs to the positions of the entries. So it is traced over a cache in which
nothing was dropped, and the rewrite then leaves of each layer's entries, masks and biases what the prefill has kept.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from tokcompile.errors import InputError, UnsupportedGraph
from tokcompile.llm.caches import Slots, cache_name
from tokcompile.llm.layout import Cut, Layout, Stage
from tokcompile.llm.modules import Now, Step
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.find import Structure
from tokcompile.passes.graph import packet
from tokcompile.passes.groups import tokens_of_groups
from tokcompile.passes.rewrite import Rewriter
from tokcompile.passes.tokens import Batch, Label, Space, make_seq, plain
from tokcompile.passes.trace import Traced

WHOLE = "tokcompile.whole"
WAY_OUT = "nothing yet; the prefill alone can be optimized and exported"

_OPS = torch.library.Library("tokcompile", "FRAGMENT")
_OPS.define("whole(Tensor entries, int stage, int length) -> Tensor")
_OPS.impl(
    "whole",
    lambda entries, stage, length: nn.functional.pad(entries, (0, 0, 0, length - entries.shape[2])),
    "CompositeExplicitAutograd",
)


class Whole(Slots):
    """The same cache as one in which nothing was dropped: `length` entries in each layer, the new one at the slot `now`."""

    def __init__(self, layout: Layout, now: Tensor, *buffers: Any):
        super().__init__(*buffers)
        self.layout, self.now, self.length = layout, now, layout.length + layout.room

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = super().update(key, value, layer_idx)
        stage = self.layout.stage_of(len(self.filled) - 1)
        if not self.layout.stages[stage].cuts:
            return key, value
        whole = torch.ops.tokcompile.whole
        return whole(key, stage, self.length), whole(value, stage, self.length)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.now

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.now

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        return self.length, 0


class Counting(TorchFunctionMode):
    """Numbers from one tensor to another are written as so many of them, from wherever it begins: tracing reads how many there
    are, and would otherwise fix both ends at what they are in the example's step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.arange and len(args) == 2 and all(isinstance(end, Tensor) for end in args):
            first, last = args
            return torch.arange(int(last - first), **(kwargs or {})) + first
        return func(*args, **(kwargs or {}))


class WholeDecode(Step):
    """A step before the rewrite: the model makes masks and biases itself, over the whole text.

    told: whether it is given the token's position; else it counts by what the cache has held, and perhaps not from 0.
    """

    def __init__(self, model: nn.Module, layout: Layout, told: bool):
        super().__init__(model, layout)
        self.told, self.takes = told, {*inspect.signature(model.forward).parameters}

    def run(self, now: Now, *buffers: Any) -> tuple[Tensor, Slots]:
        plan, token = self.layout, now.token
        place = now.step + plan.length
        cache = Whole(plan, place[0], *buffers)
        count = len(cache.keys)
        before = token.new_ones(plan.batch, plan.length) if now.padding is None else now.padding.to(token.dtype)
        after = torch.arange(plan.room, device=token.device) <= now.step
        given = {
            "attention_mask": torch.cat([before, after.to(token.dtype).expand(plan.batch, -1)], 1),
            "cache_position": place,
            cache_name(self.model): cache,
        }
        if self.told:
            given["position_ids"] = now.position_ids
        with Counting():
            out = self.model(input_ids=token, use_cache=True, **{name: v for name, v in given.items() if name in self.takes})
        if len(cache.filled) != count:
            raise InputError(
                f"{len(cache.filled)} layers put keys into the cache, and the prefill has {count} caches\n"
                f"  what to do: {WAY_OUT}"
            )
        return out.logits, cache


def shortened(traced: Traced, layout: Layout) -> Traced:
    """The traced step over the entries that are there. Raises: UnsupportedGraph."""
    graph = canonicalise(traced.gm, traced.inputs)
    try:
        traced.gm = Shortening(graph, layout).run().gm
    except UnsupportedGraph as error:
        raise UnsupportedGraph(
            f"this model cannot be decoded after a reduced prefill: {error.reason}", error.node, WAY_OUT
        ) from error
    return traced


class Shortening(Rewriter):
    """Where the whole of a cache is read, what is there takes its place, and is labelled as what it is."""

    def __init__(self, gm: torch.fx.GraphModule, layout: Layout):
        super().__init__(gm, Structure(), (), recover="never")
        self.layout = layout
        self.inputs_by_name = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
        self.of: dict[Cut, Space] = {}

    def step(self, node: Node) -> None:
        if packet(node) != WHOLE:
            super().step(node)
            return
        entries, stage, _ = node.args
        self.set(node, self.env[entries], self.label(node, self.layout.stages[stage]))

    def label(self, node: Node, stage: Stage) -> Label:
        parts: list[int | Space] = []
        at = 0
        for cut in sorted(stage.cuts, key=lambda c: c.start):
            parts += [cut.start - at, self.space(cut)]
            at = cut.start + cut.n * cut.unit
        sizes = plain(node.meta["val"].shape)
        batch = (Batch(self.layout.batch),) if self.layout.batch > 1 else sizes[0]
        end = self.layout.length + self.layout.room
        return batch, sizes[1], (make_seq([*parts, end - at]),), sizes[3]

    def space(self, cut: Cut) -> Space:
        """What a reduction left of its span, by the prefill's indices."""
        if cut not in self.of:
            if cut.index is None:
                none = self.builder.constant(torch.empty(self.layout.batch, 0, dtype=torch.int64), "none")
                return Space("gone", cut.n * cut.unit, 0, None, none)
            index = self.env[self.inputs_by_name[f"kept_{cut.index}"]]
            space = Space(cut.index, cut.n, self.layout.kept[cut.index], None, index, ordered=False)
            self.of[cut] = space if cut.unit == 1 else tokens_of_groups(self, space, cut.unit, None)
        return self.of[cut]
