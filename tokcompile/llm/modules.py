"""The modules of generation: a prefill that returns its caches, and the decode step that goes on after a reduction in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

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
        self.reaches: set[Reach | None] = set()
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
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise AttendsItself("it takes no position_ids")
        stages = self.layout.stages
        slots = [step + stage.length for stage in stages]
        cache = Slots(keys, values, [slots[self.layout.stage_of(at)] for at in range(len(keys))], states or {})
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
                seen[stage, reach] = self.visible(stage, reach, step, kept, attention_mask, positions, position_ids)
            return seen[stage, reach]

        with attention_over(self.model, mask) as layers:
            out = self.model(
                input_ids=token, position_ids=position_ids, use_cache=True, attention_mask=passing_mask(),
                **{cache_name(self.model): cache},
            )  # fmt: skip
        if read != {*range(len(keys))} or len(cache.filled) != len(keys):
            raise AttendsItself("not all of its attention goes through transformers' functions")
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
        return any(map(self.hides, self.reaches))

    def needed(self) -> list[str]:
        """Which of the prefill's index outputs the masks are made from."""
        if not self.bound and not self.padded:
            return []
        return list(self.layout.kept)
