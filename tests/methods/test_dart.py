"""DART against plain loops."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.dart import dart
from tokcompile.errors import MethodError
from tokcompile.methods.dart import DART, quotas


def compare(taps, where):
    plan, rows, _ = run(DART, taps, where)
    x, keys, hidden = taps["x"][:, where.prefix :], taps["rotated_k"][:, :, where.prefix :], taps["normed"][:, where.prefix :]
    for b in range(x.shape[0]):
        expected = dart(keys[b].numpy(), hidden[b].numpy(), where.k, where.options["pivots"])
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize("pivots", [4, 7])
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1), (1, 2)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix, pivots):
    n = length - prefix
    compare(sequence(batch, length, seed=length), site(DART, n, n // 3, prefix, options={"pivots": pivots}))


@pytest.mark.parametrize(("pivots", "text_pivots"), [(4, 4), (2, 5), (4, 0), (1, 20)])
@pytest.mark.parametrize(("batch", "start", "n", "text"), [(1, 0, 63, 9), (2, 5, 196, 30), (3, 1, 40, 3)])
def test_pivots_in_the_text_after_the_image(batch, start, n, text, pivots, text_pivots):
    taps, k = sequence(batch, start + n + text, seed=n), n // 3
    around = ((0, start), (start + n, start + n + text))
    options = {"pivots": pivots, "text_pivots": text_pivots}
    plan, _, _ = run(DART, taps, site(DART, n, k, start, text=around, options=options))
    for b in range(batch):
        keys, hidden = taps["rotated_k"][b].numpy(), taps["normed"][b].numpy()
        assert plan.index[b].tolist() == dart(keys, hidden, k, pivots, start, n, text_pivots)


def test_the_text_decides_what_is_kept():
    taps = sequence(1, 120, seed=3)
    kept = [run(DART, taps, site(DART, 96, 30, 4, text=text))[0].index for text in ((), ((100, 120),), ((0, 4),))]
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])  # the system prompt before the image gives no pivots


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_every_count(n):
    for k in range(1, n + 1):
        compare(sequence(2, n, seed=k), site(DART, n, k))


@pytest.mark.parametrize("kind", ["ties", "constant"])
def test_duplicated_tokens_go_to_the_lower_index(kind):
    compare(sequence(3, 40, seed=4, kind=kind), site(DART, 40, 17))


@pytest.mark.parametrize(("total", "pivots", "expected"), [(60, 4, [15] * 4), (10, 4, [3, 3, 2, 2]), (1, 3, [1, 0, 0])])
def test_quotas(total, pivots, expected):
    assert quotas(total, pivots) == expected


def test_no_pivot_is_refused():
    for wrong in ({"pivots": 0}, {"text_pivots": -1}):
        with pytest.raises(MethodError, match="at least one pivot and no negative number of text pivots"):
            run(DART, sequence(1, 8), site(DART, 8, 4, options=wrong))
