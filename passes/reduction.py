"""The module that stands for one reduction in the rewritten graph: one node in FX, one node in ONNX, one plugin layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokcompile.errors import MethodError
from tokcompile.plugins import torch_ops
from tokcompile.primitives.combine import apply, assignment
from tokcompile.recipe import Keep, Merge, Mix, Recipe, Site, Tokens

RESULTS = ("x", "index", "size", "assign")  # of every reduction, in this order
NOT_RESTRICTED = ("scores", "embeds", "text_embeds", "text_seen")  # taps that are what they are, wherever the tokens stand


class ReductionModule(nn.Module):
    """Reduces the n tokens from `start` on; what stands before and after passes through.

    forward(x: (B, L, D), size: (B, n) or None, *taps) -> (x': (B, L', D), index: (B, k), size': (B, k) or None,
    assign: (B, n) or None), and positions: (B, k, P) where the plan gives several to each token. With `unit` u the n
    tokens are groups of u rows, kept or dropped together. Segments that are alike are samples of one batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        site: Site,
        unit: int = 1,
        names: tuple[str, ...] = (),
        start: int | None = None,
        tap_start: int | None = None,
        block: int | None = None,
    ):
        super().__init__()
        self.recipe, self.site, self.unit, self.names = recipe, site, unit, names
        self.start = site.prefix * unit if start is None else start
        # where other segments of the same block were reduced first, the taps still are as long as before
        self.tap_start = self.start if tap_start is None else tap_start
        self.block = site.block if block is None else block  # among all of the model, of which the site's stack is a part
        self.needs_assign = False
        self.ordered: bool | None = None  # known once the plan has run on fake tensors
        self.kernel = torch_ops.kernel_for(self)

    def forward(self, x: Tensor, size: Tensor | None = None, *taps: Tensor) -> tuple[Tensor | None, ...]:
        if self.kernel is not None and torch_ops.applies(self.kernel, x, size, taps, analysing=self.ordered is None):
            return torch_ops.call(self.kernel, x, size, taps, self.needs_assign)
        return self.reference(x, size, *taps)

    def reference(self, x: Tensor, size: Tensor | None = None, *taps: Tensor) -> tuple[Tensor | None, ...]:
        """The reduction in plain PyTorch: what its kernel means, and what runs where there is none."""
        site, u = self.site, self.unit
        start, stop = self.start, self.start + site.n * u
        body = x[:, start:stop]
        given = {name: self.restrict(tap, name) for name, tap in zip(self.names, taps)}
        if size is None and self.recipe.track_size:
            size = torch.ones(x.shape[0], site.n, dtype=torch.float32, device=x.device)
        summary = body if u == 1 else body.reshape(x.shape[0], site.n, u, -1).mean(2)
        full: dict[str, Tensor] = dict(zip(self.names, taps))
        whole = Tokens(x=x, **full) if u == 1 and site.segments == 1 else None  # type: ignore[arg-type]
        plan = self.recipe.plan(Tokens(x=summary, size=size, whole=whole, **given), site)
        check_plan(plan, self.recipe, site, x.shape[0])
        if self.ordered is None:
            self.ordered = isinstance(plan, Keep) and plan.ordered
        rows = x if u == 1 else x.reshape(x.shape[0], x.shape[1] // u, u * x.shape[2])
        new, new_size = apply(plan, rows, size, start // u, site.n)
        assign = assignment(plan, summary) if self.needs_assign else None
        results = (new if u == 1 else new.reshape(x.shape[0], -1, x.shape[2])), plan.index, new_size, assign
        positions = plan.positions if isinstance(plan, Mix) else None
        return results if positions is None else (*results, positions)

    def restrict(self, tap: Tensor, name: str) -> Tensor:
        """A tap over the whole sequence as one over the reducible tokens."""
        site, u = self.site, self.unit
        axis = tap_axis(name)
        if axis is None:
            return tap
        tap = tap.narrow(axis, self.tap_start, site.n * u)
        return tap if u == 1 else tap.unflatten(axis, (site.n, u)).mean(axis + 1)

    def extra_repr(self) -> str:
        return f"{self.recipe.name}, {self.site.n} -> {self.site.k}"


def tap_axis(name: str) -> int | None:
    """Which axis of a tap runs over the tokens of the sequence; None where it is what it is."""
    return None if name in NOT_RESTRICTED else {"normed": 1, "text_attention": 3}.get(name, 2)


def check_plan(plan: object, recipe: Recipe, site: Site, batch: int) -> None:
    """Raises: MethodError where a method's plan is not what it was asked for."""
    if not isinstance(plan, (Keep, Merge, Mix)):
        raise MethodError(f"the plan of method {recipe.name!r} returned {type(plan).__name__}, not Keep, Merge or Mix")
    if tuple(plan.index.shape) != (batch, site.k):
        raise MethodError(
            f"method {recipe.name!r} was asked for {site.k} of {site.n} tokens and gave indices of shape "
            f"{tuple(plan.index.shape)}; its plan must return exactly (batch, site.k)"
        )
    given = plan.assign if isinstance(plan, Keep) else None
    if given is not None and tuple(given.shape) != (batch, site.n):
        raise MethodError(
            f"method {recipe.name!r} says what stands for each of {site.n} tokens in the shape {tuple(given.shape)}; "
            f"it is {(batch, site.n)}"
        )
