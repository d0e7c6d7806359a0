"""The kernels of methods, compiled for the host with a block's threads as threads, against the reductions in plain PyTorch."""

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.kernels import HALF, TYPES, Case, Shape, call, library, pointer, text_of
from tests.reference.dart import dart as loops
from tokcompile.methods import dart, divprune, evit, fastv, pitome, tome, topk


def pitome_options(variant, margin=0.75, alpha=1.0):
    return {"variant": variant, "margin": margin}, {"all": int(variant == "B"), "margin": margin, "alpha": alpha}


METHODS = {  # recipe, kernel, the recipe's options and the kernel's
    "fastv": (fastv.FASTV, "topk", {}, {"fuse": 0}),
    "dart": (dart.DART, "dart", {}, {"pivots": 4}),
    "dart1": (dart.DART, "dart", {"pivots": 1}, {"pivots": 1}),
    "dart7": (dart.DART, "dart", {"pivots": 7}, {"pivots": 7}),
    "topk": (topk.TOPK, "topk", {}, {"fuse": 0}),
    "evit": (evit.EVIT, "topk", {"fuse": True}, {"fuse": 1}),
    "tome": (tome.TOME, "tome", {}, {}),
    "pitome_p": (pitome.PITOME, "pitome", *pitome_options("P")),
    "pitome_b": (pitome.PITOME, "pitome", *pitome_options("B", 0.3)),
    "divprune": (divprune.DIVPRUNE, "divprune", {}, {}),
}
SHAPES = {
    "plain": dict(batch=1, n=63, before=1, dim=24, heads=3, head_dim=8),
    "odd": dict(batch=3, n=50, before=0, after=2, dim=17, heads=2, head_dim=5),
    "shifted": dict(batch=3, n=33, before=2, after=3, shift=3, dim=8, heads=1, head_dim=16, sizes=False),
    "groups": dict(batch=1, n=21, before=1, after=1, unit=4, shift=2, dim=16, heads=2, head_dim=8),
    "odd groups": dict(batch=3, n=20, before=0, unit=4, dim=7, heads=2, head_dim=3),
}


def counts(name, n):
    """Few, half, all but one, and all of n; merging leaves half at least."""
    least = n - n // 2 if METHODS[name][1] in ("tome", "pitome") else 1 + (name == "evit")
    return sorted({least, max(least, n // 3), (n + 1) // 2 + 1, n - 1, n})


def compare(case, got, dtype):
    """Equal indices, sizes and assignments, values within rounding; near ties excused where noise moves them too."""
    code, out, index, sizes, slots = got
    assert code == 0
    new, want_index, want_sizes, want_slots = case.expected()
    if not torch.equal(index, want_index):
        assert case.unstable(1)
        return False
    if not torch.equal(slots, want_slots):
        assert case.unstable(3)
    if want_sizes is not None:
        torch.testing.assert_close(sizes, want_sizes, rtol=0, atol=0)
    if dtype in HALF:  # the same in float32, where the selection is the same: the reference's own roundings add up
        full = case.expected(dtype=torch.float32)
        new, loose = (full[0], 1) if torch.equal(full[1], index) else (new, 4)
        torch.testing.assert_close(out.float(), new.float(), rtol=0, atol=loose * HALF[dtype] * new.abs().max().item())
    else:
        torch.testing.assert_close(out, new, rtol=0, atol=1e-5 * new.abs().max().item())
    return True


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_same_as_the_reference(method, shape, dtype):
    same = []
    for i, k in enumerate(counts(method, SHAPES[shape]["n"])):
        case = Case(*METHODS[method], **SHAPES[shape], k=k, dtype=dtype, seed=i)
        same.append(compare(case, case.run(), dtype))
    assert sum(same) >= len(same) - 1  # near ties are rare


@pytest.mark.parametrize("shape", ["plain", "odd", "groups"])
@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("pitome")])
def test_ties_go_to_the_lower_index(method, shape):
    """Cosines of these rows are exact in float32, so equal scores are equal in every order of summing."""
    size = SHAPES[shape] | dict(dim=16, heads=1, head_dim=16)
    for k in counts(method, size["n"]):
        case = Case(*METHODS[method], **size, k=k, kind="ties", seed=k)
        code, _, index, _, slots = case.run()
        assert code == 0
        _, want, _, want_slots = case.expected()
        assert torch.equal(index, want)
        assert torch.equal(slots, want_slots)


# -- DART with pivots from text --------------------------------------------------------------------------------------------

TEXTS = {  # where the text is around the image, which is n tokens from 3 on in taps of n + 3 + after
    "after": dict(before=3, after=9, text=lambda n: [(0, 3), (n + 3, n + 12)]),
    "two runs": dict(before=3, after=20, text=lambda n: [(0, 3), (n + 4, n + 6), (n + 11, n + 23)]),
    "one token": dict(before=3, after=5, text=lambda n: [(n + 7, n + 8)]),
    "before alone": dict(before=3, after=0, text=lambda n: [(0, 3)]),
    "shorter x": dict(before=1, shift=2, after=11, text=lambda n: [(n + 3, n + 9), (n + 12, n + 14)]),
}


def with_text(text, pivots, text_pivots, *, n, **size):
    given = {**TEXTS[text], "text": TEXTS[text]["text"](n), **size}
    return Case(dart.DART, "dart", {"pivots": pivots, "text_pivots": text_pivots}, {"pivots": pivots}, n=n, **given)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("pivots", "text_pivots"), [(4, 4), (1, 7), (5, 30), (40, 2)])
def test_pivots_from_text(text, pivots, text_pivots, dtype):
    same = []
    for i, (batch, n, k, dim) in enumerate([(1, 63, 20, 24), (3, 50, 33, 17), (2, 37, 9, 8), (1, 40, 3, 16), (2, 33, 32, 5)]):
        size = dict(n=n, batch=batch, k=k, dim=dim, head_dim=5 + 3 * (i % 2))
        case = with_text(text, pivots, text_pivots, **size, dtype=dtype, seed=i)
        same.append(compare(case, case.run(), dtype))
    assert sum(same) >= 4


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d)[6:])
def test_ties_with_pivots_from_text(text, dtype):
    """The plain loops of tests/reference as well, in which each tie goes to the lower index."""
    for k in (5, 17, 40):
        case = with_text(text, 3, 4, n=45, k=k, batch=2, dim=16, heads=1, head_dim=16, kind="ties", seed=k, dtype=dtype)
        code, _, index, _, slots = case.run()
        _, want, _, want_slots = case.expected()
        assert code == 0
        assert torch.equal(index, want)
        assert torch.equal(slots, want_slots)


def test_the_text_is_all_that_follows_in_the_plain_loops():
    for seed, (n, k, pivots, text_pivots) in enumerate([(29, 12, 4, 4), (40, 9, 2, 6), (33, 30, 1, 20), (17, 5, 5, 1)]):
        case = with_text("after", pivots, text_pivots, n=n, k=k, batch=3, seed=seed)
        index = case.run()[2]
        normed, keys = case.taps
        for b in range(3):
            want = loops(keys[b].double().numpy(), normed[b].double().numpy(), k, pivots, 3, n, text_pivots)
            assert index[b].tolist() == want


def test_text_changes_what_is_kept():
    with_it, without = (with_text("after", 4, count, n=63, k=20).run()[2] for count in (4, 0))
    assert not torch.equal(with_it, without)


def test_text_that_makes_no_sense():
    case = with_text("after", 4, 4, n=40, k=20)
    for pivots, spans in [(4, [(50, 40)]), (4, [(45, 53)]), (4, [(46, 48), (44, 45)]), (-1, [(43, 52)]), (1025, [(43, 52)])]:
        case.kernel_options = {"pivots": 4, "text": text_of(pivots, spans)}
        assert library().tc_dart_workspace(ctypes.byref(case.shape), 4, case.kernel_options["text"]) == 0
        assert call("dart", case.shape, case.x, None, case.taps, case.kernel_options)[0] == 1
    case.shape.unit, case.shape.n, case.shape.k = 2, 20, 10
    assert call("dart", case.shape, case.x, None, case.taps, {"pivots": 4, "text": text_of(4, [(43, 52)])})[0] == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_input_with_text_gives_distinct_indices(data):
    n = data.draw(st.integers(2, 24))
    k, dtype = data.draw(st.integers(1, n)), data.draw(st.sampled_from(TYPES))
    pivots, text_pivots = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 9))
    text = data.draw(st.sampled_from(sorted(TEXTS)))
    case = with_text(text, pivots, text_pivots, n=n, k=k, batch=2, dim=4, head_dim=4, dtype=dtype)
    for t in case.taps:
        for value in data.draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 6e4]), max_size=6)):
            t.view(-1)[data.draw(st.integers(0, t.numel() - 1))] = value
    code, _, index, _, slots = case.run()
    assert code == 0
    assert torch.equal(index, index.sort(-1).values)
    assert all(len(set(row)) == k and row[0] >= 0 and row[-1] < n for row in index.tolist())
    assert torch.equal(slots.gather(1, index), torch.arange(k).expand(2, -1))


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("pitome")])
def test_rows_of_zeros(method):
    """Padding has no direction: its cosines are 0, not NaN."""
    case = Case(*METHODS[method], n=40, k=21, dim=16, heads=1, head_dim=16, kind="ties")
    zero = torch.arange(case.x.shape[1]) % 3 == 0
    case.x[:, zero] = 0
    for tap in case.taps:
        (tap if tap.shape[1] == len(zero) else tap[:, 0])[:, zero] = 0
    assert compare(case, case.run(), torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_kept_rows_are_copied_bit_by_bit(method):
    """Around the tokens and among the kept ones; merged and fused ones are not in this comparison."""
    for dtype in TYPES:
        case = Case(*METHODS[method], n=30, k=24, before=2, after=3, dtype=dtype)
        _, out, index, _, slots = case.run()
        assert torch.equal(out[:, :2], case.x[:, :2])
        assert torch.equal(out[:, -3:], case.x[:, -3:])
        members = torch.zeros(1, 24).scatter_add(1, slots, torch.ones(1, 30))
        alone = (members == 1) if METHODS[method][1] in ("tome", "pitome") else torch.arange(24)[None] < 23
        kept = case.x[:, 2:32].gather(1, index[..., None].expand(-1, -1, 16))
        assert torch.equal(out[:, 2:-3][alone], kept[alone])


@pytest.mark.parametrize("method", METHODS)
def test_threads_of_a_block_do_not_matter(method):
    case = Case(*METHODS[method], **SHAPES["plain"], k=40)
    results = []
    try:
        for threads in (1, 3, 4, 8, 64):
            assert library().tc_host_threads(threads) == 0
            results.append(case.run())
    finally:
        library().tc_host_threads(4)
    for other in results[1:]:
        assert all(a is b is None or torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(results[0], other))


@pytest.mark.parametrize("method", METHODS)
def test_without_assign(method):
    case = Case(*METHODS[method], k=21)
    for a, b in zip(case.run()[1:4], case.run(assign=False)[1:4]):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("dart", dict(n=2880, k=480, dim=8, heads=1, head_dim=4)),
        ("topk", dict(n=16384, k=4096, dim=1)),
        ("evit", dict(n=3000, k=1500, dim=8)),
        ("tome", dict(n=2200, k=1500, dim=2, heads=1, head_dim=16)),
        ("tome", dict(n=2200, k=1500, dim=2, heads=1, head_dim=16, before=0)),
        ("pitome_p", dict(n=1100, k=900, dim=2, heads=1, head_dim=16)),
        ("divprune", dict(n=1100, k=60, dim=16)),
    ],
)
def test_large(method, size):
    """More than one tile, chunk and thread each; near ties are common here, so the noise test may decide."""
    case = Case(*METHODS[method], **size)
    case.module.needs_assign = assign = method not in ("topk", "dart", "evit")
    code, out, index, _, _ = case.run(assign=assign)
    assert code == 0
    new, want, _, _ = case.expected()
    if torch.equal(index, want):
        torch.testing.assert_close(out, new, rtol=0, atol=1e-5 * new.abs().max().item())
    else:
        assert case.unstable(1)


# -- any input -------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.integers(2, 24), st.data())
def test_any_input_gives_distinct_indices(method, n, data):
    """NaN and infinity anywhere: k different indices in range, every token assigned, sizes conserved by merging."""
    k = data.draw(st.integers(counts(method, n)[0], n))
    dtype = data.draw(st.sampled_from(TYPES))
    size = dict(batch=2, n=n, k=k, before=data.draw(st.integers(0, 2)), unit=data.draw(st.sampled_from([1, 2])), dim=4)
    case = Case(*METHODS[method], **size, head_dim=4, dtype=dtype, seed=data.draw(st.integers(0, 99)))
    for t in (case.x, *case.taps):
        for value in data.draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 6e4]), max_size=6)):
            t.view(-1)[data.draw(st.integers(0, t.numel() - 1))] = value
    code, _, index, sizes, slots = case.run()
    assert code == 0
    assert index.min() >= 0
    assert index.max() < n
    assert all(len(set(row)) == k for row in index.tolist())
    assert slots.min() >= 0
    assert slots.max() < k
    assert torch.equal(slots.gather(1, index), torch.arange(k).expand(2, -1))
    if method not in ("tome", "pitome_p", "pitome_b", "evit"):
        assert torch.equal(index, index.sort(-1).values)
    if METHODS[method][1] in ("tome", "pitome"):
        assert torch.equal(sizes, torch.zeros(2, k).scatter_add(1, slots, case.size))
    elif sizes is not None:
        assert torch.equal(sizes, case.size.gather(1, index))


REFUSED = {
    "dtype": dict(dtype=3),
    "no batch": dict(batch=0),
    "no tokens": dict(n=0),
    "nothing kept": dict(k=0),
    "more kept than there are": dict(k=41),
    "no group": dict(unit=0),
    "before the first row": dict(start=-1),
    "past the last row": dict(start=2),
    "overflow": dict(unit=4096, n=16384, k=16384),
    "too wide": dict(dim=8193),
}
REFUSED_TAPS = {"taps too short": dict(tap_length=40), "before the taps": dict(tap_start=-1), "no heads": dict(heads=0)}


@pytest.mark.parametrize("method", METHODS)
def test_arguments_that_make_no_sense(method):
    """They give cudaErrorInvalidValue, and nothing is written."""
    bad = REFUSED | (REFUSED_TAPS if method != "divprune" else {})
    if METHODS[method][1] in ("tome", "pitome"):
        bad = bad | {"more merged than half": dict(k=19), "too many": dict(n=16385, k=16000, length=20000, tap_length=20000)}
    if METHODS[method][1] in ("dart", "tome", "pitome"):
        bad = bad | {"no width": dict(head_dim=0)}
    for what, changes in bad.items():
        case = Case(*METHODS[method], n=40, k=20)
        shape = Shape(**{f: changes.get(f, getattr(case.shape, f)) for f, _ in Shape._fields_})
        numbers = {"dart": [4, None], "topk": [0], "pitome": [1, ctypes.c_float(0), ctypes.c_float(1)]}.get(case.kernel, [])
        outputs = [torch.full((4,), 7.0) for _ in range(12)]
        function = getattr(library(), f"tc_{case.kernel}")
        count = 6 + len(case.taps) + 2 * (case.kernel in ("topk", "tome", "pitome"))
        assert function(ctypes.byref(shape), *numbers, *map(pointer, outputs[: count - 1]), None) == 1, what
        assert all((t == 7).all() for t in outputs), what


@pytest.mark.parametrize("method", METHODS)
def test_missing_pointers(method):
    case = Case(*METHODS[method], n=40, k=20)
    for missing in range(len(case.taps)):
        taps = [None if i == missing else t for i, t in enumerate(case.taps)]
        assert call(case.kernel, case.shape, case.x, None, taps, case.kernel_options)[0] == 1
    assert call("dart", case.shape, case.x, None, [None, None], {"pivots": 0})[0] == 1
