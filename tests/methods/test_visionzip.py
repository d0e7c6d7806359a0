"""VisionZip against plain loops: the dominant tokens, the targets, and what joins them."""

import numpy as np
import pytest
import torch

from tests.methods.inputs import LENGTHS, run, sequence, site
from tests.reference.visionzip import visionzip
from tokcompile.errors import MethodError
from tokcompile.methods.visionzip import VISIONZIP, contextual_count


def compare(taps, where):
    plan, rows, _ = run(VISIONZIP, taps, where)
    count = contextual_count(where)
    x = taps["x"][:, where.prefix :]
    attention, keys = (taps[name][:, :, where.prefix :] for name in ("cls_attention", "k"))
    for b in range(x.shape[0]):
        expected, fused = visionzip(attention[b].numpy(), keys[b].numpy(), x[b].numpy(), where.k - count, count)
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b, : where.k - count], x[b, expected[: where.k - count]])
        if count:
            got = rows[b, where.k - count :].double()
            torch.testing.assert_close(got, torch.from_numpy(np.stack(fused)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loops(length, batch, prefix):
    n = length - prefix
    compare(sequence(batch, length, seed=length), site(VISIONZIP, n, n // 9, prefix))


@pytest.mark.parametrize("contextual", [0.0, 10 / 64, 0.7, 1.0])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_every_count(n, contextual):
    for k in range(1, n):
        compare(sequence(2, n, seed=k), site(VISIONZIP, n, k, options={"contextual": contextual}))


@pytest.mark.parametrize("kind", ["ties", "constant"])
def test_duplicated_tokens_go_to_the_lower_index(kind):
    compare(sequence(3, 41, seed=6, kind=kind), site(VISIONZIP, 41, 18, options={"contextual": 0.3}))


@pytest.mark.parametrize(("k", "contextual"), [(63, 10), (127, 20), (191, 30), (1, 0), (3, 0), (4, 1)])
def test_the_published_pairs(k, contextual):
    assert contextual_count(site(VISIONZIP, 576, k)) == contextual


def test_a_share_outside_of_its_range_is_refused():
    for wrong in (-0.1, 1.5):
        with pytest.raises(MethodError, match="a share between 0 and 1"):
            run(VISIONZIP, sequence(1, 8), site(VISIONZIP, 8, 4, options={"contextual": wrong}))
