"""Generation after a reduced prefill: the same loop over programs in PyTorch and over ONNX files.

Both halves are functions from named tensors to named tensors; a `Wiring` says which output feeds which input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.api import OptimizedModel
from tokcompile.errors import InputError
from tokcompile.llm.caches import config_of
from tokcompile.llm.decode import decode_graph
from tokcompile.llm.layout import Stage, layout, names_of

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Wiring:
    """Which output of which graph feeds which input, and what the host has to know beside; all of it goes to JSON.

    prompt: the prefill's input for the prompt. length: of the prompt, which is also the position of the first token that
    is generated. caches: (layer, prefill output, decode input, decode output), counting layers that attend. kept: (prefill
    output, decode input). states: (prefill output, decode input, decode output) of layers that keep a state of one size.
    inputs: shape and dtype of each of the prefill's inputs. eos: ids that end a text. padded, placed: whether the decode step
    takes the prefill's attention_mask, and its position_ids as `positions`.
    """

    prompt: str
    length: int
    batch: int
    max_new_tokens: int
    logits: str
    inputs: Mapping[str, tuple[tuple[int, ...], str]]
    caches: Sequence[tuple[int, str, str, str]]
    kept: Sequence[tuple[str, str]]
    stages: Sequence[Stage]
    eos: Sequence[int] = ()
    padded: bool = False
    placed: bool = False
    states: Sequence[tuple[str, str, str]] = ()

    def stage_of(self, layer: int) -> Stage:
        return next(s for s in self.stages if s.first <= layer <= s.last)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0, else drawn from the `top_k` likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    seed: int | None = None

    def chooser(self) -> Callable[[Tensor], Tensor]:
        """A function from logits (B, V) to ids (B, 1). Raises: InputError."""
        if self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise InputError(f"temperature={self.temperature}, top_k={self.top_k}: neither may be negative, nor top_k be 0")
        draw = torch.Generator()
        draw.manual_seed(self.seed) if self.seed is not None else draw.seed()

        def choose(logits: Tensor) -> Tensor:
            if self.temperature == 0:
                return logits.argmax(-1, keepdim=True)
            scores = logits.float().cpu() / self.temperature
            if self.top_k is not None and self.top_k < scores.shape[-1]:
                least = scores.topk(self.top_k, -1).values[:, -1:]
                scores = scores.masked_fill(scores < least, float("-inf"))
            return torch.multinomial(scores.softmax(-1), 1, generator=draw).to(logits.device)

        return choose


@dataclass
class Generated:
    """tokens: (B, n) ids, the one that ended a row included, after which come copies of it. seconds: of the prefill with
    the choice of the first token, and of each later step. logits: (B, V) that each token was chosen from, where asked for.
    """

    tokens: Tensor
    seconds: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def first_token_ms(self) -> float:
        return self.seconds[0] * 1000

    @property
    def tokens_per_second(self) -> float | None:
        """Of the decode steps alone, over all rows; None where there was none."""
        return self.tokens.shape[0] * (len(self.seconds) - 1) / sum(self.seconds[1:]) if len(self.seconds) > 1 else None


class Loop:
    """A prefill and the decode step that goes with it, called as one."""

    wiring: Wiring

    def halves(self) -> tuple[Run, Run]:
        """Prefill and decode step as functions of named tensors."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        *,
        max_new_tokens: int | None = None,
        eos: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        keep_logits: bool = False,
        next_position: Tensor | None = None,
        **inputs: Tensor,
    ) -> Generated:
        """Prefill, pad the caches into static buffers, then a step for each token.

        inputs: of the prefill, by name. eos: ids that end a text, the model's by default. next_position: of the first token
        that is generated, (B, 1), where it is not one after the largest of position_ids. Raises: InputError.
        """
        wiring, (prefill, decode) = self.wiring, self.halves()
        count = wiring.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= count <= wiring.max_new_tokens:
            raise InputError(
                f"max_new_tokens={count}: the buffers of this decode step take 1 to {wiring.max_new_tokens} tokens\n"
                "  what to do: make it again with a larger max_new_tokens"
            )
        feeds = check_inputs(wiring, inputs)
        choose = (sampling or Sampling()).chooser()
        ends = torch.tensor(list(wiring.eos if eos is None else eos), dtype=torch.int64)
        begin = time.perf_counter()
        out = prefill(feeds)
        logits = out[wiring.logits][:, -1]
        token = choose(logits)
        seconds = [time.perf_counter() - begin]
        state = start(wiring, feeds, out)
        position = first_position(wiring, feeds, next_position)
        done = torch.isin(token[:, 0].cpu(), ends)
        tokens, all_logits = [token], [logits]
        for step in range(count - 1):
            if done.all():
                break
            begin = time.perf_counter()
            state |= {"token": token, "step": torch.tensor([step], device=token.device), "position_ids": position + step}
            out = decode(state)
            logits = out["logits"][:, -1]
            token = torch.where(done.to(token.device)[:, None], token, choose(logits)) if done.any() else choose(logits)
            state |= {into: out[made] for _, into, made in (*(c[1:] for c in wiring.caches), *wiring.states)}
            seconds.append(time.perf_counter() - begin)
            done = done | torch.isin(token[:, 0].cpu(), ends)
            tokens.append(token)
            if keep_logits:
                all_logits.append(logits)
        return Generated(torch.cat(tokens, 1), seconds, all_logits if keep_logits else [])


class Generator(Loop):
    """A reduced prefill and the decode step that goes with it, in PyTorch.

    prefill: what `tokcompile.optimize` gave for `tokcompile.llm.Prefill(model)` with outputs="reduced". model: that model.
    max_new_tokens: the most tokens that one call may generate; buffers are this much longer than the prefill's caches.

    Raises: InputError, TraceError.

    Example:
        >>> generator = tokcompile.llm.Generator(prefill, model, max_new_tokens=64)                   # doctest: +SKIP
        >>> generator(inputs_embeds=embeds).tokens                                                   # doctest: +SKIP
    """

    def __init__(self, prefill: OptimizedModel, model: nn.Module, *, max_new_tokens: int):
        self.prefill = prefill
        self.decode = decode_graph(model, prefill, max_new_tokens=max_new_tokens)
        self.wiring = wire(prefill, self.decode, model, max_new_tokens)

    def halves(self) -> tuple[Run, Run]:
        return program(self.prefill), program(self.decode)


def wire(prefill: OptimizedModel, decode: OptimizedModel, model: Any, max_new_tokens: int) -> Wiring:
    """How a prefill and its decode step fit together."""
    plan = layout(prefill, max_new_tokens)
    caches = [
        (layer, getattr(plan, kind)[layer], f"{kind}_{layer}", f"new_{kind}_{layer}")
        for kind in ("keys", "values")
        for layer in range(len(plan.keys))
    ]
    kept = [(name, f"kept_{name}") for name in plan.kept if f"kept_{name}" in decode.input_names]
    inputs = {name: (shape, str(dtype).removeprefix("torch.")) for name, (shape, dtype) in plan.inputs.items()}
    return Wiring(
        plan.prompt, plan.length, plan.batch, max_new_tokens, plan.logits, inputs, caches, kept, plan.stages,
        end_of_text(model), "attention_mask" in plan.inputs, "positions" in decode.input_names,
        [(f"states_{name}", f"states_{name}", f"new_states_{name}") for name in plan.states],
    )  # fmt: skip


def end_of_text(model: Any) -> tuple[int, ...]:
    """The ids that end a text, by the model's generation settings, else by its configuration."""
    for config in (getattr(model, "generation_config", None), config_of(model)):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


def program(opt: OptimizedModel) -> Run:
    """An optimized model as a function of named tensors."""
    names = names_of(opt)

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = [feeds[n] if isinstance(v, Tensor) else v for n, v in zip(opt.input_names, opt.example_inputs)]
        opt.check_fixed(flat)
        return {n: v for n, v in zip(names, opt.graph_module(*flat)) if isinstance(v, Tensor)}

    return run


def check_inputs(wiring: Wiring, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All inputs of the prefill, those for a prompt without padding filled in. Raises: InputError."""
    feeds = {name: value for name, value in inputs.items() if value is not None}
    unknown = [name for name in feeds if name not in wiring.inputs]
    if unknown:
        raise InputError(f"the prefill takes {', '.join(wiring.inputs)}, and not {', '.join(unknown)}")
    for name, (shape, dtype) in wiring.inputs.items():
        kind = getattr(torch, dtype)
        if name not in feeds and name == "attention_mask":
            feeds[name] = torch.ones(shape, dtype=kind)
        elif name not in feeds and name == "position_ids" and len(shape) == 2:
            feeds[name] = torch.arange(shape[-1]).expand(shape).contiguous()
        elif name not in feeds:
            raise InputError(f"the prefill's input {name} is missing: {'x'.join(map(str, shape))} {dtype}")
        if tuple(feeds[name].shape) != tuple(shape) or feeds[name].dtype != kind:
            raise InputError(
                f"{name} is {'x'.join(map(str, feeds[name].shape))} {str(feeds[name].dtype).removeprefix('torch.')}, and the "
                f"prefill was compiled for {'x'.join(map(str, shape))} {dtype}\n"
                "  what to do: shapes are static; optimize and export once for each prompt length"
            )
    if (mask := feeds.get("attention_mask")) is not None and mask.ndim == 2:
        check_padding(wiring, mask)
    return feeds


def check_padding(wiring: Wiring, mask: Tensor) -> None:
    """Raises: InputError for a prompt (B, L) that ends in padding, whose logits would be taken, or has some in its image."""
    spans = {(cut.start, cut.start + cut.n * cut.unit) for stage in wiring.stages for cut in stage.cuts}
    ends = (mask.shape[1] - 1, mask.shape[1])
    for start, stop in (ends, *sorted(spans)):
        hidden = (mask[:, start:stop] == 0).nonzero()
        if len(hidden):
            row, at = (int(i) for i in hidden[0])
            what = "the prompt ends in padding" if (start, stop) == ends else f"it is a visual token, of {start} to {stop}"
            raise InputError(
                f"attention_mask[{row}, {start + at}] is 0, and {what}\n"
                "  what to do: pad the text, on its left: visual tokens and the last token have their places"
            )


def first_position(wiring: Wiring, feeds: Mapping[str, Tensor], given: Tensor | None) -> Tensor:
    """The position of the first generated token, (B, 1) or (axes, B, 1): one after the prompt's last, never the length of a
    cache."""
    if "position_ids" not in feeds:
        start = torch.full((wiring.batch, 1), wiring.length, device=feeds[wiring.prompt].device)
        return start if given is None else given
    positions = feeds["position_ids"]
    if given is None:
        largest = positions.amax(-1, keepdim=True)
        given = (largest.amax(0) if largest.ndim == 3 else largest) + 1
    return given.expand(*positions.shape[:-2], wiring.batch, 1)


def start(wiring: Wiring, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the first decode step that come from the prefill. Raises: InputError."""
    state = {}
    for layer, source, into, _ in wiring.caches:
        stage = wiring.stage_of(layer)
        cache = out[source]
        if cache.shape[2] != stage.length:
            raise InputError(
                f"the cache {source} of layer {layer} holds {cache.shape[2]} tokens, and layers {stage.first} to {stage.last} "
                f"hold {stage.length}\n  what to do: take the prefill that this decode step was made for"
            )
        buffer = cache.new_zeros((*cache.shape[:2], stage.capacity, cache.shape[3]))
        buffer[:, :, : stage.length] = cache
        state[into] = buffer
    state |= {into: out[source] for source, into in (*wiring.kept, *(s[:2] for s in wiring.states))}
    state |= {"attention_mask": feeds["attention_mask"]} if wiring.padded else {}
    return state | ({"positions": feeds["position_ids"]} if wiring.placed else {})
