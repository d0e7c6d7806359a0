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
    scores = draw_scores(g, attention, kind)
    size = torch.randint(1, 5, (batch, length), generator=g).float()
    taps = dict(x=x, normed=normed, q=q, k=k, v=v, rotated_k=k)
    taps |= dict(cls_attention=attention, received_attention=attention, last_attention=attention)
    taps |= dict(text_attention=attention[:, :, None], earlier_attention=attention.roll(1, 1), scores=scores)
    taps |= dict(earlier_cls_attention=attention.float())
    return {name: tap.to(dtype) for name, tap in taps.items()} | {"size": size}


def draw_scores(g, attention, kind):
    """A map of scores over the whole sequence: (B, H, L, L), alike for tokens that are alike."""
    if kind == "normal":
        return torch.randn(*attention.shape, attention.shape[-1], generator=g)
    return (attention[:, :, :, None] * attention[:, :, None] * 512).round()


# the axes of each tap that the tokens run along; of any other it is the third
AXES = {"x": (1,), "normed": (1,), "size": (1,), "text_attention": (3,), "scores": (2, 3)}


def body(taps, name, prefix, n=None):
    """A tap without its first tokens; n tokens of it."""
    n = taps["x"].shape[1] - prefix if n is None else n
    return taps[name] if name == "scores" else taps[name].narrow(AXES.get(name, (2,))[0], prefix, n)


def shuffle(taps, order):
    """The same tokens in another order."""
    for name in taps:
        for axis in AXES.get(name, (2,)):
            taps = {**taps, name: taps[name].index_select(axis, order)}
    return taps


def tokens(recipe: Recipe, taps, prefix=0, n=None) -> Tokens:
    """What the pass would give to the recipe's plan: only the taps it names, of the text only where there is some."""
    read = [name for name in recipe.taps_read() if name in taps]
    names = [*(name for name in read if "embeds" not in name), *(["size"] if recipe.track_size else [])]
    whole = Tokens(**{name: taps[name] for name in ("x", *read)})
    given = {name: body(taps, name, prefix, n) for name in names} | {name: taps[name] for name in read if "embeds" in name}
    return Tokens(x=body(taps, "x", prefix, n), whole=whole, **given)


def site(recipe: Recipe, n, k, prefix=0, **rest) -> Site:
    options = recipe.with_options(rest.pop("options", {}))
    return Site(n=n, k=k, prefix=prefix, start=prefix, options=options, **rest)


def run(recipe: Recipe, taps, where: Site):
    """The plan, the new tokens and the new sizes."""
    given = tokens(recipe, taps, where.prefix, where.n)
    plan = recipe.plan(given, where)
    return plan, *apply(plan, given.x, given.size)


def lowest(recipe: Recipe, n, prefix=0, options=None):
    return recipe.least(n, {**recipe.with_options(options or {}), "prefix": prefix})
