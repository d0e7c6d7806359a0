"""EVS against plain loops."""

import pytest
import torch

from tests.methods.inputs import run, sequence, site
from tests.reference.evs import evs
from tokcompile.errors import MethodError
from tokcompile.methods.evs import EVS, least


def compare(taps, where, frames):
    plan, rows, _ = run(EVS, taps, where)
    x = taps["x"][:, where.prefix : where.prefix + where.n]
    for b in range(x.shape[0]):
        expected = evs(x[b].numpy(), frames, where.k)
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b], x[b, expected])


@pytest.mark.parametrize(("batch", "prefix"), [(1, 0), (3, 5)])
@pytest.mark.parametrize(("frames", "patches"), [(2, 9), (5, 30), (16, 36), (7, 1)])
def test_equals_the_loops(frames, patches, batch, prefix):
    taps, n = sequence(batch, prefix + frames * patches + 3, seed=frames), frames * patches
    for k in {patches, patches + 1, n // 2 + patches // 2, n - 1}:
        compare(taps, site(EVS, n, k, prefix, options={"frames": frames}), frames)


@pytest.mark.parametrize("kind", ["ties", "constant"])
def test_equal_changes_go_to_the_earlier_frame(kind):
    compare(sequence(3, 40, seed=4, kind=kind), site(EVS, 40, 17, options={"frames": 5}), 5)


def test_a_grid_of_three_axes_says_how_many_frames_there_are():
    compare(sequence(2, 40, seed=1), site(EVS, 40, 17, grid=(5, 2, 4)), 5)


def test_a_still_video_keeps_its_first_frame():
    taps = sequence(1, 12, seed=2)
    taps["x"] = taps["x"][:, :3].repeat(1, 4, 1)
    assert run(EVS, taps, site(EVS, 12, 3, options={"frames": 4}))[0].index.tolist() == [[0, 1, 2]]


def test_what_is_no_video_is_refused():
    for options, grid in (({}, None), ({}, (4, 4)), ({"frames": 5}, None), ({"frames": 0}, None), ({"frames": "4"}, None)):
        with pytest.raises(MethodError, match="nothing says how many these 16 tokens are: frames="):
            run(EVS, sequence(1, 16), site(EVS, 16, 8, grid=grid, options=options))
    with pytest.raises(MethodError, match="always keeps the first frame"):
        run(EVS, sequence(1, 16), site(EVS, 16, 3, options={"frames": 4}))
    assert [least(16, {"frames": frames}) for frames in (4, None, 0, "4")] == [4, 1, 1, 1]
