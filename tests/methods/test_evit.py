"""EViT against plain loops: the kept tokens, the fused one, the published counts."""

import pytest
import torch

from tests.methods.inputs import LENGTHS, lowest, run, sequence, site
from tests.reference.evit import evit
from tests.reference.topk import topk
from tokcompile.methods.evit import EVIT


def compare(taps, where):
    plan, rows, _ = run(EVIT, taps, where)
    assert plan.index.shape[1] == rows.shape[1] == where.k
    x, attention = taps["x"][:, where.prefix :], taps["cls_attention"][:, :, where.prefix :]
    for b in range(x.shape[0]):
        best, fused = evit(attention[b].numpy(), x[b].numpy(), where.k - 1)
        assert plan.index[b].tolist() == [*sorted(best), topk(attention[b].numpy(), where.k)[-1]]
        assert torch.equal(rows[b, :-1], x[b, sorted(best)])
        torch.testing.assert_close(rows[b, -1].double(), torch.from_numpy(fused), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix):
    n = length - prefix
    compare(sequence(batch, length, seed=length), site(EVIT, n, n // 2, prefix))


@pytest.mark.parametrize("n", [3, 8])
def test_every_count_with_fusion(n):
    for k in range(lowest(EVIT, n), n):
        compare(sequence(2, n, seed=k), site(EVIT, n, k, 0))


@pytest.mark.parametrize("kind", ["ties", "constant"])
def test_duplicated_tokens_go_to_the_lower_index(kind):
    compare(sequence(3, 40, seed=6, kind=kind), site(EVIT, 40, 17))


@pytest.mark.parametrize("k", [1, 7, 20])
def test_without_fusion_it_only_keeps(k):
    taps = sequence(3, 20)
    plan, rows, _ = run(EVIT, taps, site(EVIT, 20, k, options={"fuse": False}))
    expected = [sorted(topk(a.numpy(), k)) for a in taps["cls_attention"]]
    assert plan.index.tolist() == expected
    assert rows.shape[1] == k


def test_the_published_counts():
    counts = [196]
    for step in range(3):
        counts.append(EVIT.steps.rate(counts[-1], 196, 0.7, step))
    assert counts[1:] == [139, 99, 71]


def test_nothing_is_fused_where_everything_is_kept():
    plan, rows, _ = run(EVIT, sequence(2, 9), site(EVIT, 9, 9))
    assert plan.extra is None
    assert torch.equal(rows, sequence(2, 9)["x"])
