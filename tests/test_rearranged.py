"""Models that shuffle, pool or merge their patches behind the tower: reduced inside of it, their prompt is shorter."""

import pytest
import torch

import tokcompile
from tests.conftest import build, counts, error, run
from tests.models.family import noise
from tests.vlm.models import ids_with
from tokcompile import Flops, Plan, PlanError, Tokens

TEXT = 12
NAMES = ["hf/internvl", "hf/idefics3", "hf/smolvlm", "hf/gemma3", "hf/mistral3"]
CASES = [(name, "tome") for name in NAMES] + [(NAMES[i % 5], m) for i, m in enumerate(("random", "topk", "divprune", "pitome"))]


def left(fast):
    return [b["left"] for b in fast.report.blocks]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_prompt_is_shorter(name, method, program):
    fast = tokcompile.optimize(program(name), method=method, budget=Tokens(9), where=[1], outputs="reduced")
    assert counts(fast) == [(1, 16, 9)]
    assert left(fast)[4:] == [TEXT + 9] * 4
    assert not fast.report.recoveries
    kwargs = build(name).kwargs
    out, kept = run(fast, **kwargs)
    assert out["logits"].shape[1] == TEXT + 9
    assert kept["s0_index"].shape == (1, 9)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["hf/internvl", "hf/mistral3"])
def test_of_several_prompts_each_keeps_its_own(name, program):
    """InternVL has its images in a batch, Mistral 3 in one sequence."""
    fast = tokcompile.optimize(program(name, 3), method="divprune", budget=0.5, where=[1], outputs="reduced")
    assert left(fast)[4:] == [TEXT + 8] * 4
    out, kept = run(fast, **build(name, 3).kwargs)
    index = next(v for key, v in kept.items() if v.shape[0] == 3)
    assert len({tuple(row.tolist()) for row in index}) == 3
    one = tokcompile.optimize(program(name), method="divprune", budget=0.5, where=[1], outputs="reduced")
    for row in (0, 2):
        kwargs = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in build(name, 3).kwargs.items()}
        assert error(run(one, **kwargs).output["logits"][0], out["logits"][row]) < 1e-4


def row_of(kwargs, row, count=3):
    """One prompt of a batch and its share of the images."""

    def part(v):
        return v[row * len(v) // count : (row + 1) * len(v) // count]

    return {k: part(v) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in kwargs.items()}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", ["hf/qwen2_vl", "hf/qwen2_5_vl", "hf/qwen2_5_vl_two_images", "hf/qwen3_vl"])
def test_prompts_whose_images_are_one_sequence(name, program):
    """Windows, merge units, features of inner blocks that are added in the language model: each prompt as if it were alone."""
    kwargs = build(name, 3).kwargs
    options = dict(method="tome", budget=Tokens(27), where=[1], outputs="reduced")  # reads keys from before their rotation
    fast = tokcompile.optimize(program(name, 3), **options)
    same = fast.plan.reductions[: len(fast.plan.reductions) // 3]
    assert [(r.n, r.k) for r in fast.plan.reductions] == [(r.n, r.k) for r in same] * 3
    out = run(fast, **kwargs).output["logits"]
    one = row_of(kwargs, 2)
    alone = tokcompile.optimize(program(name), **options | dict(budget=Tokens(9)))
    assert error(run(alone, **one).output["logits"][0, -3:], out[2, -3:]) < 1e-4


@pytest.mark.every(2)
@pytest.mark.parametrize("budget", [0.6, tokcompile.Remove(2), Flops(0.9), tokcompile.KeepRate(0.9)])
def test_budgets_that_are_no_counts_are_shared_equally(budget, program):
    fast = tokcompile.optimize(program("hf/qwen3_vl", 3), method="tome", budget=budget)
    for block in {r.block for r in fast.plan.reductions}:
        assert len({r.k for r in fast.plan.reductions if r.block == block}) == 1


def test_samples_that_cannot_keep_as_many_each(program):
    for name, budget in (("hf/mistral3", Tokens(25)), ("hf/qwen3_vl", tokcompile.Schedule({1: 22}))):
        with pytest.raises(tokcompile.BudgetError, match=r"3 samples become a batch, and 2[25] tokens"):
            tokcompile.optimize(program(name, 3), method="random", budget=budget, outputs="reduced")


@pytest.mark.every(4)
@pytest.mark.parametrize(("name", "pixels", "more"), [
    ("internvl", (2,), {}), ("gemma3", (2,), {}), ("idefics3", (1, 2), {}),
    ("mistral3", (2,), {"image_sizes": torch.tensor([[64, 64], [64, 64]])}),
])  # fmt: skip
def test_two_images(name, pixels, more):
    model, inputs = build(f"hf/{name}").model, ids_with(1, (16, 16))
    inputs |= more | dict(pixel_values=noise(2, 3, 64, 64).reshape(*pixels, 3, 64, 64))
    if name == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == 60).long()
    check = tokcompile.check(model, kwargs=inputs, blocks=[0, 3])
    assert check.ok, str(check)
    assert not [r for r in check.results if "recover" in r.note]
    fast = tokcompile.optimize(model, kwargs=inputs, method="random", budget=0.5, where=[1], outputs="reduced")
    assert left(fast)[4:] == [5 + 8 + 3 + 8 + 3] * 4


@pytest.fixture(scope="module")
def flops(program):
    return tokcompile.optimize(program("hf/internvl"), method="tome", budget=Flops(0.8), outputs="reduced")


def test_flops_are_solved_for_over_groups(flops, program):
    assert 0.75 < flops.report.flops_ratio <= 0.8
    assert all(r.unit == 4 for r in flops.plan.reductions)


@pytest.mark.matrix
def test_plans_and_files(flops, program, tmp_path):
    kwargs = build("hf/internvl").kwargs
    again = tokcompile.optimize(program("hf/internvl"), plan=Plan.from_json(flops.plan.json()))
    assert again.plan == flops.plan
    assert error(run(again, **kwargs), run(flops, **kwargs)) == 0
    flops.save(tmp_path / "one.pt2")
    assert error(run(tokcompile.load(tmp_path / "one.pt2"), **kwargs), run(flops, **kwargs)) == 0
    report = flops.export_onnx(tmp_path / "one.onnx")
    assert sum(report.nodes.values()) == len(flops.plan.reductions)
    assert report.error < 1e-4


@pytest.mark.parametrize("name", ["hf/internvl", "hf/qwen2_vl"])
def test_several_methods_one_after_the_other(name, program):
    n, method = (16, "tome") if name == "hf/internvl" else (12, "divprune")
    first = tokcompile.optimize(
        program(name), method=method, budget=Tokens(n - 3), where=[0 if n == 16 else 1], outputs="reduced"
    )
    two = tokcompile.optimize(first, method="random", budget=Tokens(6), where=[2], outputs="reduced")
    three = tokcompile.optimize(two, method="dart", budget=Tokens(4), where=[6], outputs="reduced")
    assert counts(three) == [(0 if n == 16 else 1, n, n - 3), (2, n - 3, 6), (6, 6, 4)]
    assert [r.unit for r in three.plan.reductions] == [4, 4, 1]
    assert left(three)[4:] == [TEXT + 6, TEXT + 6, TEXT + 4, TEXT + 4]
    with pytest.raises(PlanError, match="not after it"):
        tokcompile.optimize(two, method="random", budget=0.5, where=[0], outputs="reduced")


def test_the_towers_own_output_stays_in_the_order_of_the_grid(program):
    """SmolVLM returns what its tower gave: tokens one by one, with their places in the grid."""
    fast = tokcompile.optimize(program("hf/smolvlm"), method="random", budget=0.5, where=[3], outputs="reduced")
    whole = tokcompile.optimize(program("hf/smolvlm"), method="random", budget=1.0)
    kwargs = build("hf/smolvlm").kwargs
    out, kept = run(fast, **kwargs)
    single = kept["s0_x4_p_index"]
    assert single.shape == (1, 32)
    place = {int(p): (int(p) // 8 // 2) * 4 + int(p) % 8 // 2 for p in single[0]}
    assert sorted(set(place.values())) == sorted(kept["s0_index"][0].tolist())
    shapes = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.shape == (1, 32, 48)]
    full = [
        t
        for t in torch.utils._pytree.tree_leaves(run(whole, **kwargs))
        if isinstance(t, torch.Tensor) and t.shape == (1, 64, 48)
    ]
    assert len(shapes) == len(full) == 1
    assert error(shapes[0], full[0][:, single[0]]) < 1e-4  # reduced between the last attention and its MLP
