"""The parts of a vision-language model as modules of static shapes: image to features, ids to embeddings, and the decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tokcompile.errors import InputError
from tokcompile.llm.caches import Collecting, cache_name, config_of, last_logits, passing_mask, replaced_attention
from tokcompile.vlm.masks import PromptMasks, Visibility, masked
from tokcompile.vlm.observe import Observed, begun, features_of, layers_of


class Vision(nn.Module):
    """Pixel values of images or videos to features as the language model receives them.

    forward gives {"features": (rows, n, D), "deepstack": [(rows, n, D), ...]}, the latter where the model has such: one row
    an image where all are computed side by side, else one row for all. Beside the pixels it takes what the model makes features
    of too, such as a question, by name. What belongs to the pixel values (grids, image sizes) is that of the example, fixed.
    onto: the placeholder's embedding (D,), where features are added to it.
    """

    def __init__(self, model: nn.Module, seen: Observed, pixels: Tensor, onto: Tensor | None = None):
        super().__init__()
        self.register_buffer("onto", onto, persistent=False)
        self.model, self.whole, self.features = model, seen.whole, seen.source.features
        self.owner, self.behind = seen.owner or "", seen.behind
        named = {PIXELS: pixels, **seen.further}
        self.call = [marked(v, named) for v in seen.args], {k: marked(v, named) for k, v in seen.kwargs.items()}
        if Here(PIXELS) not in [v for v in [*self.call[0], *self.call[1].values()] if isinstance(v, Here)]:
            raise InputError(
                f"{self.features} of {self.owner or 'the model'} is not called with the example's pixel values themselves, but "
                "with something made of them\n  what to do: optimize the vision part by itself, or the whole model"
            )
        self.train(model.training)

    def forward(self, pixel_values: Tensor, **further: Tensor) -> dict[str, Any]:
        args, kwargs = self.call
        inputs = {PIXELS: pixel_values, **further}
        given = [inputs[value.name] if isinstance(value, Here) else value for value in args]
        named = {name: inputs[value.name] if isinstance(value, Here) else value for name, value in kwargs.items()}
        caught: list[Tensor] = []
        with ExitStack() as stack:
            if self.whole is not None:  # before the model cuts the features of all images apart
                module = self.model.get_submodule(self.whole)
                stack.enter_context(module.register_forward_hook(lambda m, a, out: caught.append(out)))
            pooled, deep, _ = features_of(getattr(self.model.get_submodule(self.owner), self.features)(*given, **named))
        features = self.projected(caught[-1] if caught else in_one_row(pooled))
        made: dict[str, Any] = {"features": features if self.onto is None else features + self.onto}
        return made | ({"deepstack": [in_one_row(one) for one in deep]} if deep else {})

    onto: Tensor | None

    def projected(self, features: Tensor) -> Tensor:
        """Behind the module that is given all of them, (rows, n, D), before they are placed, where there is one."""
        if self.behind is None:
            return features
        name, axes = self.behind
        made = self.model.get_submodule(name)(features.flatten(0, 1) if axes == 2 else features)
        return made.reshape(*features.shape[:-1], -1)


class Placed(nn.Module):
    """Pixel values to what the decoder begins with at the placeholders, {"features": (B, n, D)}, of a model without a function
    for features. All else that the model is given is that of the example, fixed, but what it makes features of too.

    spans: of the placeholders.
    """

    def __init__(self, model: nn.Module, seen: Observed, spans: Sequence[tuple[int, int]]):
        super().__init__()
        self.model, self.seen, self.spans = model, seen, tuple(spans)
        self.train(model.training)

    def forward(self, pixel_values: Tensor, **further: Tensor) -> dict[str, Any]:
        embeds = begun(self.model, self.seen, self.seen.kwargs | {self.seen.source.pixels: pixel_values} | further)
        return {"features": torch.cat([embeds[:, start:stop] for start, stop in self.spans], 1)}


def in_one_row(images: Sequence[Tensor]) -> Tensor:
    return (images[0] if len(images) == 1 else torch.cat(list(images)))[None]


PIXELS = "pixel_values"  # what the vision part calls them, whatever they are called in the model


class Here(NamedTuple):
    """Stands for an input of the vision part among the arguments of get_image_features or its like."""

    name: str


def marked(value: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Also where a view of all of one is passed on, as by `pixel_values[:1]`."""
    found = next((name for name, one in inputs.items() if isinstance(value, Tensor) and same_values(value, one)), None)
    return value if found is None else Here(found)


def same_values(a: Tensor, b: Tensor) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride())


class Embeddings(nn.Module):
    """Token ids (B, L) to embeddings (B, L, D); image placeholders get one that is replaced by a feature. words: embeddings
    (D,) of ids that have another one in a prompt with an image than in the table."""

    def __init__(self, model: Any, image_token: int, words: Mapping[int, Tensor] | None = None):
        super().__init__()
        self.table, self.image_token, self.words = model.get_input_embeddings(), image_token, dict(words or {})
        self.outside = image_token >= self.table.weight.shape[0]
        self.train(model.training)

    def forward(self, input_ids: Tensor) -> Tensor:
        known = input_ids.masked_fill(input_ids == self.image_token, 0) if self.outside else input_ids
        return with_words(self.table(known), input_ids, self.words)


def with_words(embeds: Tensor, input_ids: Tensor, words: Mapping[int, Tensor]) -> Tensor:
    """The same (B, L, D) with other embeddings of some ids."""
    for word, row in words.items():
        embeds = torch.where((input_ids == word)[..., None], row.to(embeds), embeds)
    return embeds


class Language(nn.Module):
    """The decoder over a prompt of embeddings, with the keys and values of every layer, as `tokcompile.llm.Prefill` gives
    them.

    inputs_embeds: (B, L, D). position_ids: (B, L), or (axes, B, L) where positions have several axes. attention_mask:
    (B, L), where the prompt may be padded. deepstack: (B, n, D) each, added to the image's tokens behind as many layers as
    `after` says. input_ids: (B, L), where the model makes more of the ids than embeddings, such as inputs of single layers.
    kinds: further arguments of the model, (B, L), with one number for each span and 0 elsewhere.
    """

    def __init__(
        self, model: nn.Module, decoder: str, view: Visibility, spans: Sequence[tuple[int, int]], length: int, *,
        moved: bool = False, all_logits: bool = False, after: Sequence[int] = (),
        kinds: Mapping[str, Sequence[int]] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model, self.decoder, self.spans, self.length = model, decoder, tuple(spans), length
        self.after, self.kinds = tuple(after), dict(kinds or {})
        self.prompt_masks = PromptMasks(length, view, moved)
        self.last = {} if all_logits else last_logits(model)
        self.cache = cache_name(model)
        self.train(model.training)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        deepstack: Sequence[Tensor] | None = None,
        input_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        cache = Collecting()
        positions = position_ids if position_ids.ndim == 2 else None
        masks = self.prompt_masks.masks(positions, attention_mask)
        with (
            Apart(),
            replaced_attention(self.model, lambda original: masked(original, masks, attention_mask)),
            added(self.layers(), self.after, [self.spread(one) for one in deepstack or ()]),
            self.entering(inputs_embeds) if input_ids is not None else nullcontext(),
        ):
            prompt = {"inputs_embeds": inputs_embeds} if input_ids is None else {"input_ids": input_ids}
            out = self.model(
                position_ids=position_ids, attention_mask=passing_mask(), use_cache=True, **prompt, **{self.cache: cache},
                **self.last, **{name: self.kind(inputs_embeds, numbers) for name, numbers in self.kinds.items()},
            )  # fmt: skip
        return {"logits": out.logits, **cache.outputs()}

    def kind(self, inputs_embeds: Tensor, numbers: Sequence[int]) -> Tensor:
        """(B, L) with one number for each span."""
        made = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        for (start, stop), number in zip(self.spans, numbers):
            made[:, start:stop] = number
        return made

    def entering(self, inputs_embeds: Tensor) -> AbstractContextManager[Any]:
        """The decoder is given these embeddings, whatever the model made of the ids."""
        return self.model.get_submodule(self.decoder).register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": inputs_embeds}), with_kwargs=True
        )

    def layers(self) -> nn.ModuleList:
        decoder = self.model.get_submodule(self.decoder)
        return layers_of(decoder, config_of(self.model).num_hidden_layers)

    def spread(self, features: Tensor) -> Tensor:
        """(B, n, D) at the places of the image's tokens, zeros elsewhere: (B, L, D)."""
        parts, at, used = [], 0, 0
        batch, _, width = features.shape
        for start, stop in self.spans:
            parts += [features.new_zeros(batch, start - at, width), features[:, used : used + stop - start]]
            at, used = stop, used + stop - start
        return torch.cat([*parts, features.new_zeros(batch, self.length - at, width)], 1)


class Apart(TorchFunctionMode):
    """`x[0]` is a copy: some rotary embeddings write other axes into it in place, and a graph without in-place ops cannot
    have x change with it while x is still read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.clone() if func is Tensor.__getitem__ and isinstance(args[1], int) else result


@contextmanager
def added(layers: nn.ModuleList, after: Sequence[int], features: Sequence[Tensor]) -> Iterator[None]:
    """What comes behind after[i] layers has features[i] added to it."""
    with ExitStack() as stack:
        for count, one in zip(after, features):
            if count:
                stack.enter_context(layers[count - 1].register_forward_hook(adding(one)))
            else:
                stack.enter_context(layers[0].register_forward_pre_hook(adding_before(one), with_kwargs=True))
        yield


def adding(features: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        if isinstance(result, tuple):
            return (result[0] + features, *result[1:])
        return result + features

    return hook


def adding_before(features: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + features, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + features}

    return hook


def used_only(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
    """A copy of the model that shares its weights and holds only the modules that `run` needs, and what that gave."""
    ran: set[nn.Module] = set()
    with torch.no_grad():
        with ExitStack() as stack:
            for module in model.modules():
                stack.enter_context(module.register_forward_pre_hook(lambda m, args: ran.add(m)))
            want = run(model)
        slim = pruned(model, ran)
        try:
            got = run(slim)
        except Exception:  # it reads from a module that it does not call
            return model, want
    same = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    return (slim if all(torch.equal(a, b) for a, b in same) else model), want


def pruned(module: nn.Module, ran: set[nn.Module]) -> nn.Module:
    """A copy without the branches in which nothing ran; lists stay as long as they are."""
    slim = copy.copy(module)
    whole = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention))  # the last reads a child without a call
    kept = {n: c for n, c in module._modules.items() if c is None or whole or any(m in ran for m in c.modules())}
    slim._modules = {n: c if c is None else pruned(c, ran) for n, c in kept.items()}
    return slim
