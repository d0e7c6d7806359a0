"""The two baselines that look at no token: grid and random."""

import pytest

from tests.methods.inputs import run, sequence, site
from tests.reference.grid import grid
from tokcompile.errors import MethodError
from tokcompile.methods.grid import GRID
from tokcompile.methods.m3 import M3
from tokcompile.methods.random import RANDOM


@pytest.mark.parametrize("shape", [(4, 4), (7, 9), (14, 14), None])
def test_grid_equals_the_loops_at_every_count(shape):
    n = shape[0] * shape[1] if shape else 50
    taps = sequence(2, n)
    for k in range(1, n + 1):
        plan, _, _ = run(GRID, taps, site(GRID, n, k, grid=shape))
        assert plan.index.tolist() == [grid(n, k, shape)] * 2


def test_a_quarter_of_the_grid_is_every_second_row_and_column():
    plan, _, _ = run(GRID, sequence(1, 16), site(GRID, 16, 4, grid=(4, 4)))
    assert plan.index.tolist() == [[5, 7, 13, 15]]


def test_a_prime_count_is_spread_over_the_raster():
    plan, _, _ = run(GRID, sequence(1, 16), site(GRID, 16, 13, grid=(4, 4)))
    assert plan.index.tolist() == [[0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 14, 15]]


def test_a_grid_of_another_size_is_not_believed():
    plan, _, _ = run(GRID, sequence(1, 16), site(GRID, 16, 4, grid=(5, 5)))
    assert plan.index.tolist() == [[2, 6, 10, 14]]


def test_the_shape_of_an_image_inside_a_language_model():
    for shape in ((4, 4), [2, 8]):
        where = site(GRID, 16, 4, 5, grid=None, options={"shape": shape})
        assert run(GRID, sequence(1, 25), where)[0].index.tolist() == [grid(16, 4, tuple(shape))]
    for recipe in (GRID, M3):
        for wrong in ((5, 5), (16,), 16, (-4, -4), (3.2, 5)):
            with pytest.raises(MethodError, match="does not hold these 16 tokens"):
                run(recipe, sequence(1, 16), site(recipe, 16, 4, options={"shape": wrong}))
        assert list(recipe.steps.at(32, language=True)) == [0]
        assert recipe.place_in(language=True) == "block"
    assert GRID.place_in(language=False) == "attention"


def test_random_depends_on_seed_step_and_sample_only():
    def draw(seed=0, step=0, data=0):
        where = site(RANDOM, 50, 20, options={"seed": seed}, step=step, steps=3)
        return run(RANDOM, sequence(2, 50, seed=data), where)[0].index.tolist()

    assert draw() == draw(data=1)
    assert draw()[0] != draw()[1]
    assert draw() != draw(seed=1)
    assert draw() != draw(step=1)
