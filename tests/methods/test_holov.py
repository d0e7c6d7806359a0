"""HoloV against plain loops: the chunks, their shares, and what is kept in each."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.holov import holov, quotas
from tokcompile.errors import MethodError
from tokcompile.methods.holov import HOLOV, allot, chunks


def compare(taps, where):
    plan, rows, _ = run(HOLOV, taps, where)
    x, attention = taps["x"][:, where.prefix :], taps["cls_attention"][:, :, where.prefix :]
    for b in range(x.shape[0]):
        expected = holov(attention[b].numpy(), x[b].numpy(), where.k, where.options["groups"], where.options["alpha"])
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize("groups", [16, 7])
@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix, groups):
    n = length - prefix
    compare(sequence(batch, length, seed=length), site(HOLOV, n, n // 9, prefix, options={"groups": groups}))


@pytest.mark.parametrize("n", [2, 3, 8, 11])
def test_every_count(n):
    for k in range(1, n):
        compare(sequence(2, n, seed=k), site(HOLOV, n, k, options={"groups": 4}))


@pytest.mark.parametrize("kind", ["ties", "constant"])
@pytest.mark.parametrize("k", [1, 9, 30])
def test_duplicated_tokens_go_to_the_lower_index(kind, k):
    compare(sequence(3, 37, seed=6, kind=kind), site(HOLOV, 37, k, options={"groups": 5}))


def test_what_a_full_chunk_cannot_use_goes_to_the_others():
    taps = sequence(2, 40, seed=1)
    taps["cls_attention"][:, :, :10] *= 50
    where = site(HOLOV, 40, 20, options={"groups": 4})
    compare(taps, where)
    _, counts = quotas(taps["cls_attention"][0].numpy(), taps["x"][0].numpy(), 20, 4, 0.09)
    assert counts[0] > 10
    assert run(HOLOV, taps, where)[0].index[0, :10].tolist() == list(range(10))


@pytest.mark.parametrize(("n", "groups", "expected"), [(577, 16, [37] + [36] * 15), (9, 16, [3, 2, 2, 2]), (3, 4, [3])])
def test_chunks(n, groups, expected):
    runs = chunks(n, groups)
    assert [len(part) for part in runs] == expected
    assert [j for part in runs for j in part] == list(range(n))


def test_what_is_left_goes_to_the_largest_shares():
    assert allot(torch.tensor([[1.0, 4.0, 2.0, 4.0]]), 10).tolist() == [[0, 4, 2, 4]]
    assert allot(torch.tensor([[3.0, 3.0, 3.0]]), 8).tolist() == [[3, 3, 2]]


def test_no_group_is_refused():
    with pytest.raises(MethodError, match="at least one group, not 0"):
        run(HOLOV, sequence(1, 8), site(HOLOV, 8, 4, options={"groups": 0}))
