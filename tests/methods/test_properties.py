"""What holds for every registered method, on random, tied and constant tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.inputs import KINDS, lowest, run, sequence, shuffle, site
from tokcompile.primitives import FORMS, use_forms
from tokcompile.recipe import Keep, Merge, methods

METHODS = sorted(methods())
DRAWS = dict(deadline=None, derandomize=True)
# ToMe reads the parity of positions, VisionZip, PruMerge, HoloV and PPE read positions too, grid and random nothing else, M3,
# HiPrune and EVS the raster; the first pick of DivPrune and ToDRE ties where the two most isolated tokens are each other's
# nearest neighbour
POSITIONS = ("tome", "visionzip", "prumerge", "holov", "m3", "grid", "random", "hiprune", "evs", "ppe")
SYMMETRIC = [name for name in METHODS if name not in (*POSITIONS, "divprune", "todre")]
OPTIONS = {
    "evit": [{"fuse": False}],
    "pitome": [{"variant": "P"}, {"variant": "B"}],
    "dart": [{"pivots": 1}, {"pivots": 50}],
    "visionzip": [{"contextual": 0.7}],
    "holov": [{"groups": 3}],
    "todre": [{"objective": "min"}],
    "prumerge": [{"grid": 0.0}, {"neighbours": 3}],
    "sparsevlm": [{"recycle": 0}, {"recycle": 1.0, "per_cluster": 4}],
    "hiprune": [{"alpha": 1.0}],
    "ppe": [{"positions": 1}, {"positions": 50}],
}
DEFAULTS = {"evs": {"frames": 2}}  # for what has to be said
VARIANTS = [(name, given) for name in METHODS for given in [DEFAULTS.get(name, {}), *OPTIONS.get(name, [])]]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in given.items())]) for name, given in VARIANTS]


@st.composite
def cases(draw, recipe, options, most=40):
    """A site and the batch and seed to run it with."""
    frames = options.get("frames", 1)
    n = draw(st.integers(1, most // frames)) * frames
    prefix = draw(st.integers(0, 3))
    chosen = recipe.with_options(options)
    k = draw(st.integers(recipe.least(n, {**chosen, "prefix": prefix}), n))
    where = site(recipe, n, k, prefix, options=options, block=draw(st.integers(0, 3)), depth=4)
    return where, draw(st.integers(1, 3)), draw(st.integers(0, 10**6))


def new_tokens(recipe, taps, where):
    """The rows without those that several summed members may round differently: sorted by their first channel."""
    plan, rows, _ = run(recipe, taps, where)
    return plan, torch.stack([row[row[:, 0].argsort()] for row in rows])


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
@settings(max_examples=30, **DRAWS)
@given(data=st.data())
def test_exactly_k_distinct_tokens(name, options, data):
    recipe = methods()[name]
    where, batch, seed = data.draw(cases(recipe, options))
    taps = sequence(batch, where.prefix + where.n, seed=seed, kind=data.draw(st.sampled_from(KINDS)))
    plan, rows, sizes = run(recipe, taps, where)
    assert plan.index.shape == (batch, where.k)
    assert rows.shape == (batch, where.k, 16)
    assert torch.isfinite(rows).all()
    for row in plan.index.tolist():
        assert len(set(row)) == where.k
        assert set(row) <= set(range(where.n))
    if isinstance(plan, Merge):
        assert torch.cat([plan.index, plan.sources], 1).sort(-1).values.tolist() == [list(range(where.n))] * batch
        assert bool(((plan.slots >= 0) & (plan.slots < where.k)).all())
    if isinstance(plan, Keep) and plan.ordered:
        assert plan.index.tolist() == plan.index.sort(-1).values.tolist()
    if sizes is not None:
        assert sizes.sum(1).tolist() == taps["size"][:, where.prefix :].sum(1).tolist()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
@settings(max_examples=10, **DRAWS)
@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
def test_keeping_all_changes_nothing(name, options, n, seed, kind):
    n *= options.get("frames", 1)
    recipe, taps = methods()[name], sequence(2, n, seed=seed, kind=kind)
    plan, rows, _ = run(recipe, taps, site(recipe, n, n, options=options))
    assert plan.index.tolist() == [list(range(n))] * 2
    assert torch.equal(rows, taps["x"])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
@settings(max_examples=20, **DRAWS)
@given(data=st.data())
def test_a_sample_does_not_see_its_batch(name, data):
    recipe = methods()[name]
    where, _, seed = data.draw(cases(recipe, DEFAULTS.get(name, {})))
    taps = sequence(3, where.prefix + where.n, seed=seed)
    plan, rows, _ = run(recipe, taps, where)
    for b in range(3):
        alone, alone_rows, _ = run(recipe, {tap: value[b : b + 1] for tap, value in taps.items()}, where)
        if where.n > 2:  # two tokens always tie in PiToMe's energy, up to rounding
            assert plan.index[b].tolist() == alone.index[0].tolist()
            torch.testing.assert_close(rows[b], alone_rows[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(max_examples=20, **DRAWS)
@given(data=st.data())
def test_shuffled_tokens_give_the_same_tokens(name, data):
    recipe = methods()[name]
    where, batch, seed = data.draw(cases(recipe, {}))
    taps = sequence(batch, where.n, seed=seed)
    order = torch.randperm(where.n, generator=torch.Generator().manual_seed(seed))
    shuffled = shuffle(taps, order)
    where = site(recipe, where.n, where.k, block=where.block, depth=where.depth)
    plan, rows = new_tokens(recipe, taps, where)
    again, again_rows = new_tokens(recipe, shuffled, where)
    if where.n > 2:
        assert order[again.index].sort(-1).values.tolist() == plan.index.sort(-1).values.tolist()
        torch.testing.assert_close(rows, again_rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "torch"])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
@settings(max_examples=10, **DRAWS)
@given(data=st.data())
def test_every_form_gives_the_same_tokens(name, options, form, data):
    recipe = methods()[name]
    where, batch, seed = data.draw(cases(recipe, options))
    taps = sequence(batch, where.prefix + where.n, seed=seed)
    plan, rows, sizes = run(recipe, taps, where)
    with use_forms(FORMS[form]):
        other, other_rows, other_sizes = run(recipe, taps, where)
    assert plan.index.tolist() == other.index.tolist()
    torch.testing.assert_close(rows, other_rows, rtol=0, atol=1e-5)
    if sizes is not None:
        assert sizes.tolist() == other_sizes.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_half_precision_keeps_its_type(name, options, form, dtype):
    recipe = methods()[name]
    where = site(recipe, 50, max(30, lowest(recipe, 50, options=options)), 1, options=options)
    taps = sequence(2, 51, dtype=dtype)
    with use_forms(FORMS[form]):
        plan, rows, sizes = run(recipe, taps, where)
    assert rows.dtype == dtype
    assert rows.shape == (2, 30, 16)
    assert torch.isfinite(rows).all()
    assert plan.index.dtype == torch.int64
    assert sizes is None or sizes.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_selects_as_float32_does(name):
    recipe = methods()[name]
    where = site(recipe, 50, 30, 1, options=DEFAULTS.get(name, {}))
    half = sequence(2, 51, dtype=torch.float16)
    wide = {tap: value.float() for tap, value in half.items()}
    plan, rows, _ = run(recipe, half, where)
    expected, expected_rows, _ = run(recipe, wide, where)
    assert plan.index.tolist() == expected.index.tolist()
    torch.testing.assert_close(rows.float(), expected_rows, rtol=0, atol=4e-3)


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_has_no_data_dependent_shape(name):
    recipe = methods()[name]
    where, taps = site(recipe, 20, 12, 1, options=DEFAULTS.get(name, {})), sequence(2, 21)

    class Plan(torch.nn.Module):
        def forward(self, taps):
            return run(recipe, taps, where)[1]

    program = torch.export.export(Plan(), (taps,), strict=False)
    assert torch.equal(program.module()(taps), run(recipe, taps, where)[1])
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {op for op in ops if any(word in op for word in ("nonzero", "_local_scalar", "aten.item", "masked"))}
