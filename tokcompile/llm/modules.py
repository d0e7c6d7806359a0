"""The modules of generation: a prefill that returns its caches, and the decode step that goes on after a reduction in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokcompile.errors import InputError
from tokcompile.llm.caches import AttendsItself, Collecting, Slots, attention_over, cache_name, last_logits, passing_mask
from tokcompile.llm.layout import Layout
from tokcompile.llm.reach import Reach


class Prefill(nn.Module):
    """A causal language model that returns the last token's logits and the keys and values of every layer.

    model: of transformers, taking a cache. Optimize it with outputs="reduced".

    Raises: InputError.

    Example:
        >>> prefill = tokcompile.llm.Prefill(model)                                                  # doctest: +SKIP
        >>> tokcompile.optimize(prefill, kwargs={"inputs_embeds": embeds}, method="dart", budget=tokcompile.Tokens(64),
        ...                     spans=[(35, 611)], outputs="reduced")                                # doctest: +SKIP
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        check_takes(model, {cache_name(model)})
        self.model = model
        self.last = last_logits(model)
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
        named = dict(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, input_ids=input_ids)
        given = {name: value for name, value in named.items() if value is not None} | {self.cache: cache}
        try:
            out = self.model(**given, use_cache=True, **self.last)
        except Exception as error:
            if Collecting.__name__ not in str(error):
                raise
            raise InputError(
                f"{type(self.model).__name__} takes only a cache of its own kind: {error}\n"
                "  what to do: nothing yet; the model itself, with use_cache=False, can be optimized and exported"
            ) from error
        return {"logits": out.logits, **cache.outputs()}


def check_takes(model: nn.Module, names: set[str]) -> None:
    """Raises: InputError."""
    missing = names - set(inspect.signature(model.forward).parameters)
    if missing:
        raise InputError(
            f"{type(model).__name__}.forward takes no {' and no '.join(sorted(missing))}: tokens and caches cannot be "
            "passed to it\n  what to do: pass a causal language model of transformers; any other one can be optimized itself, "
            "with spans=, and is decoded by its own code"
        )


class Now(NamedTuple):
    """What a decode step is given beside caches. token: (B, 1). position_ids: (B, 1) or (axes, B, 1). step: (1,) how many
    tokens were decoded before. kept: the prefill's index outputs. padding: its attention_mask, (B, L). positions: its
    position_ids."""

    token: Tensor
    position_ids: Tensor
    step: Tensor
    kept: Mapping[str, Tensor]
    padding: Tensor | None
    positions: Tensor | None


class Step(nn.Module):
    """One token in, the next token's logits out; caches go in and come out with the token's entry written.

    layout: of the prefill.
    """

    def __init__(self, model: nn.Module, layout: Layout):
        super().__init__()
        self.model, self.layout = model, layout
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
        ends = [step + stage.length for stage in self.layout.stages]
        slots = [ends[self.layout.stage_of(at)] for at in range(len(keys))]
        now = Now(token, position_ids, step, kept or {}, attention_mask, positions)
        logits, cache = self.run(now, keys, values, slots, states or {})
        return {"logits": logits, **cache.outputs("new_")}

    def run(self, now: Now, *buffers: Any) -> tuple[Tensor, Slots]:
        """Logits, and the cache of these buffers with the token in it; see `Slots`."""
        raise NotImplementedError


class Decode(Step):
    """A step that says itself what the token may see, mostly a matter of counting.

    Beside that sliding windows and chunks need `kept` and `positions`; padding needs its mask.
    """

    def __init__(self, model: nn.Module, layout: Layout):
        super().__init__(model, layout)
        self.padded = "attention_mask" in layout.inputs
        self.reaches: set[Reach | None] = set()

    def run(self, now: Now, *buffers: Any) -> tuple[Tensor, Slots]:
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise AttendsItself("it takes no position_ids")
        cache = Slots(*buffers)
        count = len(cache.keys)
        seen: dict[tuple[int, Reach | None], Tensor] = {}
        read: set[int] = set()  # whose keys were attended to

        def mask(layer: int, reach: Reach | None, keys: Tensor) -> Tensor:
            at = cache.owner(layer, keys, again=layers.count(layer) > 1)
            if at is None:
                raise AttendsItself(f"layer {layer} attends to keys that no layer put into the cache as they are")
            self.reaches.add(reach)
            read.add(at)
            stage, reach = self.layout.stage_of(at), reach if self.hides(reach) else None
            if (stage, reach) not in seen:
                seen[stage, reach] = self.visible(stage, reach, now)
            return seen[stage, reach]

        with attention_over(self.model, mask) as layers:
            out = self.model(
                input_ids=now.token, position_ids=now.position_ids, use_cache=True, attention_mask=passing_mask(),
                **{cache_name(self.model): cache},
            )  # fmt: skip
        if read != {*range(count)} or len(cache.filled) != count:
            raise AttendsItself("not all of its attention goes through transformers' functions")
        return out.logits, cache

    def hides(self, reach: Reach | None) -> bool:
        """Whether it ends within the positions that there can be."""
        return reach is not None and reach.size < self.layout.length + self.layout.room

    def visible(self, stage: int, reach: Reach | None, now: Now) -> Tensor:
        """Which entries of a stage the token may attend to, (1 or B, 1, 1, capacity)."""
        here, device = self.layout.stages[stage], now.step.device
        made = torch.arange(self.layout.room, device=device)[None]
        after = made <= now.step
        before = torch.ones(1, here.length, dtype=torch.bool, device=device)
        if reach is not None or now.padding is not None:
            rows = here.rows(self.layout.length, now.kept).to(device)
            if reach is not None:
                own, then = self.places(rows, now)
                before, after = reach.sees(own, then), after & reach.sees(own, own - now.step + made)
            if now.padding is not None:
                before = before & now.padding.bool().gather(1, rows.expand(now.padding.shape[0], -1))
        after = after.expand(before.shape[0], -1)
        return torch.cat([before, after], 1)[:, None, None]

    def places(self, rows: Tensor, now: Now) -> tuple[Tensor, Tensor]:
        """The original positions of the token, (1 or B, 1), and of each entry of the prompt, (1 or B, entries)."""
        if self.layout.axes:
            raise InputError(
                f"a position has {self.layout.axes[0]} numbers in this model, and its sliding windows or chunks count in "
                "one\n  what to do: nothing yet; only models without such can have such positions here"
            )
        if now.positions is None:
            return (self.layout.length + now.step)[None], rows
        return now.position_ids, now.positions.gather(1, rows.expand(now.positions.shape[0], -1))

    @property
    def bound(self) -> bool:
        """Whether a window or chunk hides anything, known once it has run."""
        return any(map(self.hides, self.reaches))

    def needed(self) -> list[str]:
        """Which of the prefill's index outputs the masks are made from."""
        if not self.bound and not self.padded:
            return []
        return list(self.layout.kept)
