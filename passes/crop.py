"""Crop: tokens that the model cuts off later (padding of an image that does not fill its tiles) make way first.

A method then chooses among the other tokens of each sample. How many these are is known from the graph, and so is how many
of them are left: k, or all of them where there are fewer. In that case hidden ones fill up; they stand last, so that the
next reduction knows where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokcompile.passes.reduction import NOT_RESTRICTED, tap_axis
from tokcompile.primitives import constant, gather_rows
from tokcompile.recipe import Keep, Merge, Mix, Recipe, Site, Tokens

Hidden = tuple[tuple[int, ...], ...]  # for each sample of a batch, the tokens that are cut off later


def can_choose(recipe: Recipe) -> bool:
    """Whether all that a method reads can be restricted to some of the tokens."""
    return not set(recipe.taps) & set(NOT_RESTRICTED)


def left_of(hidden: Hidden, n: int, k: int) -> Hidden:
    """What is hidden among the k of n tokens that a reduction leaves."""
    return tuple(tuple(range(min(k, n - len(one)), k)) for one in hidden)


def joint_hidden(one: Hidden, other: Hidden) -> Hidden:
    """All that either hides, where both are about as many samples; else what the first does."""
    return tuple(a or b for a, b in zip(one, other)) if len(one) == len(other) else one or other


def among_shown(recipe: Recipe, hidden: Hidden) -> Recipe:
    """The same method, which drops hidden tokens before any other."""

    def plan(tokens: Tokens, site: Site) -> Keep | Merge | Mix:
        groups = [Group.of(site, rows, hidden) for rows in alike(hidden)]
        chosen = [recipe.plan(g.restricted(tokens), g.site) if g.site.n else g.nothing(tokens.x) for g in groups]
        order = [row for g in groups for row in g.rows]

        def all_of(parts: Sequence[Tensor]) -> Tensor:
            """Of each group of samples, as of all samples in their order."""
            joined = torch.cat(list(parts))
            back = [order.index(row) for row in range(len(order))]
            return joined if back == sorted(back) else joined.index_select(0, constant(back, tokens.x))

        index = all_of([g.index(c) for g, c in zip(groups, chosen)])
        if all(isinstance(c, Keep) and c.extra is None for c in chosen):
            said = [g.assigned(c) for g, c in zip(groups, chosen) if isinstance(c, Keep) and c.assign is not None]
            return Keep(index, ordered=False, assign=all_of(said) if len(said) == len(groups) else None)
        hard = [c for c in chosen if isinstance(c, Merge) or (isinstance(c, Keep) and c.extra is None)]
        if len(hard) == len(chosen):
            joining = zip(*(g.joining(c) for g, c in zip(groups, hard)))
            return Merge(index, *map(all_of, joining))
        return Mix(index, all_of([g.weights(c) for g, c in zip(groups, chosen)]))

    return replace(recipe, plan=plan)


def alike(hidden: Hidden) -> list[list[int]]:
    """The samples, those together of which as many tokens are hidden."""
    counts = [len(one) for one in hidden]
    return [[row for row, c in enumerate(counts) if c == count] for count in dict.fromkeys(counts)]


@dataclass(frozen=True)
class Group:
    """R samples of which v of n tokens are shown. shown, hidden: (R, v) and (R, n - v), the numbers of these tokens; fill: how
    many hidden ones are kept. site: what the method sees of it."""

    rows: list[int]
    site: Site
    shown: list[list[int]]
    hidden: list[list[int]]
    fill: int

    @classmethod
    def of(cls, site: Site, rows: list[int], hidden: Hidden) -> Group:
        gone = [sorted(hidden[row]) for row in rows]
        shown = [sorted({*range(site.n)} - {*one}) for one in gone]
        v = len(shown[0])
        k = min(site.k, v)
        mine = replace(site, n=v, k=k, grid=rectangle(shown, site.grid))
        return cls(rows, mine, shown, gone, site.k - k)

    @property
    def n(self) -> int:
        return len(self.shown[0]) + len(self.hidden[0])

    def restricted(self, tokens: Tokens) -> Tokens:
        """What is shown of these samples; `whole` stays the whole sequence."""
        rows, at = (constant(values, tokens.x) for values in (self.rows, self.shown))

        def of(name: str, value: Tensor) -> Tensor:
            axis = 1 if name in ("x", "size") else tap_axis(name) or 0
            mine = value.index_select(0, rows)
            return gather_rows(mine.movedim(axis, 1), at).movedim(1, axis) if self.hidden[0] else mine

        whole = {k: v.index_select(0, rows) for k, v in tensors(tokens.whole).items()}
        return Tokens(
            **{k: of(k, v) for k, v in tensors(tokens).items()},
            whole=Tokens(**whole) if whole else None,
        )

    def index(self, chosen: Keep | Merge | Mix) -> Tensor:
        """(R, k) the tokens that are left, hidden ones last."""
        index = torch.gather(numbers(self.shown, chosen.index), 1, chosen.index)
        filling = [one[: self.fill] for one in self.hidden]
        return torch.cat([index, numbers(filling, index)], 1)

    def nothing(self, like: Tensor) -> Keep:
        """The choice where all is hidden."""
        none = torch.zeros(len(self.rows), 0, dtype=torch.int64, device=like.device)
        return Keep(none, assign=none)

    def joining(self, chosen: Keep | Merge) -> tuple[Tensor, Tensor, Tensor]:
        """(R, n - k) the tokens that are gone, the slots that they join, and 1 for those that do; hidden ones join none."""
        gone = numbers([one[self.fill :] for one in self.hidden], chosen.index)
        nowhere = torch.zeros_like(gone)
        if isinstance(chosen, Keep):
            return gone, nowhere, nowhere.float()
        sources = torch.gather(numbers(self.shown, gone), 1, chosen.sources)
        joins = torch.ones_like(sources, dtype=torch.float32)
        parts = (sources, gone), (chosen.slots, nowhere), (joins, nowhere.float())
        return tuple(torch.cat(pair, 1) for pair in parts)  # type: ignore[return-value]

    def assigned(self, chosen: Keep) -> Tensor:
        """(R, n) what stands for each token, which the method says; any one for those that are hidden and gone."""
        assert chosen.assign is not None
        places = numbers([one + other for one, other in zip(self.shown, self.hidden)], chosen.index)
        count, hidden = chosen.index.shape[1], len(self.hidden[0])
        filled = [[count + i if i < self.fill else 0 for i in range(hidden)]] * len(self.rows)
        slots = torch.cat([chosen.assign, numbers(filled, chosen.index)], 1)
        return torch.zeros_like(slots).scatter(1, places, slots)

    def weights(self, chosen: Keep | Merge | Mix) -> Tensor:
        """(R, k, n) each token that is left as a weighted sum."""
        rows = torch.arange(self.n, device=chosen.index.device)
        one_hot = (self.index(chosen)[..., None] == rows).float()
        soft = chosen.weights if isinstance(chosen, Mix) else chosen.extra if isinstance(chosen, Keep) else None
        if soft is None:
            return one_hot
        v, count = len(self.shown[0]), chosen.index.shape[1]
        column = [{token: i for i, token in enumerate(one)} for one in self.shown]
        places = constant([[one.get(i, v) for i in range(self.n)] for one in column], chosen.index)
        wide = torch.gather(F.pad(soft.float(), (0, 1)), 2, places[:, None].expand(-1, soft.shape[1], -1))
        return torch.cat([one_hot[:, : count - soft.shape[1]], wide, one_hot[:, count:]], 1)


def numbers(values: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """(R, m) on the device of `like`; m may be 0."""
    return constant(values, like).to(torch.int64)


def tensors(tokens: Tokens | None) -> dict[str, Any]:
    """The taps that there are."""
    given = {f.name: getattr(tokens, f.name) for f in fields(Tokens)} if tokens else {}
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def rectangle(shown: Sequence[Sequence[int]], grid: tuple[int, ...] | None) -> tuple[int, int] | None:
    """(rows, columns) of the shown tokens, where they are as large a rectangle of the patch grid in every sample."""
    if grid is None or len(grid) != 2:
        return None
    sizes = [(len({i // grid[1] for i in one}), len({i % grid[1] for i in one})) for one in shown]
    return sizes[0] if len(set(sizes)) == 1 and sizes[0][0] * sizes[0][1] == len(shown[0]) else None
