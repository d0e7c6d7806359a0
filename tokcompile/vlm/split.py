"""`tokcompile.vlm.split`: a vision-language model in parts that can be optimized and exported one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokcompile.api import OptimizedModel, ReducedOutput
from tokcompile.errors import InputError, TokcompileError, first_line
from tokcompile.llm.caches import config_of
from tokcompile.passes.calls import is_mixer
from tokcompile.vlm.checks import (
    CLOSE,
    check_features,
    check_further,
    check_hidden_inputs,
    check_logits,
    check_question,
    check_seen,
    off_by,
)
from tokcompile.vlm.example import check_inputs, finer, image_spans, image_token_of, kinds_of, positions_of
from tokcompile.vlm.kept import seen_by
from tokcompile.vlm.masks import Span, Visibility, visibility
from tokcompile.vlm.observe import Observed, layers_of, observe, source_of
from tokcompile.vlm.parts import Embeddings, Language, Placed, Vision, used_only
from tokcompile.vlm.prompt import Prompt
from tokcompile.vlm.words import words_of


class Part(NamedTuple):
    """A module with its example inputs, as `tokcompile.optimize(*part, ...)` takes them."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Parts:
    """A vision-language model in parts.

    vision: pixel values to image features. embeddings: ids to embeddings. language: embeddings to logits and caches.
    prompt: where the image's tokens are, and the positions of all. spans: those of the image in the prompt that the
    language part takes. model: the whole model. causal: name of the module in it that runs on embeddings, with which tokens are
    decoded; "" where that is the model itself. kinds: what the decoder is told of each span, by name, and 0 of all text.
    optimized: the vision part after reduction, where there is one.
    """

    model: nn.Module
    vision: Part
    embeddings: Part
    language: Part
    prompt: Prompt
    optimized: OptimizedModel | None
    seen: Observed
    view: Visibility
    all_logits: bool
    causal: str = ""
    kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        pixels, length = tuple(self.vision.args[0].shape), self.prompt.full_length
        image = sum(stop - start for start, stop in self.prompt.full)
        left = f"; {self.prompt.length} tokens are left after {self.optimized.plan.method}" if self.optimized else ""
        return (
            f"{type(self.model).__name__} in parts: vision, pixel values {pixels} to features; language, a prompt of {length} "
            f"tokens, {image} of the image{'s' * (len(self.prompt.full) > 1)}{left}"
        )

    @property
    def spans(self) -> list[Span]:
        return list(self.prompt.spans)

    @property
    def position_ids(self) -> Tensor:
        """Of the whole prompt: (B, L), or (axes, B, L)."""
        return self.prompt.position_ids

    @property
    def next_position(self) -> Tensor:
        """Of the first token that is generated, (B, 1); it is not the number of tokens in a cache."""
        return self.prompt.next_position

    @property
    def further(self) -> list[str]:
        """Names of what the vision part takes beside the pixels, such as qformer_input_ids."""
        return list(self.vision.kwargs)

    @property
    def words(self) -> dict[int, Tensor]:
        """Embeddings (D,) of ids that have another one beside an image than when they are generated."""
        return self.embeddings.module.words if isinstance(self.embeddings.module, Embeddings) else {}

    def see(self, pixel_values: Tensor, **further: Tensor) -> dict[str, Any]:
        """What the vision part, reduced or not, gives: features, deepstack, and kept where fewer are left: which of the
        image's tokens they stand for, (B, k). further: what it takes beside the pixels. Raises: InputError."""
        check_further(self.further, further)
        with torch.no_grad():
            out = (self.optimized or self.vision.module)(pixel_values, **further)
        made, indices = out if isinstance(out, ReducedOutput) else (out, {})
        optimized = self.optimized
        return seen_by(self.prompt, made, indices, optimized.kept_of if optimized is not None else {})

    def language_inputs(
        self, input_ids: Tensor, seen: Mapping[str, Any], attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        """The inputs of the language part. seen: what `see` gave. Raises: InputError where they do not fit the prompt."""
        embeds = self.embeddings.module(self.prompt.check(input_ids))
        return self.prompt.inputs(embeds, seen, attention_mask, self.padded, input_ids if self.takes_ids else None)

    @property
    def grids(self) -> list[list[int]]:
        """(frames, rows, columns) of each image's patches in a sample, where the model is told them."""
        grids = [v for v in (*self.seen.args, *self.seen.kwargs.values()) if isinstance(v, Tensor) and v.shape[1:] == (3,)]
        return grids[0][: len(grids[0]) // self.prompt.mask.shape[0]].tolist() if grids else []

    @property
    def padded(self) -> bool:
        """Whether the language part takes an attention mask."""
        return "attention_mask" in self.language.kwargs

    @property
    def causal_model(self) -> nn.Module:
        """Embeddings to logits, with a cache."""
        return self.model.get_submodule(self.causal)

    @property
    def takes_ids(self) -> bool:
        """Whether the language part takes ids beside embeddings."""
        return "input_ids" in self.language.kwargs

    def __call__(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **further: Tensor
    ) -> dict[str, Any]:
        """The parts one after the other, in PyTorch: logits, keys and values of the prompt."""
        with torch.no_grad():
            inputs = self.language_inputs(input_ids, self.see(pixel_values, **further), attention_mask)
            return dict(self.language.module(**inputs))

    def after(self, vision: OptimizedModel, *, renumber: bool = False) -> Parts:
        """The parts behind a vision part that gives fewer features: the prompt shrinks to the tokens that are left.

        vision: what `tokcompile.optimize(*parts.vision, outputs="reduced", ...)` gave. renumber: whether the tokens get
        positions without gaps, as VisionZip or PruMerge are published; by default they keep their positions.

        Raises: InputError, UnsupportedGraph.
        """
        first = replace(self, optimized=vision)
        features = first.see(*self.vision.args, **self.vision.kwargs)
        prompt = self.prompt.shortened(features.get("kept"), renumber)
        short = replace(first, prompt=prompt, view=self.view.shortened(self.prompt.spans, prompt.rows(None)[0].tolist()))
        mask = self.prompt.mask if self.padded else None
        return short.with_language(self.embeddings.kwargs["input_ids"], features, mask, self.takes_ids)

    def with_any_language(self, input_ids: Tensor, features: Mapping[str, Any], attention_mask: Tensor | None) -> Parts:
        """With the language part over this prompt: the model on embeddings; on ids too, where its decoder is given more than
        embeddings; or a language model inside of it. Raises: InputError."""
        try:
            return self.with_language(input_ids, features, attention_mask)
        except InputError:
            inside = causal_inside(self.model, self.seen.language)
            if self.seen.beside:
                with suppress(InputError):
                    return self.with_language(input_ids, features, attention_mask, ids_too=True)
            if inside:
                with suppress(InputError):
                    return replace(self, causal=inside).with_language(input_ids, features, attention_mask)
            raise

    def with_language(
        self, input_ids: Tensor, features: Mapping[str, Any], attention_mask: Tensor | None, ids_too: bool = False
    ) -> Parts:
        """With the language part over this prompt. Raises: InputError where it does not run, or gives other logits."""
        with torch.no_grad():
            embeds, ids = self.embeddings.module(input_ids), input_ids if ids_too else None
            inputs = self.prompt.assemble(embeds, features, self.prompt.position_ids, attention_mask, ids)

        def make(model: nn.Module) -> Language:
            return Language(
                model, self.seen.language.removeprefix(f"{self.causal}."), self.view, self.prompt.spans, self.prompt.length,
                moved=attention_mask is not None or self.optimized is not None, all_logits=self.all_logits,
                after=self.seen.after, kinds=self.kinds,
            )  # fmt: skip

        try:
            slim, made = used_only(self.causal_model, lambda model: make(model)(**inputs))
        except TokcompileError:
            raise
        except Exception as error:  # its forward wants ids, or what is seen, too; or gives no logits
            raise InputError(
                f"the model does not run on embeddings alone, as a language model with a cache: {first_line(error)}\n"
                "  what to do: optimize the parts of it one by one, or the whole model"
            ) from error
        if self.optimized is None:
            check_logits(self.seen, made["logits"][:, -1], self.prompt)
        return replace(self, language=Part(make(slim).eval(), (), inputs))


def split(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    image_token: int | None = None,
    spans: Sequence[Span] | None = None,
    padded: bool | None = None,
    room: Sequence[int] | None = None,
    all_logits: bool = False,
) -> Parts:
    """Takes a vision-language model apart.

    model: of transformers, or alike: with get_input_embeddings and a decoder, in eval mode; with get_image_features
    (get_video_features for videos), or one that puts what it makes of the pixels in the place of the placeholders. inputs: an
    example call, with pixel_values (pixel_values_videos), input_ids and what the model takes beside; it fixes all shapes and
    the places of the images. Pixels of another name are the largest input of floating-point numbers. image_token: id of the
    placeholders of what is seen, the configuration's by default. spans: a finer division of the image's tokens, such as one
    span a tile. padded: whether prompts may be padded; by default if the example is. room: how many tokens of text there may be
    before, between and after the images, which shorter texts are padded to, each on its left; as in the example by default.
    all_logits: logits of all tokens and not of the last one alone.

    Raises: InputError, UnsupportedGraph.

    Example:
        >>> parts = tokcompile.vlm.split(model, inputs)                                              # doctest: +SKIP
        >>> prefill = tokcompile.optimize(*parts.language, method="dart", budget=tokcompile.Tokens(64),
        ...                               spans=parts.spans, outputs="reduced")                      # doctest: +SKIP
    """
    ids, pixels, mask = check_inputs(model, inputs)
    token = image_token_of(model, image_token, source_of(inputs))
    found = image_spans(ids, token)
    seen = observe(model, inputs)
    check_seen(model, seen, found)
    check_question(model, seen, found, inputs)
    check_hidden_inputs(model, seen, found, inputs)
    view = visibility(seen, mask, found)
    positions = positions_of(seen, ids, config_of(model))
    mixer = mixer_of(model.get_submodule(seen.language), config_of(model).num_hidden_layers)
    prompt = replace(Prompt.of(ids, token, finer(found, spans, ids.shape[1]), positions, mask), in_order=mixer is not None)

    def vision(model: nn.Module, onto: Tensor | None = None) -> nn.Module:
        return Placed(model, seen, found) if seen.owner is None else Vision(model, seen, pixels, onto)

    slim, _ = used_only(model, lambda m: vision(m)(pixels, **seen.further))
    made = Part(vision(slim).eval(), (pixels,), dict(seen.further))
    words = words_of(model, seen, inputs, Embeddings(model, token), found)
    seen.decoding = {} if seen.owner is not None else seen.decoding  # it holds a cache, and is not read again
    table = Part(Embeddings(model, token, words).eval(), (), {"input_ids": ids})
    if padded is False and (room is not None or bool((prompt.mask == 0).any())):
        raise InputError("padded=False, and the example has padding or room for some: leave one of the two out")
    kinds = kinds_of(seen, inputs, prompt.full)
    parts = Parts(model, made, table, made, prompt, None, seen, view, all_logits, kinds=kinds)
    parts, features = compared(parts, lambda row: made._replace(module=vision(slim, row).eval()))
    if room is not None:
        parts = with_room(parts, room)
    takes = padded or room is not None or bool((parts.prompt.mask == 0).any())
    if takes and mixer is not None:
        raise InputError(
            f"prompts cannot be padded: {mixer} mixes tokens along the sequence, and would read the padding\n"
            "  what to do: leave out padded= and room= (--room exact), and split once for each length of the text"
        )
    return parts.with_any_language(parts.embeddings.kwargs["input_ids"], features, parts.prompt.mask if takes else None)


def compared(parts: Parts, onto: Callable[[Tensor], Part]) -> tuple[Parts, dict[str, Any]]:
    """The parts, of which the vision part gives what the decoder was given in the example, and what that is.

    onto: the vision part that adds this embedding to its features: that of the placeholders, onto which some models add them.
    Raises: UnsupportedGraph.
    """
    seen, prompt = parts.seen, parts.prompt
    features = parts.see(*parts.vision.args, **parts.vision.kwargs)
    with torch.no_grad():
        embeds = parts.embeddings.module(**parts.embeddings.kwargs)
    off = off_by(seen, features, prompt, embeds)
    if seen.owner is not None and off > CLOSE:
        row = embeds[0, prompt.full[0][0]]
        added = features | {"features": features["features"] + row}
        if (less := off_by(seen, added, prompt, embeds)) <= CLOSE:
            off, features, parts = less, added, replace(parts, vision=onto(row))
    check_features(off)
    return parts, features


def with_room(parts: Parts, room: Sequence[int]) -> Parts:
    """With padding in the example, so that each text may be so long."""
    prompt, old = parts.prompt.with_room(room)
    ids = parts.embeddings.kwargs["input_ids"]
    ids = torch.stack([torch.tensor([0 if p is None else int(row[p]) for p in old]) for row in ids]).to(ids)
    table = parts.embeddings._replace(kwargs={"input_ids": ids})
    return replace(parts, prompt=prompt, view=parts.view.widened(old, prompt.full), embeddings=table)


def causal_inside(model: nn.Module, decoder: str) -> str:
    """Name of the smallest module around a decoder that has output embeddings; "" where that is the model itself."""
    parts = decoder.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        find = getattr(model.get_submodule(name), "get_output_embeddings", None)
        if find is not None and find() is not None:
            return name
    return ""


def mixer_of(decoder: nn.Module, layers: int) -> str | None:
    """The first module in the decoder's layers that mixes tokens along the sequence; beside them there may be a tower."""
    inside = set(layers_of(decoder, layers).modules())
    return next((name for name, module in decoder.named_modules() if module in inside and is_mixer(module)), None)
