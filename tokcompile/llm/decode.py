"""The graphs of generation: a prefill that returns its caches, and the decode step that goes on after a reduction in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.api import OptimizedModel
from tokcompile.compiler import Analysis, Compiled
from tokcompile.errors import InputError, TokcompileError, TraceError
from tokcompile.llm.caches import Collecting, Slots, attention_over, cache_name, config_of, passing_mask
from tokcompile.llm.layout import Layout, layout
from tokcompile.llm.reach import Reach
from tokcompile.passes.cost import terms
from tokcompile.passes.find import Structure
from tokcompile.passes.fold import fold_constants
from tokcompile.passes.graph import propagate_shapes
from tokcompile.passes.plan import Plan
from tokcompile.passes.trace import trace

WITHOUT_CACHE = {"mlp", "moe"}  # kinds of layers that look at one token at a time


class Prefill(nn.Module):
    """A causal language model that returns the last token's logits and the keys and values of every layer.

    model: of transformers, taking a cache. Optimize it with outputs="reduced".

    Example:
        >>> prefill = tokcompile.llm.Prefill(model)                                                  # doctest: +SKIP
        >>> tokcompile.optimize(prefill, kwargs={"inputs_embeds": embeds}, method="dart", budget=tokcompile.Tokens(64),
        ...                     spans=[(35, 611)], outputs="reduced")                                # doctest: +SKIP
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self.cache = cache_name(model)
        self.train(model.training)

    def forward(
        self,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        cache = Collecting()
        named = ("inputs_embeds", "attention_mask", "position_ids", "input_ids")
        given = zip(named, (inputs_embeds, attention_mask, position_ids, input_ids))
        inputs = {name: v for name, v in given if v is not None} | {self.cache: cache}
        out = self.model(**inputs, use_cache=True, **self.last)
        return {"logits": out.logits, **cache.outputs()}


class Decode(nn.Module):
    """One token in, the next token's logits out; caches go in and come out with the token's entry written.

    layout: of the prefill. step: (1,) how many tokens were decoded before. Which entries a query may see is mostly a matter
    of counting; beside that sliding windows and chunks need `kept`, the prefill's index outputs, and `positions`, its
    position_ids; padding needs its attention mask.
    """

    def __init__(self, model: nn.Module, layout: Layout):
        super().__init__()
        self.model, self.layout = model, layout
        self.padded = "attention_mask" in layout.inputs
        self.reaches: dict[int, Reach | None] = {}
        self.train(model.training)

    def forward(
        self,
        token: Tensor,
        position_ids: Tensor,
        step: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        states: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, Any]:
        stages = self.layout.stages
        slots = [step + stage.length for stage in stages]
        cache = Slots(keys, values, [slots[self.layout.stage_of(at)] for at in range(len(keys))], states or {})
        seen: dict[tuple[int, Reach | None], Tensor] = {}

        def mask(layer: int, reach: Reach | None, keys: Tensor) -> Tensor:
            at = cache.owner(layer, keys)
            if at is None:
                raise cannot_decode(f"layer {layer} attends to keys that no layer put into the cache as they are")
            self.reaches[layer] = reach
            stage, reach = self.layout.stage_of(at), reach if self.hides(reach) else None
            if (stage, reach) not in seen:
                seen[stage, reach] = self.visible(stage, reach, step, kept, attention_mask, positions, position_ids)
            return seen[stage, reach]

        with attention_over(self.model, mask) as layers:
            out = self.model(
                input_ids=token, position_ids=position_ids, use_cache=True, attention_mask=passing_mask(),
                **{cache_name(self.model): cache},
            )  # fmt: skip
        if len(set(layers)) != len(layers) or not {*cache.layers} <= {*layers} or len(cache.layers) != len(keys):
            raise cannot_decode(
                f"attention came by for the layers {layers}, and the prefill has {len(keys)} caches: this model does not call "
                "transformers' attention functions once a layer"
            )
        return {"logits": out.logits, **cache.outputs("new_")}

    def hides(self, reach: Reach | None) -> bool:
        """Whether it ends within the positions that there can be."""
        return reach is not None and reach.size < self.layout.length + self.layout.room

    def visible(
        self, stage: int, reach: Reach | None, step: Tensor, kept: Mapping[str, Tensor] | None, padding: Tensor | None,
        positions: Tensor | None, now: Tensor,
    ) -> Tensor:  # fmt: skip
        """Which entries of a stage the token may attend to, (1 or B, 1, 1, capacity)."""
        here = self.layout.stages[stage]
        made = torch.arange(self.layout.room, device=step.device)[None]
        after = made <= step
        before = torch.ones(1, here.length, dtype=torch.bool, device=step.device)
        if reach is not None or padding is not None:
            rows = here.rows(self.layout.length, kept or {}).to(step.device)
            if reach is not None:
                now, then = self.places(rows, step, positions, now)
                before, after = reach.sees(now, then), after & reach.sees(now, now - step + made)
            if padding is not None:
                before = before & padding.bool().gather(1, rows.expand(padding.shape[0], -1))
        after = after.expand(before.shape[0], -1)
        return torch.cat([before, after], 1)[:, None, None]

    def places(self, rows: Tensor, step: Tensor, positions: Tensor | None, now: Tensor) -> tuple[Tensor, Tensor]:
        """The original positions of the token, (1 or B, 1), and of each entry of the prompt, (1 or B, entries)."""
        if self.layout.axes:
            raise InputError(
                f"a position has {self.layout.axes[0]} numbers in this model, and its sliding windows or chunks count in "
                "one\n  what to do: nothing yet; only models without such can have such positions here"
            )
        if positions is None:
            return (self.layout.length + step)[None], rows
        return now, positions.gather(1, rows.expand(positions.shape[0], -1))

    @property
    def bound(self) -> bool:
        """Whether a window or chunk hides anything, known once it has run."""
        return any(map(self.hides, self.reaches.values()))

    def needed(self) -> list[str]:
        """Which of the prefill's index outputs the masks are made from."""
        if not self.bound and not self.padded:
            return []
        return list(self.layout.kept)


def cannot_decode(what: str) -> TraceError:
    return TraceError(f"{what}\n  what to do: nothing yet; such a model cannot be decoded after a reduced prefill")


def decode_graph(model: nn.Module, prefill: OptimizedModel, *, max_new_tokens: int) -> OptimizedModel:
    """The decode step that goes with an optimized prefill, as a program that calls, exports and builds like one.

    model: the model of the prefill. It is traced with static buffers of prefill length + max_new_tokens in each stage.

    Raises: InputError, TraceError.
    """
    plan = layout(prefill, max_new_tokens)
    check_model(model, plan)
    step = Decode(model, plan).eval()
    example = example_inputs(step)
    rehearse(step, example)
    if step.bound and plan.renumbered:
        raise InputError(
            f"{prefill.plan.method} numbers tokens anew, and sliding windows, which count in positions, end within "
            "the prompt\n  what to do: optimize with renumber=False, which keeps positions as they are"
        )
    example["kept"] = {name: example["kept"][name] for name in step.needed()} or None
    example["states"] = example["states"] or None
    if not step.bound:
        example["positions"] = None
    made = untouched(step, {name: value for name, value in example.items() if value is not None})
    check_fixed(prefill, made)
    return made


def check_fixed(prefill: OptimizedModel, decode: OptimizedModel) -> None:
    """Raises: InputError where Python has read values that tokens decide, such as which expert each one goes to: other tokens
    would be computed like those of the example."""
    if fixed := prefill.frozen or decode.reads:
        raise InputError(
            f"tracing has fixed values that the model computes from the example's tokens, and other tokens have others: "
            f"{fixed[0]}\n  what to do: load a mixture of experts of transformers with experts_implementation='batched_mm' or "
            "'grouped_mm'; one that has no such choice cannot be decoded"
        )


def rehearse(step: Decode, example: dict[str, Any]) -> None:
    """One step at the last position there is, which also shows which layers look through a window. Raises: InputError."""
    try:
        with torch.no_grad():
            logits = step(**example)["logits"]
    except TokcompileError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"the model does not decode a token at position {int(example['position_ids'].max())}: {type(error).__name__}: "
            f"{first}\n  what to do: pass a smaller max_new_tokens if its table of positions ends before; else this model "
            "cannot be decoded after a reduced prefill"
        ) from error
    if logits.dim() != 3:
        raise InputError(
            f"{type(step.model).__name__} gives {tuple(logits.shape)} numbers for a token and no logits of a next one: nothing "
            "can be generated\n  what to do: run the parts of such a model one after the other: parts(pixel_values, input_ids)"
        )


def check_model(model: nn.Module, plan: Layout) -> None:
    """Raises: InputError."""
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first")
    needed = {cache_name(model), "position_ids", "input_ids"}
    missing = needed - set(inspect.signature(model.forward).parameters)
    if missing:
        raise InputError(
            f"{type(model).__name__}.forward takes no {' and no '.join(sorted(missing))}: positions and caches cannot be "
            "passed to it\n  what to do: pass a causal language model of transformers"
        )
    config = config_of(model)
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind not in WITHOUT_CACHE]
    chosen = getattr(config, "index_topk", None)
    odd = {*kinds} - {"full_attention", "sliding_attention", "chunked_attention", *(["indexed_attention"] if chosen else [])}
    if odd and not plan.states:
        raise InputError(
            f"layers of the kind {', '.join(sorted(odd))} keep no plain cache of keys and values\n"
            "  what to do: nothing yet; only full, sliding and chunked attention can be decoded after a reduced prefill"
        )
    scaled = getattr(config, "attn_temperature_tuning", None) and getattr(config, "floor_scale", None)
    if scaled and plan.length + plan.room >= scaled:
        raise InputError(
            f"from token {scaled} on this model scales queries by how many entries its cache has held, which a reduced one "
            "does not tell\n  what to do: a shorter prompt, or a smaller max_new_tokens"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    edge = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    if edge and plan.length <= edge < plan.length + plan.room:
        raise InputError(
            f"from token {edge} on this model turns its keys by other angles, those in a cache too, and a prompt of "
            f"{plan.length} tokens with max_new_tokens={plan.room} goes on beyond it\n  what to do: a smaller max_new_tokens"
        )
    if chosen and plan.length + plan.room > chosen:
        raise InputError(
            f"this model attends to the {chosen} keys that its indexer chooses, and a prompt of {plan.length} tokens with "
            f"max_new_tokens={plan.room} has more\n  what to do: a shorter prompt, or a smaller max_new_tokens"
        )
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    layers = (len(kinds) or getattr(config, "num_hidden_layers", len(plan.keys) + shared)) - shared
    if layers != len(plan.keys) and not plan.states:
        raise InputError(
            f"the prefill returns {len(plan.keys)} caches, and {layers} layers of this model have one: it is another one"
        )


def example_inputs(step: Decode) -> dict[str, Any]:
    plan = step.layout
    weight = next(step.model.parameters())
    room = plan.room

    def buffer(shape: Sequence[int], layer: int) -> Tensor:
        size = (shape[0], shape[1], plan.stages[plan.stage_of(layer)].capacity, shape[3])
        return torch.zeros(size, dtype=plan.dtype, device=weight.device)

    whole: dict[str, Any] = dict(dtype=torch.int64, device=weight.device)
    made: dict[str, Any] = {
        "token": torch.zeros(plan.batch, 1, **whole),
        "position_ids": torch.full((*plan.axes, plan.batch, 1), plan.length + room - 1, **whole),
        "step": torch.full((1,), room - 1, **whole),
        "keys": [buffer(shape, i) for i, (shape, _) in enumerate(plan.shapes)],
        "values": [buffer(shape, i) for i, (_, shape) in enumerate(plan.shapes)],
        "states": {name: torch.zeros(size, dtype=kind, device=weight.device) for name, (size, kind) in plan.states.items()},
        "kept": {name: torch.arange(k, device=weight.device).repeat(plan.batch, 1) for name, k in plan.kept.items()},
    }
    if plan.placed:
        made["positions"] = torch.arange(plan.length, device=weight.device).repeat(plan.batch, 1)
    if step.padded:
        shape, dtype = plan.inputs["attention_mask"]
        made["attention_mask"] = torch.ones(shape, dtype=dtype, device=weight.device)
    return made


def untouched(module: nn.Module, kwargs: dict[str, Any]) -> OptimizedModel:
    """A program without reductions, which is called and exported as an optimized one is; blocks are not looked for."""
    traced = trace(module, (), kwargs)
    fold_constants(traced.gm)  # tables made from sizes that are fixed, by ops that ONNX does not have
    propagate_shapes(traced.gm, traced.inputs)
    plan = Plan("none", outputs="keep")
    return OptimizedModel(Compiled(plan, None, terms(traced.gm.graph, {}), Analysis(traced, traced.gm, Structure())), {})
