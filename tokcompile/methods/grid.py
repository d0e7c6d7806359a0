"""Every n-th patch, the baseline that looks at no pixel: a coarser grid of the same image."""

from __future__ import annotations

from tokcompile.errors import MethodError
from tokcompile.primitives import constant
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import once


def spread(n: int, k: int) -> list[int]:
    """k of n positions at equal distances, centred."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def sub_grid(rows: int, columns: int, k: int) -> tuple[int, int] | None:
    """The r x c = k that thins both axes most alike; None if one axis were thinned over twice as much."""

    def skew(r: int) -> float:
        a, b = r * columns, k // r * rows
        return max(a, b) / min(a, b)

    fits = [r for r in range(1, rows + 1) if k % r == 0 and k // r <= columns and skew(r) <= 2]
    return (best := min(fits, key=skew), k // best) if fits else None


def raster(site: Site) -> tuple[int, int] | None:
    """Rows and columns of the image: the option `shape`, else the patch grid; None where the tokens are no whole grid.

    Raises: MethodError for a shape that does not hold these tokens.
    """
    shape = site.options.get("shape")
    if shape is not None:
        fits = isinstance(shape, (tuple, list)) and len(shape) == 2 and all(isinstance(side, int) for side in shape)
        if not fits or shape[0] * shape[1] != site.n or shape[0] < 1:
            raise MethodError(f"shape={shape!r} does not hold these {site.n} tokens: it is (rows, columns) of each image")
        return shape[0], shape[1]
    if site.grid is not None and len(site.grid) == 2 and site.grid[0] * site.grid[1] == site.n:
        return site.grid[0], site.grid[1]
    return None


def chosen(site: Site) -> list[int]:
    """The k kept positions, ascending."""
    if whole := raster(site):
        rows, columns = whole
        if found := sub_grid(rows, columns, site.k):
            return [r * columns + c for r in spread(rows, found[0]) for c in spread(columns, found[1])]
    return spread(site.n, site.k)


def plan(tokens: Tokens, site: Site) -> Keep:
    """A sub-grid of exactly k patches where k allows one, else k positions at equal distances in raster order."""
    return Keep(constant(chosen(site), tokens.x).expand(tokens.x.shape[0], -1))


GRID = register_method(
    Recipe(
        "grid",
        plan,
        language_place="block",
        steps=once(1 / 4, language=0),
        options={"shape": None},
        together=anywhere,
        paper="baseline: an even sub-grid of the patches",
    )
)
