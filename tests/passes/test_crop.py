"""Among what is shown: a method on a batch of which some tokens are hidden is that method on each sample's other tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokcompile
from tests.conftest import error
from tokcompile import Site
from tokcompile.passes.crop import among_shown, can_choose, left_of
from tokcompile.primitives import identity
from tokcompile.primitives.combine import apply
from tokcompile.recipe import Keep, Tokens, get_method

ROWS, COLUMNS, WIDTH = 4, 6, 8
N = ROWS * COLUMNS
HIDDEN = ((), tuple(range(6)), tuple(range(18, 24)), tuple(range(0, 24, 3)), tuple(range(4, 24)), (5,))
# none, a row, another row, columns, all but four (fewer than are kept), one


def taps(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *size: torch.randn(batch, *size, generator=generator)  # noqa: E731
    rows = {f"{name}_attention": drawn(2, N).softmax(-1) for name in ("cls", "received", "last", "earlier", "earlier_cls")}
    heads = {name: drawn(2, N, 4) for name in ("q", "k", "v", "rotated_k")}
    return Tokens(drawn(N, WIDTH), normed=drawn(N, WIDTH), text_attention=drawn(2, 3, N).softmax(-1), **rows, **heads)


def alone(tokens, row, shown):
    """What is shown of one sample."""
    picked = {"x": 1, "normed": 1, "text_attention": 3}
    given = {k: v for k, v in vars(tokens).items() if isinstance(v, torch.Tensor)}
    return Tokens(**{k: v[row : row + 1].index_select(picked.get(k, 2), shown) for k, v in given.items()})


def site(name, k, n=N, **more):
    return Site(n, k, grid=(ROWS, COLUMNS), depth=4, options=get_method(name).with_options({}), **more)


VISION = [
    n for n, r in tokcompile.methods().items() if can_choose(r) and n not in ("evs", "ppe", "sparsevlm", "holov", "fopru")
]


@pytest.mark.parametrize("name", VISION)
def test_each_sample_is_as_if_alone(name):
    recipe, tokens, k = get_method(name), taps(len(HIDDEN)), 14
    chosen = among_shown(recipe, HIDDEN).plan(tokens, site(name, k))
    assert chosen.index.shape == (len(HIDDEN), k)
    new, size = apply(chosen, tokens.x, None)
    for row, hidden in enumerate(HIDDEN):
        shown = torch.tensor([i for i in range(N) if i not in hidden])
        left = min(k, len(shown))
        grid = (ROWS, COLUMNS) if not hidden else (3, 6) if len(hidden) == 6 else (4, 4) if len(hidden) == 8 else None
        small = site(name, left, len(shown))
        mine = alone(tokens, row, shown)
        own = recipe.plan(mine, Site(**{**vars(small), "grid": grid}))
        if name != "random":  # whose draw goes by the number of the sample in its group
            assert chosen.index[row, :left].tolist() == shown[own.index[0]].tolist()
            assert error(new[row, :left], apply(own, mine.x, None)[0][0]) < 1e-5
        assert set(chosen.index[row, :left].tolist()) <= set(shown.tolist())
        assert chosen.index[row, left:].tolist() == list(hidden[: k - left])
        torch.testing.assert_close(new[row, left:], tokens.x[row, list(hidden[: k - left])])
        if size is not None and hasattr(chosen, "sources"):
            assert size[row, :left].sum() == len(shown)


@given(st.lists(st.sets(st.integers(0, 9), max_size=10), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9))
def test_what_is_hidden_stays_known(hidden, first, second):
    """Two reductions, one after the other, keep as many shown tokens as there can be."""
    hidden, (k, m) = tuple(tuple(sorted(h)) for h in hidden), sorted((first, second), reverse=True)
    recipe = get_method("random")
    x = torch.arange(10.0).expand(len(hidden), -1)[..., None]
    for n, left in ((10, k), (k, m)):
        now = hidden if n == 10 else left_of(hidden, 10, k)
        x = apply(among_shown(recipe, now).plan(Tokens(x), Site(n, left, options={"seed": 0})), x, None)[0]
    for row, gone in enumerate(hidden):
        kept = x[row, :, 0].long().tolist()
        assert len(set(kept) - set(gone)) == min(m, 10 - len(gone))


def test_what_a_method_says_stands_for_tokens_still_does():
    said = lambda tokens, site: Keep(identity(tokens.x)[:, : site.k], assign=identity(tokens.x) % site.k)  # noqa: E731
    recipe = tokcompile.Recipe("said", said)
    chosen = among_shown(recipe, HIDDEN).plan(taps(len(HIDDEN)), Site(N, 14))
    for row, hidden in enumerate(HIDDEN):
        shown = [i for i in range(N) if i not in hidden]
        left = min(14, len(shown))
        assert chosen.assign[row, shown].tolist() == [i % left for i in range(len(shown))]
        assert chosen.assign[row, list(hidden[: 14 - left])].tolist() == list(range(left, 14))
