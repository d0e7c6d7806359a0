"""What a token-reduction method is: a value that names no model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.steps import Steps

TAPS = (
    "x", "normed", "q", "k", "v", "rotated_k", "cls_attention", "received_attention", "last_attention", "earlier_attention",
    "earlier_cls_attention", "text_attention", "scores", "embeds", "text_embeds", "text_seen",
)  # fmt: skip

OF_ALL = ("renumber", "drop_layer")  # options that every method has, in a language model

# what options take, by the type of their default: plans are JSON, which makes lists of tuples
KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"), int: (int, "an int"), float: ((int, float), "a number"), str: (str, "text"),
    tuple: ((tuple, list), "a tuple"), list: ((tuple, list), "a list"),
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """Where a reduction stands; everything here is known at compile time.

    n, k: tokens going in and coming out, without prefix and suffix. prefix, suffix: protected tokens around them.
    step, steps: which of the method's reductions this is. block, depth: which block of how many in its stack.
    grid: (rows, columns) while the tokens still are the whole patch grid in raster order, else None.
    start: where the n tokens begin in `Tokens.whole`. text: the (start, stop) of the text tokens there; empty in a vision
    tower. segments: of each sample so many run through the plan one after the other, as samples of their own (see
    `Recipe.together`); prefix and suffix are then those of the first. options: the method's options, defaults filled in.
    """

    n: int
    k: int
    prefix: int = 0
    suffix: int = 0
    step: int = 0
    steps: int = 1
    block: int = 0
    depth: int = 1
    grid: tuple[int, ...] | None = None
    start: int = 0
    text: tuple[tuple[int, int], ...] = ()
    segments: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def anywhere(site: Site) -> Any:
    """`Recipe.together` of a plan that does not look at where its tokens stand."""
    return None


@dataclass(frozen=True)
class Tokens:
    """What a plan may read, restricted to the n reducible tokens; only the taps that a recipe names are there.

    x: (B, n, D) residual stream. normed: (B, n, D) the same after the model's final norm. q, k, v: (B, H, n, d) of the
    attention last computed, before any rotary embedding; rotated_k: (B, H, n, d) the keys after it. cls_attention:
    (B, H, n) the softmax row of the class token; last_attention: (B, H, n) that of the last token. received_attention:
    (B, H, n) mean over all queries; earlier_attention: the same of the block that `Recipe.earlier` names.
    earlier_cls_attention: (B, E, n) the row of the class token, mean over heads in float32, of each block from that one on.
    text_attention: (B, H, T, n) rows of the T text tokens after these; where there is no text one row, the mean over all
    queries. scores: (B, H, L, L) before the softmax, scaled and masked. embeds: (B, n0, D) these tokens as they came into
    the first block, before any reduction; text_embeds: (B, T', D) all text tokens there; both None where there is no text.
    text_seen: (B or 1, T') 1 for these, 0 for those that a mask hides, as padding; None where no mask may hide some. Such
    tokens have no norm in `whole.rotated_k`.
    size: (B, n) original tokens in each, float32, where tracked. whole: the same taps over the whole sequence of L
    tokens, `site.start` of which come before these n; None where tokens are in groups, and where segments are a batch.
    """

    x: Tensor
    size: Tensor | None = None
    normed: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    cls_attention: Tensor | None = None
    received_attention: Tensor | None = None
    rotated_k: Tensor | None = None
    last_attention: Tensor | None = None
    earlier_attention: Tensor | None = None
    earlier_cls_attention: Tensor | None = None
    text_attention: Tensor | None = None
    scores: Tensor | None = None
    embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    text_seen: Tensor | None = None
    whole: Tokens | None = None


@dataclass(frozen=True)
class Keep:
    """Pruning: the tokens `index`: (B, k), in this order; ordered says that they ascend.

    extra: (B, e, n) makes e more tokens, each a weighted sum of the n; `index` then names k - e kept tokens followed by
    one representative per extra token (it lends its position). assign: (B, n) which of the k stands for each of the n in a
    dense output; the most similar one where it is None.
    """

    index: Tensor
    ordered: bool = True
    extra: Tensor | None = None
    assign: Tensor | None = None


@dataclass(frozen=True)
class Merge:
    """Hard merging: `sources`: (B, n - k) join the kept tokens at `slots`: (B, n - k), positions within `index`: (B, k).

    joins: (B, n - k) float32, 1 where a source joins and 0 where it is dropped; None where all of them join.
    """

    index: Tensor
    sources: Tensor
    slots: Tensor
    joins: Tensor | None = None


@dataclass(frozen=True)
class Mix:
    """Soft merging: new tokens are `weights @ x`, weights: (B, k, n); `index`: (B, k) lends each one its position.

    positions: (B, k, P) lends each one P positions: a rotary embedding's frequencies are shared out over them in order.
    """

    index: Tensor
    weights: Tensor
    positions: Tensor | None = None


Plan = Callable[[Tokens, Site], Keep | Merge | Mix]


@dataclass(frozen=True)
class Recipe:
    """A method: which tensors it reads, where it stands, how many it keeps, which tokens, and how they are combined.

    name: how users call it. plan: plain PyTorch on static shapes; for every input it must return the same shapes.
    taps: what `plan` reads, from `tokcompile.recipe.TAPS`. place: "attention" (between attention and MLP) or "block" (at
    a block's entrance); language_place: the same in a language model, where it differs there. ahead: at a block's
    entrance, whether attention is that of this block, computed beforehand, instead of the block before's. opening:
    whether it may stand before any attention; `plan` then gets `x` alone. earlier(depth, options): the block whose
    attention is `earlier_attention`, or the first of those of `earlier_cls_attention`. steps: at which blocks, and how the
    budget spreads over them. track_size: whether tokens carry how many original ones they hold. proportional: whether
    attention weighs keys by that size. renumber(step, options): whether, in a language model, tokens get new positions
    without gaps after that reduction, if the user does not say by renumber=True or False. together(site): what `plan` looks
    at of the place of a segment (images or windows in one sequence); those side by side for which it is equal go through
    `plan` as one batch. None where each goes by itself, as it has to where `plan` reads `whole`. options: names and defaults
    of the method's own options, which take values of the same kind (any where the default is None); `least(n, options)` says
    how few of n tokens one step may leave. paper: the source.

    Example:
        >>> import torch, tokcompile
        >>> def loudest(tokens, site):
        ...     return tokcompile.Keep(tokcompile.primitives.top_k(tokens.x.norm(dim=-1), site.k))
        >>> loud = tokcompile.Recipe("loudest", loudest, steps=tokcompile.steps.once(0.5))
    """

    name: str
    plan: Plan
    taps: tuple[str, ...] = ("x",)
    place: str = "attention"
    language_place: str | None = None
    ahead: bool = False
    opening: bool = False
    earlier: Callable[[int, Mapping[str, Any]], int] | None = None
    steps: Steps = field(default_factory=Steps)
    track_size: bool = False
    proportional: bool = False
    renumber: Callable[[int, Mapping[str, Any]], bool] = lambda step, options: False
    together: Callable[[Site], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    least: Callable[[int, Mapping[str, Any]], int] = lambda n, options: 1
    paper: str = ""

    def __post_init__(self) -> None:
        unknown = [t for t in self.taps if t not in TAPS]
        if unknown:
            raise MethodError(f"recipe {self.name!r} reads unknown taps {unknown}; there are {', '.join(TAPS)}")
        for place in (self.place, self.language_place or self.place):
            if place not in ("attention", "block"):
                raise MethodError(f"recipe {self.name!r} has place {place!r}; it is 'attention' or 'block'")
        if any(t.startswith("earlier_") for t in self.taps) != (self.earlier is not None):
            raise MethodError(f"recipe {self.name!r} must have both a tap 'earlier_' and `earlier`, or neither")

    def taps_read(self) -> tuple[str, ...]:
        """The taps beside the residual stream itself."""
        return tuple(t for t in self.taps if t != "x")

    def reads_attention(self) -> bool:
        """Whether it needs an attention that has been computed, and not only the tokens."""
        return any(t not in ("x", "normed", "embeds", "text_embeds", "text_seen") for t in self.taps)

    def place_in(self, language: bool) -> str:
        """Where in a block it stands."""
        return (language and self.language_place) or self.place

    def with_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options with defaults filled in. Raises: MethodError for names that the method does not have, and for values of
        another kind than the default."""
        if not isinstance(given.get("renumber", True), bool):
            raise MethodError(f"renumber={given['renumber']!r} is neither True nor False")
        layer = given.get("drop_layer")
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, (int, float))):
            raise MethodError(f"drop_layer={layer!r} is neither the number of a layer nor a share of the depth")
        for name, value in given.items():
            if name not in (*self.options, *OF_ALL):
                near = difflib.get_close_matches(name, self.options, 3)
                known = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(self.options) or 'none'}"
                raise MethodError(f"method {self.name!r} has no option {name!r}; {known}")
            default = self.options.get(name)
            allowed, text = KINDS.get(type(default), (object, ""))
            if not isinstance(value, allowed) or (text and isinstance(value, bool) != isinstance(default, bool)):
                raise MethodError(f"{self.name}'s {name} takes {text} ({default!r} by default), not {value!r}")
        return {**self.options, **given}


_REGISTRY: dict[str, Recipe] = {}


def register_method(recipe: Recipe) -> Recipe:
    """Makes a recipe known by its name to `optimize(method=...)`, plans and the command line."""
    if not isinstance(recipe, Recipe):
        raise MethodError(f"register_method takes a Recipe, not {type(recipe).__name__}")
    _REGISTRY[recipe.name] = recipe
    return recipe


def methods() -> dict[str, Recipe]:
    """All known methods by name."""
    return dict(sorted(_REGISTRY.items()))


def get_method(method: str | Recipe) -> Recipe:
    """The recipe of that name. Raises: MethodError with the nearest names."""
    if isinstance(method, Recipe):
        return method
    known = methods()
    if method not in known:
        near = difflib.get_close_matches(str(method), known, 3, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise MethodError(f"unknown method {method!r}; {hint}")
    return known[method]
