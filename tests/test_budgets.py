"""Budgets and plans through the whole pipeline, and a report that an independent count confirms."""

import dataclasses
import json

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokcompile
from tests.conftest import assert_equal, counts, run
from tokcompile import Flops, KeepRate, Plan, Remove, Schedule, Share, Tokens
from tokcompile.recipe import methods as known_methods

RECIPES = known_methods()
METHODS = sorted(RECIPES)
PATCHES = 49
DATA_DEPENDENT = ("nonzero", "_local_scalar", "aten.item", "masked_select", "unique", "_assert_scalar", "_assert_async")


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome", "evit", "dart"])
def test_a_plan_passed_back_gives_the_same(method, family, program, tmp_path):
    args = family("timm/vit").args
    first = tokcompile.optimize(program("timm/vit"), method=method, budget=0.6)
    want = run(first, *args)
    (tmp_path / "plan.json").write_text(first.plan.json())
    for plan in (first.plan, Plan.from_json(first.plan.json()), tmp_path / "plan.json", str(tmp_path / "plan.json")):
        again = tokcompile.optimize(program("timm/vit"), plan=plan)
        assert again.plan == first.plan
        assert_equal(run(again, *args), want)


def test_an_edited_plan_is_carried_out(family, program):
    plan = tokcompile.optimize(program("timm/vit"), method="random", budget=0.5).plan
    fewer = [dataclasses.replace(r, k=r.k - 5) for r in plan.reductions]
    edited = tokcompile.optimize(program("timm/vit"), plan=plan.replace(reductions=tuple(fewer)))
    assert [r.k for r in edited.plan.reductions] == [r.k - 5 for r in plan.reductions]
    assert [r.n for r in edited.plan.reductions] == [PATCHES, *(r.k - 5 for r in plan.reductions[:-1])]
    dropped = tokcompile.optimize(program("timm/vit"), plan=plan.replace(reductions=plan.reductions[:1]))
    assert counts(dropped) == counts(tokcompile.optimize(program("timm/vit"), method="random",
                                                         budget=Schedule({1: plan.reductions[0].k})))  # fmt: skip


def test_a_plan_carries_method_options_and_outputs(program):
    first = tokcompile.optimize(program("timm/vit_features"), method="random", seed=5, outputs="reduced")
    again = tokcompile.optimize(program("timm/vit_features"), plan=first.plan)
    assert again.plan.options == {"seed": 5}
    assert again.plan.outputs == "reduced"


def test_a_plan_prints_one_line_per_reduction(program):
    lines = str(tokcompile.optimize(program("timm/vit"), method="random", budget=0.5).plan).splitlines()
    assert lines[0] == "random, 3 reductions"
    assert [line.split() for line in lines[1:]] == [
        ["block", "1", "attention", "49", "->", "40", "blocks.1"],
        ["block", "2", "attention", "40", "->", "32", "blocks.2"],
        ["block", "3", "attention", "32", "->", "25", "blocks.3"],
    ]


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "kept"), [
    (0.5, [43, 37, 31, 25]),
    (Share(0.75), [46, 43, 40, 37]),
    (Tokens(20), [42, 35, 28, 20]),
    (Remove(6), [43, 37, 31, 25]),
    (Remove(6, inflect=-1.0), [37, 29, 25]),
    (Remove(6, inflect=1.0), [45, 37, 25]),
    (Remove(40), [25, 13, 7, 4]),
    (Schedule({1: 40, 3: 30}), [40, 30]),
    ({0: 30}, [30]),
], ids=str)  # fmt: skip
def test_budgets_become_counts(budget, kept, program):
    """ToMe on 49 patches and 4 blocks; the class token makes 50, of which at most half go in one block."""
    optimized = tokcompile.optimize(program("timm/vit"), method="tome", budget=budget)
    assert [k for _, _, k in counts(optimized)] == kept


@pytest.mark.parametrize(("method", "kept"), [("pitome", [35, 25, 18, 13]), ("topk", [34, 24, 16]), ("evit", [36, 27, 20])])
def test_keep_rates_use_the_published_rounding(method, kept, program):
    optimized = tokcompile.optimize(program("timm/vit"), method=method, budget=KeepRate(0.7))
    assert [k for _, _, k in counts(optimized)] == kept


@pytest.mark.every(2)
@pytest.mark.parametrize("ratio", [0.6, 0.7, 0.85])
@pytest.mark.parametrize(("name", "method"), [("timm/vit", "tome"), ("timm/vit", "random"), ("hf/dinov2", "divprune"),
                                              ("torch/einsum_vit", "pitome")])  # fmt: skip
def test_a_flops_budget_is_the_largest_count_that_fits(name, method, ratio, program):
    recipe, ep = RECIPES[method], program(name)
    try:
        optimized = tokcompile.optimize(ep, method=method, budget=Flops(ratio))
    except tokcompile.BudgetError as refusal:
        pytest.fail(f"unexpected: {refusal}")
    k = optimized.plan.reductions[-1].k
    blocks = [r.block for r in optimized.plan.reductions]
    more = dict(zip(blocks, recipe.steps.counts(PATCHES, k + 1, len(blocks))))
    above = tokcompile.optimize(ep, method=method, budget=Schedule(more))
    assert optimized.report.flops_ratio <= ratio < above.report.flops_ratio


def test_flops_below_what_a_constant_r_reaches(program):
    """When no token would be left at the end, r goes on growing and each step removes what one step can."""
    evenly = tokcompile.optimize(program("timm/vit"), method="tome", budget=Tokens(10)).report.flops_ratio
    less = tokcompile.optimize(program("timm/vit"), method="tome", budget=Flops(0.8 * evenly))
    assert less.report.flops_ratio <= 0.8 * evenly
    removed = [a - b for _, a, b in counts(less)]
    assert 4 * removed[0] > PATCHES
    assert removed[-1] < removed[0]


# -- the report --------------------------------------------------------------------------------------------------------


def counted(model, *args, **kwargs) -> int:
    """FLOPs by torch's own counter, with attention as two matrix products (it knows nothing of the fused CPU kernel)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(model, *args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.every(3)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "method"), [
    ("timm/vit", "tome"), ("timm/vit", "divprune"), ("timm/vit", "pyramiddrop"), ("timm/vit", "sparsevlm"),
    ("hf/llama", "pyramiddrop"), ("timm/vit", "ppe"), ("torchvision/swin", None), ("timm/dinov3", "topk"),
    ("timm/beit", "pitome"),
    ("hf/dinov2_with_registers", "dart"), ("hf/depth_anything", "random"), ("hf/llama", None), ("torch/einsum_vit", "tome"),
    ("torch/encoder_sequence_first", "evit"), ("torchvision/vit", "random"), ("timm/vit_parallel_scaling", "random"),
], ids=lambda v: str(v))  # fmt: skip
def test_flops_equal_an_independent_count(name, method, batch, family, program):
    _, args, kwargs = family(name, batch)
    budget = 1.0 if method is None else Tokens(25)
    spans = [(5, 30)] if name == "hf/llama" else None
    optimized = tokcompile.optimize(program(name, batch), method=method or "random", budget=budget, spans=spans)
    report = optimized.report
    assert report.original_flops == pytest.approx(counted(family(name, batch).model, *args, **kwargs), rel=0.01)
    assert report.flops + report.overhead_flops == pytest.approx(counted(optimized, *args, **kwargs), rel=0.01)


def test_the_report_is_readable_and_json(program):
    report = tokcompile.optimize(program("timm/vit"), method="random", budget=0.5).report
    data = json.loads(report.json())
    assert data["flops_ratio"] == report.flops / report.original_flops
    assert [b["path"] for b in data["blocks"]] == [f"blocks.{i}" for i in range(4)]
    assert [(b["length"], b["prefix"], b["suffix"], b["grid"]) for b in data["blocks"]] == [(50, 1, 0, [7, 7])] * 4
    assert set(data["seconds"]) >= {"trace", "canonicalise", "find", "plan", "rewrite"}
    rows = [line.split()[:3] for line in str(report).splitlines()[1:5]]
    assert rows == [["0", "50", "50"], ["1", "50", "41"], ["2", "41", "33"], ["3", "33", "26"]]


def test_the_report_names_recoveries_and_their_price(program):
    end = tokcompile.optimize(program("timm/vitamin"), method="random", where=[1]).report
    assert all(not r["inside"] for r in end.recoveries)
    dense = tokcompile.optimize(program("hf/depth_anything"), method="random").report
    assert dense.recoveries
    assert all(not r["inside"] for r in dense.recoveries)
    inside = tokcompile.optimize(program("timm/swin"), method="random", where=[0], recover="anywhere").report
    assert any(r["inside"] for r in inside.recoveries)
    assert "part of the gain is lost" in str(inside)


def test_replayed_values_are_guards(family):
    model, args, kwargs = family("hf/qwen2_vl_vision")
    report = tokcompile.optimize(model, args, kwargs, method="random", where=1).report
    assert any("gave" in guard and "from grid_thw" in guard for guard in report.guards)
