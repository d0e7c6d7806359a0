"""One eager run of a whole vision-language model, and what passes between its parts on the way.

No family is named: what counts is the function `get_image_features` (`get_video_features` for videos), else what the decoder
begins with, the module that owns the token embeddings, and the masks that arrive at its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokcompile.errors import InputError, TokcompileError, first_line
from tokcompile.llm.caches import Attention, config_of, eager_attention, last_logits, replaced_attention
from tokcompile.llm.reach import Reach, reach_of
from tokcompile.passes.unchanged import unchanged
from tokcompile.replaced import replaced


@dataclass(frozen=True)
class Source:
    """What is seen. pixels: the input that holds it. features: the function that makes features of it. tokens: what the id of
    its placeholders may be called in a configuration."""

    pixels: str
    features: str
    tokens: tuple[str, ...]


USUAL = {"inputs_embeds", "input_ids", "position_ids", "attention_mask", "cache_position"}  # what any decoder is given
IMAGES = Source("pixel_values", "get_image_features", ("image_token_id", "image_token_index"))
VIDEOS = Source("pixel_values_videos", "get_video_features", ("video_token_id", "video_token_index"))


def source_of(inputs: Mapping[str, Any]) -> Source:
    """Images, or videos where there are such; where neither has its usual name, the largest input of floating-point numbers,
    since others, such as masks, have fewer. Raises: InputError where there are both."""
    images, videos = (isinstance(inputs.get(source.pixels), Tensor) for source in (IMAGES, VIDEOS))
    if images and videos:
        raise InputError(
            f"the example inputs have {IMAGES.pixels} and {VIDEOS.pixels}: images and videos go through different functions of "
            "the model\n  what to do: split once for images and once for videos"
        )
    floats = {n: v.numel() for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if floats and not images and not videos:
        return replace(IMAGES, pixels=max(floats, key=lambda name: floats[name]))
    return VIDEOS if videos else IMAGES


@dataclass
class Observed:
    """source: what is seen. owner: name of the module whose get_image_features or get_video_features ran; None where none
    did, and the decoder begins with what became of the pixels. args, kwargs: of that call, or of the whole model. features:
    one (n, D) an image. whole: name of a module that gives them all side by side, (images, n, D), where there is one. behind:
    name of a module that is given all features before they are placed, and how many axes they have there. deepstack: the same
    as features, for each layer of those that are added inside of the decoder. after: how many layers are behind it there.
    language: name of the decoder. embeds: what it begins with, (B, L, D). decoding: the modules that are called on that, and
    what each gave: the decoder, or its layers where it makes its embeddings itself.
    beside: names of tensors that it is given beside embeddings, positions and a mask. logits: of the last token, (B,
    vocabulary). further: inputs of that call which are another one for each question or image, as are the pixels. fixed: its
    other inputs, which say how the images lie, as image_sizes. masks: (B or 1, L, L) by layer, True where a query sees a key.
    reaches: the window or chunk by layer."""

    source: Source = IMAGES
    owner: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    whole: str | None = None
    behind: tuple[str, int] | None = None
    deepstack: list[list[Tensor]] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    language: str = ""
    embeds: Tensor | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    position_ids: Tensor | None = None
    beside: list[str] = field(default_factory=list)
    logits: Tensor | None = None
    further: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    reaches: dict[int, Reach | None] = field(default_factory=dict)


def observe(model: nn.Module, inputs: Mapping[str, Any]) -> Observed:
    """Runs the model once. Raises: InputError where it is no vision-language model, or does not run."""
    seen = Observed(source_of(inputs), language=decoder_of(model))
    decoder = model.get_submodule(seen.language)
    layers = layers_of(decoder, config_of(model).num_hidden_layers)
    names = [name for name, module in model.named_modules() if module in set(layers)]
    with unchanged(model), ExitStack() as stack:
        for name, module in model.named_modules():
            if callable(getattr(module, seen.source.features, None)):
                stack.enter_context(recorded_features(module, name, seen))
        hooks = [
            decoder.register_forward_pre_hook(lambda m, a, k: entered(seen, k), with_kwargs=True),
            layers[0].register_forward_pre_hook(lambda m, a, k: placed(seen, a, k), with_kwargs=True),
            layers[0].register_forward_hook(lambda m, a, out: decoded(seen, names, out)),
            decoder.register_forward_hook(
                lambda m, a, k, out: decoded(seen, [seen.language], out) if k.get("inputs_embeds") is not None else None,
                with_kwargs=True,
            ),
            *(m.register_forward_pre_hook(partial(given_features, seen, name)) for name, m in model.named_modules()),
        ]
        for hook in hooks:
            stack.enter_context(hook)
        inside = set(decoder.modules())
        stack.enter_context(replaced_attention(model, lambda original: looking(original, inside, seen)))
        try:
            with torch.no_grad():
                logits = getattr(model(**inputs), "logits", None)
        except TokcompileError:
            raise
        except Exception as error:
            raise InputError(
                f"the model does not run on the example inputs: {first_line(error)}\n"
                "  what to do: pass inputs that model(**inputs) accepts, with one image placeholder for each image feature"
            ) from error
    seen.logits = logits[:, -1] if isinstance(logits, Tensor) and logits.dim() == 3 else None
    if seen.owner is None:
        seen.kwargs = {**inputs, **last_logits(model)}
    of_text = inputs["input_ids"].shape if seen.owner is None else None
    given = {
        name: value
        for name, value in inputs.items()
        if name not in (seen.source.pixels, "input_ids")
        and any(value is one for one in (*seen.args, *seen.kwargs.values()))
        and isinstance(value, Tensor)
    }
    seen.further = further_of(given)
    seen.fixed = {name: value for name, value in given.items() if name not in seen.further and value.shape != of_text}
    if seen.embeds is None or not seen.masks:
        raise InputError(
            f"the decoder {seen.language!r} was not called on inputs_embeds, or does not call transformers' attention "
            "functions\n  what to do: nothing yet; optimize the parts of this model one by one"
        )
    return seen


def further_of(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that belong to one question, ids and a mask that is named like them, or are a second form of the image."""
    ids = [name for name in given if name.endswith("_input_ids")]
    masks = [name.replace("input_ids", "attention_mask") for name in ids]
    images = [n for n, value in given.items() if value.is_floating_point() and value.dim() > 2 and not is_mask(value)]
    return {name: value for name, value in given.items() if name in {*ids, *masks, *images}}


def is_mask(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())


def begun(model: nn.Module, seen: Observed, inputs: Mapping[str, Any]) -> Tensor:
    """What the decoder begins with in a call of the model, (B, L, D). It is not run: what it gave stands for its result."""
    met: list[Tensor] = []

    def instead(gave: Any, *args: Any, **kwargs: Any) -> Any:
        met.append(kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0] if args else kwargs["hidden_states"])
        return gave

    with ExitStack() as stack:
        for name, gave in seen.decoding.items():
            stack.enter_context(replaced(model.get_submodule(name), forward=partial(instead, gave)))
        model(**inputs)
    return met[0]


def decoder_of(model: nn.Module) -> str:
    """The name of the module that holds the token embeddings beside a list of layers. Raises: InputError."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} looks at what is seen with an encoder: its image tokens are in no prompt of its decoder\n"
            "  what to do: optimize the encoder, model.get_encoder(), or the whole model with use_cache=False"
        )
    find = getattr(model, "get_input_embeddings", None)
    table = find() if find is not None else None
    layers = getattr(config_of(model), "num_hidden_layers", None)
    for name, module in model.named_modules():
        children = list(module.children())
        if table is not None and table in children and any(isinstance(c, nn.ModuleList) and len(c) == layers for c in children):
            return name
    raise InputError(
        f"{type(model).__name__} has no decoder that this function finds: a module with the token embeddings "
        "(get_input_embeddings) beside a list of num_hidden_layers layers\n  what to do: pass a vision-language model of "
        "transformers that generates, such as LlavaForConditionalGeneration; others are optimized as a whole"
    )


def layers_of(decoder: nn.Module, count: int) -> nn.ModuleList:
    return next(c for c in decoder.children() if isinstance(c, nn.ModuleList) and len(c) == count)


@contextmanager
def recorded_features(module: Any, name: str, seen: Observed) -> Iterator[None]:
    """Notes the call for features that returns first, which is the innermost one."""
    own = getattr(module, seen.source.features)

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs: dict[str, Any] = {}
        with ExitStack() as stack:
            for n, m in module.named_modules(prefix=name):
                stack.enter_context(m.register_forward_hook(partial(noted, outputs, n)))
            result = own(*args, **kwargs)
        if not seen.features:
            seen.owner, seen.args, seen.kwargs = name, args, kwargs
            seen.features, seen.deepstack, seen.after = features_of(result)
            seen.whole = next((n for n, out in outputs.items() if is_all_of(out, seen.features)), None)
        return result

    with replaced(module, **{seen.source.features: call}):
        yield


def given_features(seen: Observed, name: str, module: nn.Module, args: Any) -> None:
    """Notes a projector that is called behind the function for features."""
    between = seen.features and seen.embeds is None and seen.behind is None
    if between and args and holds_all(args[0], seen.features):
        seen.behind = name, args[0].ndim


def noted(outputs: dict[str, Any], name: str, module: nn.Module, args: Any, result: Any) -> None:
    outputs[name] = result


def is_all_of(value: Any, features: list[Tensor]) -> bool:
    """Whether it is all features side by side, (images, n, D)."""
    return holds_all(value, features) and value.ndim == 3 and all(f.shape == value.shape[1:] for f in features)


def holds_all(value: Any, features: list[Tensor]) -> bool:
    """Whether it is all features, one after the other, whatever axes it has in front of their channels."""
    if not features or not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1:] != features[0].shape[-1:]:
        return False
    return value.numel() == sum(f.numel() for f in features) and torch.equal(value.flatten(0, -2), torch.cat(features))


class Features(NamedTuple):
    """pooled: of each image, (n, D). deep: those for the decoder's inside, by layer and image. after: how many layers of the
    decoder are behind it where each of these is added."""

    pooled: list[Tensor]
    deep: list[list[Tensor]]
    after: list[int]


def features_of(result: Any) -> Features:
    """What a function for features gave. Raises: InputError."""
    given = getattr(result, "deepstack_features", None) or []
    numbered = all(isinstance(one, tuple) and isinstance(one[0], int) for one in given)
    deep = [list(one[1] if numbered else one) for one in given]
    after = [one[0] for one in given] if numbered else list(range(1, len(deep) + 1))
    pooled = getattr(result, "pooler_output", result)
    pooled = getattr(result, "last_hidden_state", None) if pooled is None else pooled
    if pooled is None and deep:  # the placeholders are made zero, and all is added inside
        pooled = [torch.zeros_like(one) for one in deep[0]]
    if pooled is None:
        raise InputError(
            f"the model's function for features gives {', '.join(result)}, and neither pooler_output nor last_hidden_state\n"
            "  what to do: optimize the whole model"
        )
    return Features([pooled] if isinstance(pooled, Tensor) and pooled.dim() == 2 else list(pooled), deep, after)


def entered(seen: Observed, kwargs: Mapping[str, Any]) -> None:
    if seen.embeds is None:
        seen.embeds, seen.position_ids = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        seen.beside = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in USUAL]


def placed(seen: Observed, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Where the decoder places the features itself, its first layer is given what others are called on."""
    if seen.embeds is None:
        seen.embeds = args[0] if args else kwargs.get("hidden_states")
        seen.position_ids = kwargs.get("position_ids") if seen.position_ids is None else seen.position_ids


def decoded(seen: Observed, names: list[str], result: Any) -> None:
    seen.decoding = dict.fromkeys(names, result)


def looking(original: Attention | None, inside: set[nn.Module], seen: Observed) -> Attention:
    """The attention as it was, which notes the mask on its way."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if module in inside:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
            seen.masks[layer] = visible(attention_mask, query.shape[2], query.device, causal is not False)
            seen.reaches[layer] = reach_of(module, kwargs.get("sliding_window"))
        return (original or eager_attention(module))(module, query, key, value, attention_mask, **kwargs)

    return attend


def visible(mask: Tensor | None, length: int, device: torch.device, causal: bool = True) -> Tensor:
    """A mask as transformers hands it over, as (B or 1, L, L) booleans; none at all means a causal one, or that all see all."""
    if mask is None:
        everything = torch.ones(1, length, length, dtype=torch.bool, device=device)
        return everything.tril() if causal else everything
    mask = mask[:, 0, :, :length]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
