"""AIM: merge look-alikes before the language model, then prune in its later layers by PageRank (ICCV 2025)."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import first_argmax, gather_rows, identity, keep_best, top_k, unit
from tokcompile.recipe import Keep, Mix, Recipe, Site, Tokens, register_method
from tokcompile.steps import Steps, at_fractions


def counts(n: int, final: int, steps: int) -> tuple[int, ...]:
    """A quarter after merging, or `final` if that is more; then the same number fewer at each step, down to `final`."""
    merged = max(final, ceil(n / 4))
    return (*(final + (merged - final) * (steps - 1 - i) // (steps - 1) for i in range(steps - 1)), final)


def merge(x: Tensor, removed: int) -> tuple[Tensor, Tensor]:
    """The `removed` even tokens most like an odd one are averaged into it, sizes not counted: x: (B, n, D) ->
    weights (B, n - removed, n), and the token that lends each new one its position."""
    metric, n = unit(x), x.shape[1]
    similar = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    sources, kept = top_k(similar.amax(-1), similar.shape[1]).split([removed, similar.shape[1] - removed], 1)
    partner = first_argmax(gather_rows(similar, sources))
    odd = identity(x[:, 1::2])
    joined = (partner[:, None] == odd[..., None]).float()  # (B, odd tokens, sources)
    index = torch.cat([2 * kept, 2 * odd + 1], 1)
    own = (index[..., None] == torch.arange(n, device=x.device)).float()
    alone = torch.zeros_like(own[:, : kept.shape[1]])
    columns = (2 * sources)[:, None].expand(-1, odd.shape[1], -1)
    weights = own + torch.cat([alone, torch.zeros_like(own[:, kept.shape[1] :]).scatter(2, columns, joined)], 1)
    return weights / weights.sum(-1, keepdim=True), index


def merge_to(x: Tensor, k: int) -> Mix:
    """Rounds that remove at most half of the tokens each, until k are left; new tokens are means of means."""
    weights, index = merge(x, min(x.shape[1] // 2, x.shape[1] - k))
    while weights.shape[1] > k:
        left = weights.shape[1]
        again, chosen = merge(weights.to(x.dtype) @ x, min(left // 2, left - k))
        weights, index = again @ weights, index.gather(1, chosen)
    return Mix(index, weights)


def importance(scores: Tensor, tau: float, rounds: int) -> Tensor:
    """PageRank over the attention map sharpened by `tau`, root mean square over heads: (B, H, L, L) -> (B, L)."""
    links = (scores.float() / tau).softmax(-1)
    rank = torch.full_like(links[:, :, :1], 1 / links.shape[-1])
    for _ in range(rounds):
        rank = rank @ links
    return (rank[:, :, 0] ** 2).mean(1).sqrt()


def plan(tokens: Tokens, site: Site) -> Keep | Mix:
    """Merging where no attention comes before; else the k tokens of largest rank in the layer before, all tokens ranked."""
    tau, rounds = site.options["tau"], site.options["rounds"]
    if tau <= 0 or rounds < 1:
        raise MethodError(f"aim takes a temperature above 0 and at least one round, not {tau} and {rounds}")
    if site.k == site.n:
        return Keep(identity(tokens.x))
    if tokens.scores is None:
        return merge_to(tokens.x, site.k)
    if tokens.whole is None:
        raise MethodError("aim ranks tokens one by one, and this model keeps them in groups: choose another method")
    return Keep(keep_best(importance(tokens.scores, tau, rounds).narrow(1, site.start, site.n), site.k))


AIM = register_method(
    Recipe(
        "aim",
        plan,
        taps=("x", "scores"),
        place="block",
        opening=True,
        steps=Steps(at_fractions(0, *((15 + i) / 28 for i in range(8))), counts),
        renumber=lambda step, options: step == 0,  # merging is before the language model, which is given fewer tokens
        options={"tau": 0.1, "rounds": 5},
        least=lambda n, options: 0,  # its last step
        paper="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning, arXiv 2412.03248",
    )
)
