"""`tokcompile.vlm.split`: a vision-language model in parts that can be optimized and exported one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokcompile.api import OptimizedModel, ReducedOutput
from tokcompile.errors import InputError, TokcompileError, first_line
from tokcompile.llm.caches import config_of
from tokcompile.passes.calls import is_mixer
from tokcompile.passes.faithful import TOLERANCE, worst
from tokcompile.vlm.kept import seen_by
from tokcompile.vlm.masks import Span, Visibility, check_spans, visibility
from tokcompile.vlm.observe import Observed, Source, begun, further_of, layers_of, observe, source_of
from tokcompile.vlm.parts import Embeddings, Language, Placed, Vision, used_only
from tokcompile.vlm.prompt import Prompt

CLOSE = 1e-5  # of the largest embedding: how near the placed features must be to what the model gave its decoder


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
    positions = seen.position_ids
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    positions = axes(positions, config_of(model))
    positions = positions.expand(*positions.shape[:-2], *ids.shape).contiguous()
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
    features = parts.see(pixels, **seen.further)
    with torch.no_grad():
        embeds = table.module(ids)
    if seen.owner is not None and off_by(seen, features, prompt, embeds) > CLOSE:
        row = embeds[0, found[0][0]]
        added = features | {"features": features["features"] + row}
        if off_by(seen, added, prompt, embeds) <= CLOSE:  # features go onto the placeholder's embedding
            features, parts = added, replace(parts, vision=made._replace(module=vision(slim, row).eval()))
    check_features(seen, features, prompt, embeds)
    if room is not None:
        prompt, old = prompt.with_room(room)
        parts = replace(parts, prompt=prompt, view=view.widened(old, prompt.full))
        ids = torch.stack([torch.tensor([0 if p is None else int(row[p]) for p in old]) for row in ids]).to(ids)
        parts = replace(parts, embeddings=Part(table.module, (), {"input_ids": ids}))
    takes = padded or room is not None or bool((prompt.mask == 0).any())
    if takes and mixer is not None:
        raise InputError(
            f"prompts cannot be padded: {mixer} mixes tokens along the sequence, and would read the padding\n"
            "  what to do: leave out padded= and room= (--room exact), and split once for each length of the text"
        )
    return parts.with_any_language(ids, features, prompt.mask if takes else None)


def words_of(
    model: nn.Module, seen: Observed, inputs: Mapping[str, Any], table: Embeddings, spans: Sequence[Span]
) -> dict[int, Tensor]:
    """Ids that the model embeds otherwise beside an image than its table does, as Ovis 2 those around it, and how: (D,). Where
    the example has any, all are tried that the configuration names, at two places and with two images."""
    ids, pixels = inputs["input_ids"], seen.source.pixels
    image = {p for span in spans for p in range(*span)}
    text = torch.tensor([p for p in range(ids.shape[1]) if p not in image], device=ids.device)
    size, words = table.table.weight.shape[0], {}
    assert seen.embeds is not None
    if seen.embeds.shape[:2] != ids.shape or not len(text) or near(seen.embeds[:, text], table(ids[:, text]), seen.embeds):
        return {}
    named = sorted(i for i in named_ids(config_dict(model)) - {table.image_token} if 0 <= i < size)
    for at in range(0, len(named), len(text)):
        some = torch.tensor(named[at : at + len(text)]).to(ids)
        met = []
        for places, values in ((text, inputs[pixels]), (text.roll(1), inputs[pixels].flip(-2))):
            prompt = ids.index_copy(1, places[: len(some)], some.expand(len(ids), -1))
            try:
                with torch.no_grad():
                    embeds = begun(model, seen, {**inputs, pixels: values, "input_ids": prompt})
            except Exception:  # it wants a video or a sound for one of these ids
                return {}
            met.append(embeds[0, places[: len(some)]])
        for word, plain, one, other in zip(some, table(some[None])[0], *met):
            if torch.equal(one, other) and not near(one, plain, seen.embeds):
                words[int(word)] = one
    return words


def near(a: Tensor, b: Tensor, embeds: Tensor) -> bool:
    return bool((a - b).abs().max() <= CLOSE * embeds.abs().max())


def config_dict(model: nn.Module) -> dict[str, Any]:
    return getattr(getattr(model, "config", None), "to_dict", dict)()


def named_ids(config: Mapping[str, Any]) -> set[int]:
    """The ids of special tokens in a configuration, in nested ones too."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= named_ids(value)
        elif "token_i" in str(name):
            found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found


def kinds_of(seen: Observed, inputs: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, tuple[int, ...]]:
    """What the decoder is given of each token beside embeddings, where it is one number for all of a span and 0 for text: it is
    known for a shorter prompt too, and new tokens need none."""
    kinds = {}
    for name in seen.beside:
        value = inputs.get(name)
        if not isinstance(value, Tensor) or value.is_floating_point() or value.shape != inputs["input_ids"].shape:
            continue
        found = [value[:, start:stop].unique().tolist() for start, stop in spans]
        text = value.clone()
        for start, stop in spans:
            text[:, start:stop] = 0
        if all(len(numbers) == 1 for numbers in found) and not bool(text.any()):
            kinds[name] = tuple(int(numbers[0]) for numbers in found)
    return kinds


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


def axes(positions: Tensor, config: Any) -> Tensor:
    """As whole numbers. Some models pass a row of text positions before the three that their rotary embedding takes."""
    sections = (getattr(config, "rope_parameters", None) or {}).get("mrope_section") or ()
    positions = positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 != len(sections) else positions
    return positions.long() if torch.equal(positions, positions.round()) else positions


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(input_ids, pixel values, attention_mask or None). Raises: InputError."""
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first")
    seen = source_of(inputs).pixels
    ids, pixels, mask = (inputs.get(name) for name in ("input_ids", seen, "attention_mask"))
    for name, value, dims in (("input_ids", ids, "(batch, length)"), (seen, pixels, "of the images of one call")):
        if not isinstance(value, Tensor):
            raise InputError(
                f"the example inputs have no {name} ({', '.join(inputs) or 'they are empty'}): pass {name} {dims}, as a tensor"
            )
    assert isinstance(ids, Tensor)
    assert isinstance(pixels, Tensor)
    if ids.ndim != 2:
        raise InputError(f"input_ids have the shape {tuple(ids.shape)}, and not (batch, length)")
    if mask is not None and tuple(mask.shape) != tuple(ids.shape):
        raise InputError(f"attention_mask has the shape {tuple(mask.shape)}, and input_ids {tuple(ids.shape)}")
    return ids, pixels, mask


def image_token_of(model: Any, given: int | None, source: Source) -> int:
    """The id of the placeholders. Raises: InputError."""
    if given is not None:
        return given
    whole = getattr(model, "config", None)
    for config in (whole, config_of(model), getattr(whole, "vision_config", None)):
        for name in source.tokens:
            found = getattr(config, name, None)
            if isinstance(found, int):
                return found
    raise InputError(f"the configuration names no {source.tokens[0]}: pass image_token=, the id of the placeholders")


def image_spans(ids: Tensor, token: int) -> list[Span]:
    """The runs of placeholders, the same in every sample. Raises: InputError."""
    rows = [runs(row == token) for row in ids.cpu()]
    if not any(rows):
        raise InputError(
            f"no image placeholder (id {token}) was found in the example input_ids\n"
            "  what to do: pass ids as the processor gives them, with one placeholder for each feature, or image_token="
        )
    for i, row in enumerate(rows):
        if row != rows[0]:
            raise InputError(
                f"the images of sample {i} are at {row}, and those of sample 0 at {rows[0]}: spans are static\n"
                "  what to do: pad the texts so that they agree, or split once for each layout"
            )
    return rows[0]


def runs(there: Tensor) -> list[Span]:
    """The (start, stop) of each run of True."""
    steps = torch.diff(there.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    return list(zip((steps == 1).nonzero()[:, 0].tolist(), (steps == -1).nonzero()[:, 0].tolist()))


def finer(found: Sequence[Span], spans: Sequence[Span] | None, length: int) -> list[Span]:
    """The spans that the user names, which have to hold every placeholder and nothing else. Raises: InputError."""
    if spans is None:
        return list(found)
    given = [(int(start), int(stop)) for start, stop in spans]
    check_spans(given, length)
    places = [{p for start, stop in some for p in range(start, stop)} for some in (found, given)]
    if places[0] != places[1]:
        odd = min(places[0] ^ places[1])
        raise InputError(
            f"spans={given} contradict the example: position {odd} is {'an' if odd in places[0] else 'no'} image placeholder; "
            f"the placeholders are at {list(found)}\n  what to do: leave spans out, or divide these"
        )
    return given


def check_logits(seen: Observed, got: Tensor, prompt: Prompt) -> None:
    """Compares the last token's logits of the language part, (B, vocabulary), with the model's. Raises: InputError."""
    want = seen.logits
    if want is None:
        return
    there = prompt.mask[:, -1].bool()  # a row that ends in padding ends in another token
    off = worst([got[there]], [want[there]])
    if off > TOLERANCE.get(want.dtype, CLOSE):
        also = f", which is given {', '.join(seen.beside)} too" if seen.beside else ""
        raise InputError(
            f"the decoder gives other logits on embeddings, positions and masks alone, off by {off:.1e} from the model's "
            f"own{also}\n  what to do: nothing yet; optimize the vision part by itself, or the whole model"
        )


def check_seen(model: nn.Module, seen: Observed, spans: Sequence[Span]) -> None:
    """Raises: InputError where no features of the pixels stand at the placeholders."""
    pixels = seen.source.pixels
    if seen.owner is None and not changed(model, seen, spans, {pixels: seen.kwargs[pixels].flip(-2)}):  # other rows or patches
        given = ", ".join(name for name, value in seen.kwargs.items() if isinstance(value, Tensor))
        raise InputError(
            f"{type(model).__name__} did not call {seen.source.features} on these inputs ({given}), and no "
            f"{pixels} are in what its decoder begins with\n"
            f"  what to do: pass {pixels} and what belongs to them, such as image_grid_thw or image_sizes; a "
            "model whose features do not go into its prompt is optimized as a whole"
        )


def check_question(model: nn.Module, seen: Observed, spans: Sequence[Span], inputs: Mapping[str, Any]) -> None:
    """Raises: InputError where features depend on the text: those of one question would be given for all."""
    where = seen.source.features if seen.owner is not None else type(model).__name__
    ids = inputs["input_ids"]
    if seen.owner is None:
        given = changed(model, seen, spans, {"input_ids": other_text(ids, spans)})
    else:
        given = any(value is ids for value in (*seen.args, *seen.kwargs.values()))
    if given:
        raise InputError(
            f"{where} is given input_ids too: this model looks at an image with the question in mind, so that its vision "
            "part would hold for the example's question alone\n  what to do: optimize the whole model, with use_cache=False, "
            "or its vision tower by itself"
        )


def check_hidden_inputs(model: nn.Module, seen: Observed, spans: Sequence[Span], inputs: Mapping[str, Any]) -> None:
    """Raises: InputError where something is made of a question, or of another form of the image, before features are made of
    it: that of the example would be given for all."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    for name in further_of(tensors).keys() - {*seen.further, seen.source.pixels}:
        if changed(model, seen, spans, {**inputs, name: inputs[name].flip(-1)}):
            raise InputError(
                f"{name} changes the features of the image, and {seen.source.features} is not given it itself, but something "
                "made of it\n  what to do: optimize the whole model, with use_cache=False, or its vision tower by itself"
            )


def check_further(wanted: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises: InputError where the vision part is not given what it takes beside the pixels."""
    for name in sorted(set(wanted) ^ set(given)):
        if name in wanted:
            raise InputError(f"the vision part takes {name} beside the pixels: pass it too, as {name}=")
        raise InputError(f"the vision part takes no {name} ({', '.join(['the pixels', *wanted])})")


def changed(model: nn.Module, seen: Observed, spans: Sequence[Span], inputs: Mapping[str, Any]) -> bool:
    """Whether the decoder begins with something else at the placeholders where these inputs take the place of the example's."""
    with torch.no_grad():
        embeds = begun(model, seen, {**(seen.kwargs if seen.owner is None else {}), **inputs})
    assert seen.embeds is not None
    return any(not torch.equal(embeds[:, start:stop], seen.embeds[:, start:stop]) for start, stop in spans)


def other_text(ids: Tensor, spans: Sequence[Span]) -> Tensor:
    """The same placeholders, and the tokens of the text one place further on."""
    image = {p for span in spans for p in range(*span)}
    text = torch.tensor([p for p in range(ids.shape[1]) if p not in image])
    return ids.index_copy(1, text, ids[:, text].roll(1, 1))


def off_by(seen: Observed, features: Mapping[str, Any], prompt: Prompt, table: Tensor) -> float:
    """How far features and embeddings put together are from what the model gave its own decoder."""
    assert seen.embeds is not None
    with torch.no_grad():
        placed = prompt.assemble(table, features, prompt.position_ids, None)["inputs_embeds"]
    return float((placed - seen.embeds).abs().max() / seen.embeds.abs().max())


def check_features(seen: Observed, features: Mapping[str, Any], prompt: Prompt, table: Tensor) -> None:
    """Compares with what the model gave its own decoder. Raises: InputError."""
    off = off_by(seen, features, prompt, table)
    if not off <= CLOSE:
        raise InputError(
            f"features and embeddings put together are off by {off:.1e} from what the model gives its decoder: it does more "
            "between the two than replacing placeholders\n  what to do: optimize the whole model, with use_cache=False, or the "
            "parts of it one by one"
        )
