"""The decode step that goes on after a reduced prefill, as a program: traced, compared, and refused where it would be wrong."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tokcompile.api import OptimizedModel
from tokcompile.compiler import Analysis, Compiled
from tokcompile.errors import InputError, TokcompileError, TraceError, first_line
from tokcompile.llm.caches import AttendsItself, cache_name, config_of
from tokcompile.llm.layout import Layout, layout
from tokcompile.llm.modules import Decode, Step, check_takes
from tokcompile.llm.short_text import decodes
from tokcompile.llm.unreduced import WAY_OUT, WholeDecode, shortened
from tokcompile.passes.cost import terms
from tokcompile.passes.find import Structure
from tokcompile.passes.fold import fold_constants
from tokcompile.passes.graph import propagate_shapes
from tokcompile.passes.plan import Plan
from tokcompile.passes.trace import Traced, trace

WITHOUT_CACHE = {"mlp", "moe"}  # kinds of layers that look at one token at a time


def decode_graph(model: nn.Module, prefill: OptimizedModel, *, max_new_tokens: int) -> OptimizedModel:
    """The decode step that goes with an optimized prefill, as a program that calls, exports and builds like one.

    model: the model of the prefill. It is traced with static buffers of prefill length + max_new_tokens in each stage.

    Raises: InputError, TraceError, UnsupportedGraph.
    """
    plan = layout(prefill, max_new_tokens)
    check_model(model, plan)
    example = example_inputs(model, plan)
    step = masked_step(model, plan, example)
    if step is None:
        return whole_decode_graph(model, prefill, plan, example)
    if step.bound and plan.renumbered:
        raise counts_positions(prefill, "sliding windows, which count in positions, end within the prompt")
    example["kept"] = {name: example["kept"][name] for name in step.needed()}
    if not step.bound:
        example["positions"] = None
    return checked(prefill, untouched(folded(every_step(step, example))))


def checked(prefill: OptimizedModel, decode: OptimizedModel) -> OptimizedModel:
    """Raises: InputError where Python has read values that tokens decide, such as which expert each one goes to: other tokens
    would be computed like those of the example."""
    if fixed := prefill.frozen or decode.fixed_behind(set(decode.input_names) - {"position_ids", "step"}):
        raise InputError(
            f"tracing has fixed values that the model computes from the example's tokens, and other tokens have others: "
            f"{fixed[0]}\n  what to do: load a mixture of experts of transformers with experts_implementation='batched_mm' or "
            "'grouped_mm'; one that has no such choice cannot be decoded"
        )
    return decode


def masked_step(model: nn.Module, plan: Layout, example: dict[str, Any]) -> Decode | None:
    """The step in which the model is told what a token may see; None for a model that has to find that out by itself."""
    step = Decode(model, plan).eval()
    try:
        rehearse(step, example)
        return None if decodes(Decode, model, plan) is False else step
    except AttendsItself:
        return None
    except InputError as error:
        if error.__cause__ is None or plan.renumbered:
            raise
        return None  # it may have refused the mask that passes through others, such as one that is no mask for all entries


def whole_decode_graph(model: nn.Module, prefill: OptimizedModel, plan: Layout, example: dict[str, Any]) -> OptimizedModel:
    """The decode step of such a model."""
    if plan.renumbered:
        raise counts_positions(prefill, "this model makes masks and biases itself, from places in the whole prompt")
    example["positions"] = None
    return checked(prefill, untouched(shortened(every_step(whole_step(model, plan, example), example), plan)))


def whole_step(model: nn.Module, plan: Layout, example: dict[str, Any]) -> WholeDecode:
    """The step in which the model is told the token's position or, where it counts from another number than 0, is not.

    Raises: InputError, TraceError.
    """
    can_be_told = "position_ids" in inspect.signature(model.forward).parameters
    right: bool | None = None
    for told in (True,) * can_be_told + (False,) * ("position_ids" not in plan.inputs):
        make = partial(WholeDecode, told=told)
        step = make(model, plan).eval()
        rehearse(step, example)
        right = decodes(make, model, plan)
        if right:
            return step
    if right is None:
        raise InputError(
            f"{type(model).__name__} makes masks and biases itself, and whether it does so right in static buffers is seen "
            "only when it runs on a few ids: it has no weights, or does not take ids alone\n  what to do: load its weights"
        )
    raise TraceError(
        f"{type(model).__name__} gives a token other logits after what is in a static buffer than without a cache: it makes "
        f"masks, biases or positions from something that a reduced cache does not have\n  what to do: {WAY_OUT}"
    )


def counts_positions(prefill: OptimizedModel, why: str) -> InputError:
    return InputError(
        f"{prefill.plan.method} numbers tokens anew, and {why}\n"
        "  what to do: optimize with renumber=False, which keeps positions as they are"
    )


def rehearse(step: Step, example: dict[str, Any]) -> None:
    """One step at the last position there is, which also shows which layers look through a window.

    Raises: InputError, AttendsItself.
    """
    try:
        with torch.no_grad():
            logits = step(**{name: value for name, value in example.items() if value is not None})["logits"]
    except (TokcompileError, AttendsItself):
        raise
    except Exception as error:
        raise InputError(
            f"the model does not decode a token at position {int(example['position_ids'].max())}: {first_line(error)}"
            "\n  what to do: pass a smaller max_new_tokens if its table of positions ends before; else this model "
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
    check_takes(model, {cache_name(model), "input_ids"})
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
    if layers < len(plan.keys) and not plan.states:
        raise InputError(
            f"the prefill returns {len(plan.keys)} caches, and {layers} layers of this model have one: it is another one"
        )


def example_inputs(model: nn.Module, plan: Layout) -> dict[str, Any]:
    weight = next(model.parameters())
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
    if "attention_mask" in plan.inputs:
        shape, dtype = plan.inputs["attention_mask"]
        made["attention_mask"] = torch.ones(shape, dtype=dtype, device=weight.device)
    return made


def every_step(step: Step, example: Mapping[str, Any]) -> Traced:
    """The traced step. Raises: TraceError where what tracing fixed from the example does not hold at another step."""
    given = {name: value for name, value in example.items() if value is not None and value != {}}
    traced = trace(step, (), given)
    last = step.layout.room - 1
    for now in range(last) if traced.checks else ():
        moved = {"position_ids": given["position_ids"] - last + now, "step": torch.full_like(given["step"], now)}
        inputs = pytree.tree_leaves({**given, **moved})
        for check in traced.checks:
            try:
                check(inputs)
            except InputError as error:
                raise TraceError(
                    f"token {now} is not decoded as token {last} is: {str(error).splitlines()[0]}\n  what to do: a prompt and "
                    "a max_new_tokens for which it is; else this model cannot be decoded after a reduced prefill"
                ) from error
    return traced


def folded(traced: Traced) -> Traced:
    """Constants are computed: tables made from sizes that are fixed, by ops that ONNX does not have."""
    fold_constants(traced.gm)
    propagate_shapes(traced.gm, traced.inputs)
    return traced


def untouched(traced: Traced) -> OptimizedModel:
    """A program without reductions, which is called and exported as an optimized one is; blocks are not looked for."""
    plan = Plan("none", outputs="keep")
    return OptimizedModel(Compiled(plan, None, terms(traced.gm.graph, {}), Analysis(traced, traced.gm, Structure())), {})
