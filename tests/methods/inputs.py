"""Random, tied and constant taps, and the site and tokens that a recipe is run with."""

import torch

from tokcompile.primitives import apply
from tokcompile.recipe import Recipe, Site, Tokens

KINDS = ("normal", "ties", "constant")
LENGTHS = (63, 196, 197, 577)


def sequence(batch, length, *, seed=0, kind="normal", d=16, heads=2, dtype=torch.float32):
    """Every tap over a whole sequence, and sizes.

    "ties" repeats few different rows of +1 and -1 with a norm of 4: cosines are exact in float32, so are the ties.
    """
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 6, (batch, length), generator=g) * (kind == "ties")
    table = torch.randint(0, 2, (3, 6, d), generator=g).float() * 2 - 1
    loud = torch.randint(1, 3, (6, 1), generator=g).float()

    def draw(*lead):
        return torch.randn(batch, *lead, length, d, generator=g)

    def rows(i):
        return (table[i] * loud)[codes]

    if kind == "normal":
        x, normed, k, q, v = draw(), draw(), draw(heads), draw(heads), draw(heads)
        attention = torch.randn(batch, heads, length, generator=g).softmax(-1)
    else:
        x, normed, k = rows(0), rows(1), rows(2)[:, None].expand(batch, heads, length, d)
        q = v = k
        attention = (codes / 64)[:, None].expand(batch, heads, length)
    size = torch.randint(1, 5, (batch, length), generator=g).float()
    taps = dict(x=x, normed=normed, q=q, k=k, v=v, rotated_k=k)
    taps |= dict(cls_attention=attention, received_attention=attention, last_attention=attention)
    return {name: tap.to(dtype) for name, tap in taps.items()} | {"size": size}


def body(taps, name, prefix, n=None):
    """A tap without its first tokens; n tokens of it."""
    n = taps["x"].shape[1] - prefix if n is None else n
    return taps[name].narrow(1 if name in ("x", "normed", "size") else 2, prefix, n)


def tokens(recipe: Recipe, taps, prefix=0, n=None) -> Tokens:
    """What the pass would give to the recipe's plan: only the taps it names."""
    names = [*recipe.taps_read(), *(["size"] if recipe.track_size else [])]
    whole = Tokens(**{name: taps[name] for name in ("x", *recipe.taps_read())})
    return Tokens(x=body(taps, "x", prefix, n), whole=whole, **{name: body(taps, name, prefix, n) for name in names})


def site(recipe: Recipe, n, k, prefix=0, **rest) -> Site:
    options = recipe.with_options(rest.pop("options", {}))
    return Site(n=n, k=k, prefix=prefix, start=prefix, options=options, **rest)


def run(recipe: Recipe, taps, where: Site):
    """The plan, the new tokens and the new sizes."""
    given = tokens(recipe, taps, where.prefix, where.n)
    plan = recipe.plan(given, where)
    return plan, *apply(plan, given.x, given.size)


def lowest(recipe: Recipe, n, prefix=0):
    return recipe.least(n, {**recipe.options, "prefix": prefix})
