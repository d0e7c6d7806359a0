"""Where patches go: counted against the plan, against the sizes that the model itself carries, and by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import tokcompile
from tokcompile.demo.trackers import Stage, after, follow, moved, per_block, places, untouched
from tokcompile.passes.reduction import ReductionModule

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
PATCHES = 49


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    made = timm.models.vision_transformer.VisionTransformer(
        img_size=56, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    return made.eval()


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["tome", "pitome"])
def merged(request, model, image):
    return tokcompile.optimize(model, (image,), method=request.param, budget=0.3)


@pytest.fixture(params=["topk", "dart", "random", "evit"])
def pruned(request, model, image):
    return tokcompile.optimize(model, (image,), method=request.param, budget=0.3)


def run_and_collect(model, image, number):
    """The `number`-th result of every reduction, read by hooks of our own."""
    found = []
    hooks = [
        m.register_forward_hook(lambda m, args, results: found.append(results[number][0].numpy()))
        for m in model.graph_module.modules()
        if isinstance(m, ReductionModule)
    ]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return found


def test_merging_accounts_for_every_patch(merged, image):
    stages = follow(merged, image)
    assert [s.count for s in stages] == [r.k for r in merged.plan.reductions]
    assert [s.block for s in stages] == [r.block for r in merged.plan.reductions]
    for stage, sizes in zip(stages, run_and_collect(merged, image, 2), strict=True):
        assert stage.merging
        assert (stage.owner >= 0).all()
        np.testing.assert_array_equal(stage.sizes, sizes)
        assert stage.sizes.sum() == PATCHES


def test_merged_patches_stay_together(merged, image):
    stages = follow(merged, image)
    for before, now in pairwise(stages):
        for token in range(before.count):
            assert len(set(now.owner[before.owner == token])) == 1


def test_pruning_keeps_what_the_indices_say(pruned, image):
    stages = follow(pruned, image)
    kept = np.arange(PATCHES)
    for stage, index, reduction in zip(
        stages, run_and_collect(pruned, image, 1), pruned.plan.reductions, strict=True
    ):  # fmt: skip
        kept = kept[index]
        assert not stage.merging
        assert stage.count == reduction.k == len(kept)
        np.testing.assert_array_equal(stage.owner[kept], np.arange(len(kept)))
        assert (stage.owner >= 0).sum() == len(kept)


def test_following_leaves_the_model_as_it_was(pruned, image):
    with torch.no_grad():
        before = pruned(image)
        flags = [m.needs_assign for m in pruned.graph_module.modules() if isinstance(m, ReductionModule)]
        follow(pruned, image)
        torch.testing.assert_close(pruned(image), before, rtol=0, atol=0)
    assert [m.needs_assign for m in pruned.graph_module.modules() if isinstance(m, ReductionModule)] == flags


def test_by_hand():
    np.testing.assert_array_equal(places(np.array([3, 0]), 4), [1, -1, -1, 0])
    owner = moved(np.arange(4), np.array([0, 1, 0, 1]))
    np.testing.assert_array_equal(owner, [0, 1, 0, 1])
    np.testing.assert_array_equal(moved(owner, places(np.array([1]), 2)), [-1, 0, -1, 0])
    np.testing.assert_array_equal(moved(np.array([-1, 0]), np.array([0])), [-1, 0])
    assert Stage(0, "", 2, True, owner).sizes.tolist() == [2, 2]


def test_counts_at_the_end_of_each_block():
    stages = [
        Stage(1, "topk", 3, False, np.array([0, 1, 2, -1])),
        Stage(3, "topk", 1, False, np.array([0, -1, -1, -1])),
    ]
    assert per_block(stages, 5, 4) == [4, 3, 3, 1, 1]
    assert after(stages, 0, 4).count == untouched(4).count == 4
    assert after(stages, 2, 4) is stages[0]
    assert per_block([], 2, 4) == [4, 4]
