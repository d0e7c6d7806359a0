"""Where the tokens of a reduced prefill are: which outputs are caches, how long they are in each stage, and which original
positions their entries stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokcompile.errors import InputError
from tokcompile.exports.names import output_names, unique
from tokcompile.passes.plan import Reduction
from tokcompile.passes.reduction import ReductionModule

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel

STATE = re.compile(r"states_(\w+)")  # of layers that keep no keys and values
# what llm.Prefill calls its caches, and what becomes of a transformers cache that is registered for export
CACHE = (re.compile(r"(keys|values)_(\d+)"), re.compile(r"(?:past_key_values|cache)_(?:key_cache_|value_cache_|([01])_)(\d+)"))


@dataclass(frozen=True)
class Cut:
    """One reduction of a span: `n` tokens from the original position `start` on became those that `index` names, or none."""

    index: str | None
    start: int
    n: int
    unit: int


@dataclass(frozen=True)
class Stage:
    """Layers `first` to `last` (the last one included) whose caches hold `length` tokens after the prefill; `cuts`: one for
    each span that has been reduced by then."""

    first: int
    last: int
    length: int
    capacity: int
    cuts: tuple[Cut, ...] = ()

    def rows(self, length: int, kept: Mapping[str, Tensor]) -> Tensor:
        """The original position of each entry, (1 or B, self.length); `length`: of the whole prompt."""
        parts, at = [], 0
        chosen = [kept[c.index] for c in self.cuts if c.index]
        batch = max([1, *(index.shape[0] for index in chosen)])
        device = next((index.device for index in chosen), None)
        for cut in sorted(self.cuts, key=lambda c: c.start):
            parts.append(torch.arange(at, cut.start, device=device).expand(batch, -1))
            index = kept[cut.index] if cut.index else None
            if index is not None and cut.unit > 1:
                index = (index[..., None] * cut.unit + torch.arange(cut.unit, device=device)).flatten(1)
            parts += [] if index is None else [index + cut.start]
            at = cut.start + cut.n * cut.unit
        return torch.cat([*parts, torch.arange(at, length, device=device).expand(batch, -1)], 1)


@dataclass(frozen=True)
class Layout:
    """All that decoding has to know about a prefill.

    length: of the prompt before any reduction; without position_ids the next token stands at this position. prompt: the
    input that holds it. axes: of position_ids in front of the batch, (3,) where a position has three numbers.
    keys, values: output names by layer. shapes: of the keys and of the values by layer. kept: how many indices each output
    of them holds. renumbered: whether tokens got new positions after a reduction. states: shape and dtype of what other
    layers keep, by the name that the decode step gives it.
    """

    length: int
    batch: int
    prompt: str
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    logits: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    dtype: torch.dtype
    stages: tuple[Stage, ...]
    kept: dict[str, int]
    axes: tuple[int, ...] = ()
    renumbered: bool = False
    states: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    @property
    def placed(self) -> bool:
        """Whether the prefill is told the position of each token, one number each."""
        return "position_ids" in self.inputs and not self.axes

    @property
    def room(self) -> int:
        """How many tokens may be decoded."""
        return self.stages[0].capacity - self.stages[0].length

    def stage_of(self, layer: int) -> int:
        return next(i for i, s in enumerate(self.stages) if s.first <= layer <= s.last)


def layout(prefill: OptimizedModel, max_new_tokens: int) -> Layout:
    """Reads plan and outputs of an optimized prefill. Raises: InputError where it is none that can be continued."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: at least one token must be generated")
    if prefill.plan.reductions and prefill.plan.outputs != "reduced":
        raise InputError(
            "this prefill gives dropped tokens back to its caches, so that decoding would attend to them again\n"
            '  what to do: optimize it with outputs="reduced"'
        )
    for module in prefill.graph_module.modules():
        if isinstance(module, ReductionModule) and module.recipe.proportional and module.site.options.get("proportional", True):
            raise InputError(
                f"{module.recipe.name} lets a merged token weigh as much as the tokens in it, and a decode step does not know "
                "how many they are\n  what to do: pass proportional=False, or choose a method that drops tokens"
            )
    inputs = {n: v for n, v in zip(prefill.input_names, prefill.example_inputs) if isinstance(v, Tensor)}
    prompt = next((n for n in ("inputs_embeds", "input_ids") if n in inputs), None)
    if prompt is None:
        raise InputError(
            f"the prefill takes {', '.join(inputs) or 'no tensors'}, and neither inputs_embeds nor input_ids\n"
            "  what to do: optimize tokcompile.llm.Prefill(model) with one of the two"
        )
    shape = inputs["position_ids"].shape if "position_ids" in inputs else inputs[prompt].shape[:2]
    if shape[-2:] != inputs[prompt].shape[:2] or len(shape) > 3:
        raise InputError(
            f"position_ids have the shape {tuple(shape)}, and the prompt {tuple(inputs[prompt].shape)}\n"
            "  what to do: positions are (batch, length), or (axes, batch, length) where each has several numbers"
        )
    outputs = dict(zip(names_of(prefill), values_of(prefill)))
    shapes = {n: v.shape for n, v in outputs.items()}
    states = {m[1]: (tuple(v.shape), v.dtype) for n, v in outputs.items() if (m := STATE.fullmatch(n))}
    keys, values = caches(shapes)
    batch, length = inputs[prompt].shape[:2]
    lengths = [shapes[k][2] for k in keys]
    made = stages(lengths, length, max_new_tokens, prefill.plan.reductions)
    dtype = outputs[keys[0]].dtype
    return Layout(
        length,
        batch,
        prompt,
        {n: (tuple(v.shape), v.dtype) for n, v in inputs.items()},
        next(n for n in shapes if n == "logits" or n not in (*keys, *values)),
        keys,
        values,
        tuple((tuple(shapes[k]), tuple(shapes[v])) for k, v in zip(keys, values)),
        dtype,
        made,
        {cut.index: shapes[cut.index][1] for stage in made for cut in stage.cuts if cut.index},
        tuple(shape[:-2]) if "position_ids" in inputs else (),
        prefill.renumbered,
        states,
    )


def names_of(prefill: OptimizedModel) -> list[str]:
    """The outputs' names, those that an ONNX file has too."""
    return unique([*output_names(prefill), *prefill.extra_outputs])


def values_of(prefill: OptimizedModel) -> list[Any]:
    """The outputs' fake values."""
    out = prefill.graph_module.graph.output_node().args[0]
    return [getattr(v, "meta", {}).get("val") for v in out]


def caches(shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the keys and of the values, by layer. Raises: InputError."""
    found: dict[str, dict[int, str]] = {"keys": {}, "values": {}}
    for name in shapes:
        for pattern in CACHE:
            if match := pattern.fullmatch(name):
                kind = {"0": "keys", "1": "values"}.get(match[1] or str(int("value_cache" in name)), match[1])
                found[kind][int(match[2])] = name
    keys, values = (tuple(one[i] for i in sorted(one)) for one in found.values())
    if not keys or len(keys) != len(values) or any(len(shapes[n]) != 4 for n in (*keys, *values)):
        raise InputError(
            f"no caches were found among the prefill's outputs ({', '.join(shapes)})\n"
            "  what to do: optimize tokcompile.llm.Prefill(model), which returns them"
        )
    return keys, values


def stages(lengths: Sequence[int], length: int, room: int, reductions: Sequence[Reduction]) -> tuple[Stage, ...]:
    """Runs of layers whose caches are equally long, each with the reductions that had been made by then."""
    known: dict[int, tuple[Cut, ...]] = {length: ()} | after_each_block(length, reductions)
    made: list[Stage] = []
    for layer, now in enumerate(lengths):
        if now not in known:
            raise InputError(
                f"the cache of layer {layer} holds {now} tokens, and by the plan a layer holds {' or '.join(map(str, known))}: "
                "decoding cannot tell which ones they are\n  what to do: optimize tokcompile.llm.Prefill(model), whose caches "
                "are not cut to a sliding window"
            )
        if made and made[-1].length == now:
            made[-1] = Stage(made[-1].first, layer, now, now + room, known[now])
        else:
            made.append(Stage(layer, layer, now, now + room, known[now]))
    return tuple(made)


def after_each_block(length: int, reductions: Sequence[Reduction]) -> dict[int, tuple[Cut, ...]]:
    """The cuts that are in force once so many tokens are left."""
    known: dict[int, tuple[Cut, ...]] = {}
    cuts: dict[int, Cut] = {}
    now = length
    for i, r in enumerate(reductions):
        earlier = cuts.get(r.prefix)
        n = earlier.n if earlier else r.n
        if r.prefix + n * r.unit + r.suffix != length:
            raise InputError(
                f"the reduction at {r.path} is over {r.prefix + n * r.unit + r.suffix} tokens, and the prompt has {length}: it "
                "is outside of the decoder\n  what to do: optimize the decoder on inputs_embeds, and the rest by itself"
            )
        cuts[r.prefix] = Cut(f"s{i}_index" if r.k else None, r.prefix, n, r.unit)
        now -= (r.n - r.k) * r.unit
        if i + 1 == len(reductions) or reductions[i + 1].block != r.block:
            known[now] = tuple(cuts.values())
    return known
