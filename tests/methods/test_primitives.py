"""The primitives against plain Python: ties, NaN, negative zero, empty selections, gathers, merges, assignments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.inputs import sequence
from tokcompile.primitives import (
    FORMS,
    apply,
    ascending,
    complement,
    constant,
    cosine,
    farthest_points,
    first_argmax,
    gather_rows,
    identity,
    keep_best,
    top_k,
    unit,
    use_forms,
)
from tokcompile.primitives.combine import assignment
from tokcompile.primitives.constant import copied, on_device
from tokcompile.recipe import Keep, Merge, Mix

FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 1e-45, -1e-45, 3.4e38, 0.5])


def stable(row, k):
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


def test_a_constant_is_copied_to_a_gpu_once_and_is_one_for_the_compiler():
    values = ((1.0, 2.0), (3.0, 4.0))
    assert torch.equal(constant([[1.0, 2.0], [3.0, 4.0]], torch.zeros(1)), torch.tensor(values))
    here = torch.device("cpu")
    assert copied(values, here) is copied(values, here)
    with torch.inference_mode():
        assert not copied(((5,),), here).is_inference()
    compiled = torch.compile(lambda x: x + on_device(values, x.device), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2, 2)), torch.tensor(values) + 1)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(rows=st.lists(st.lists(FEW, min_size=7, max_size=7), min_size=1, max_size=3), k=st.integers(0, 7))
def test_top_k_is_stable(rows, k):
    score = torch.tensor(rows)
    assert top_k(score, k).tolist() == [stable(row, k) for row in rows]
    assert keep_best(score, k).tolist() == [sorted(stable(row, k)) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_top_k_of_many_equal_scores(dtype):
    score = (torch.arange(2000) % 3).to(dtype)[None]
    assert top_k(score, 1000).tolist() == [[*range(2, 2000, 3), *range(1, 1001, 3)]]


def test_nan_of_either_sign_ranks_highest():
    minus_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32).item()
    score = torch.tensor([[1.0, float("nan"), float("inf"), 2.0, 3.0]])
    score[0, 3:4] = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    assert minus_nan != minus_nan
    assert top_k(score, 5).tolist() == [[1, 3, 2, 4, 0]]


@pytest.mark.parametrize("form", list(FORMS))
def test_top_k_agrees_where_nothing_ties(form):
    score = torch.randn(3, 197, generator=torch.Generator().manual_seed(0))
    with use_forms(FORMS[form]):
        assert top_k(score, 60).tolist() == [stable(row, 60) for row in score.tolist()]


@settings(deadline=None, derandomize=True)
@given(n=st.integers(1, 30), data=st.data())
def test_complement_is_what_is_left_out(n, data):
    rows = [data.draw(st.permutations(range(n))) for _ in range(2)]
    k = data.draw(st.integers(0, n))
    index = torch.tensor([row[:k] for row in rows], dtype=torch.int64).reshape(2, k)
    assert complement(index, n).tolist() == [sorted(row[k:]) for row in rows]
    assert ascending(index).tolist() == [sorted(row[:k]) for row in rows]


def test_identity_and_first_argmax():
    assert identity(torch.zeros(2, 3, 4)).tolist() == [[0, 1, 2]] * 2
    assert first_argmax(torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])).tolist() == [1, 0]


def farthest_by_loops(distance, seed, k):
    picks = [seed]
    while len(picks) < k:
        free = [j for j in range(len(distance)) if j not in picks]
        picks.append(max(free, key=lambda j: (min(distance[s][j] for s in picks), -j)))
    return picks


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (9, 9), (30, 12)])
def test_farthest_points_equals_the_loops(n, k, levels, form):
    g = torch.Generator().manual_seed(n)
    distance = torch.randint(0, levels, (3, n, n), generator=g).float()
    seed = torch.randint(0, n, (3,), generator=g)
    with use_forms(FORMS[form]):
        picks = farthest_points(distance, seed, k).tolist()
    assert picks == [farthest_by_loops(d.tolist(), int(s), k) for d, s in zip(distance, seed, strict=True)]


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_gather_rows_takes_rows(batch, shape, form):
    x = torch.arange(batch * 6 * max(1, torch.Size(shape).numel())).reshape(batch, 6, *shape)
    index = torch.tensor([[4, 0, 4], [1, 2, 3], [5, 5, 0]])[:batch]
    with use_forms(FORMS[form]):
        assert torch.equal(gather_rows(x, index), torch.stack([x[b, index[b]] for b in range(batch)]))


def test_cosine_is_float32_and_zero_for_empty_rows():
    a = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.float16)
    assert unit(a).dtype == torch.float32
    torch.testing.assert_close(cosine(a, a), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))


MERGE = Merge(torch.tensor([[1, 3, 0], [4, 1, 2]]), torch.tensor([[2, 4], [0, 3]]), torch.tensor([[0, 0], [2, 0]]))


@pytest.mark.parametrize("form", list(FORMS))
def test_merge_is_the_size_weighted_mean_of_each_group(form):
    taps = sequence(2, 5, seed=1)
    x, size = taps["x"], taps["size"]
    groups = [[[1, 2, 4], [3], [0]], [[4, 3], [1], [2, 0]]]
    with use_forms(FORMS[form]):
        rows, sizes = apply(MERGE, x, size)
    for b in range(2):
        for slot, group in enumerate(groups[b]):
            weight = size[b, group]
            assert sizes[b, slot] == weight.sum()
            torch.testing.assert_close(rows[b, slot], (weight @ x[b, group]) / weight.sum())


def test_merge_without_sizes_is_the_plain_mean():
    x = sequence(2, 5)["x"]
    ones = apply(MERGE, x, torch.ones(2, 5))
    assert torch.equal(apply(MERGE, x, None)[0], ones[0])


@pytest.mark.parametrize("form", list(FORMS))
def test_the_mean_of_large_values_is_no_infinity_in_half_precision(form):
    plan = Merge(torch.tensor([[0]]), torch.tensor([[1, 2]]), torch.tensor([[0, 0]]))
    with use_forms(FORMS[form]):
        rows, _ = apply(plan, torch.full((1, 3, 4), 1e4, dtype=torch.float16), torch.tensor([[1.0, 90.0, 5.0]]))
    torch.testing.assert_close(rows.float(), torch.full((1, 1, 4), 1e4), rtol=2e-3, atol=0)


def test_mix_and_extra_tokens_are_weighted_sums():
    taps = sequence(2, 4)
    x, size = taps["x"], taps["size"]
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]).expand(2, -1, -1)
    index = torch.tensor([[0, 3]] * 2)
    rows, sizes = apply(Mix(index, weights), x, size)
    torch.testing.assert_close(rows, torch.stack([(x[:, 0] + x[:, 1]) / 2, 2 * x[:, 3]], 1))
    torch.testing.assert_close(sizes, torch.stack([(size[:, 0] + size[:, 1]) / 2, 2 * size[:, 3]], 1))
    rows, sizes = apply(Keep(index, ordered=False, extra=weights[:, :1]), x, None)
    torch.testing.assert_close(rows, torch.stack([x[:, 0], (x[:, 0] + x[:, 1]) / 2], 1))
    assert sizes is None


def test_assignment_of_merged_tokens_is_their_group():
    assert assignment(MERGE, torch.zeros(2, 5, 1)).tolist() == [[2, 0, 0, 1, 0], [2, 1, 2, 0, 0]]


def test_assignment_of_dropped_tokens_is_the_most_similar_kept_one():
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [1.0, 0.0]]])
    assert assignment(Keep(torch.tensor([[4, 2, 0]])), x).tolist() == [[2, 0, 1, 1, 0]]


def test_assignment_of_mixed_tokens_is_the_largest_weight():
    weights = torch.tensor([[[0.9, 0.2, 0.5], [0.1, 0.8, 0.5]]])
    assert assignment(Mix(torch.tensor([[0, 1]]), weights), torch.zeros(1, 3, 1)).tolist() == [[0, 1, 0]]


def test_forms_are_restored():
    from tokcompile.primitives import current_forms

    with pytest.raises(ValueError, match="inside"), use_forms(FORMS["tensorrt"]):
        raise ValueError("inside")
    assert current_forms() == FORMS["torch"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_many_tokens_that_join_one_are_rounded_once(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    x, size = torch.randn(2, 200, 8, generator=g).to(dtype), torch.randint(1, 5, (2, 200), generator=g).float()
    order = torch.stack([torch.randperm(200, generator=g) for _ in range(2)])
    plan = Merge(order[:, :2], order[:, 2:], torch.randint(0, 2, (2, 198), generator=g))
    new, _ = apply(plan, x, size)
    want, _ = apply(plan, x.double(), size.double())
    assert new.dtype == dtype
    assert (new.double() - want).abs().max() <= tolerance * want.abs().max()
