"""Plans: how a budget becomes counts, and plans as data."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tokcompile
from tests.conftest import TOLD, export
from tokcompile import Flops, KeepRate, Plan, Recipe, Reduction, Remove, Schedule, Share, Tokens, steps
from tokcompile.budget import as_budget, to_data
from tokcompile.errors import BudgetError, UnsupportedGraph
from tokcompile.passes.find import Block, Structure
from tokcompile.passes.layout import Layout
from tokcompile.passes.places import Slot, choose_slots, visual_blocks
from tokcompile.passes.schedule import apportion, make_plan, reductions
from tokcompile.passes.stages import Stage
from tokcompile.recipe import methods

DRAWS = settings(max_examples=300, deadline=None, derandomize=True)


class FakeNode:
    """Stands for a residual stream of (B, L, 8)."""

    def __init__(self, length, batch):
        self.name, self.target, self.all_input_nodes, self.meta = (
            "x",
            "x",
            [],
            {"val": torch.empty(batch, length, 8, device="meta")},
        )


def model(*stages, why_not=(), batch=2):
    """A structure of blocks: one (count, length, prefix, suffix) per stage."""
    found = Structure()
    for count, length, prefix, suffix in stages:
        stage = Stage(length, prefix, suffix, None, True)
        found.stages.append(stage)
        for _ in range(count):
            i, node = len(found.blocks), FakeNode(length, batch)
            found.blocks.append(Block(i, f"blocks.{i}", [], node, node, None, 1, 0, stage,
                                      why_not="a grid" if i in why_not else None))  # fmt: skip
    return found


def recipe(blocks=steps.all_blocks, counts=steps.same_number, rate=steps.ceil_of_current, least=1, **options):
    return Recipe("test", lambda tokens, site: None, steps=steps.Steps(blocks, counts, rate),
                  least=lambda n, given: least(n) if callable(least) else least, **options)  # fmt: skip


def counts(structure, method, budget, **options):
    return [(r.block, r.n, r.k) for r in make_plan(structure, method, budget, **options)]


# -- shares over segments ----------------------------------------------------------------------------------------------


@DRAWS
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), data=st.data())
def test_shares_add_up(sizes, data):
    k = data.draw(st.integers(len(sizes), sum(sizes)))
    shares = apportion(k, sizes)
    assert sum(shares) == k
    assert all(1 <= share <= size for share, size in zip(shares, sizes))


@DRAWS
@given(size=st.integers(2, 40), copies=st.integers(1, 8), share=st.floats(0.2, 1))
def test_equal_segments_get_equal_shares_give_or_take_one(size, copies, share):
    shares = apportion(max(copies, int(size * copies * share)), [size] * copies)
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@DRAWS
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_a_full_share_is_everything(sizes):
    assert apportion(sum(sizes), sizes) == sizes


@pytest.mark.parametrize(("k", "sizes", "want"), [
    (5, [10], [5]),
    (5, [6, 4], [3, 2]),
    (5, [5, 5], [3, 2]),
    (7, [10, 3, 1], [5, 1, 1]),
    (3, [1, 1, 98], [1, 1, 1]),
    (5, [1, 1, 1, 97], [1, 1, 1, 2]),
], ids=str)  # fmt: skip
def test_largest_remainders_first(k, sizes, want):
    assert apportion(k, sizes) == want


# -- schedules ---------------------------------------------------------------------------------------------------------


@DRAWS
@given(n=st.integers(1, 300), number=st.integers(1, 12), data=st.data())
@pytest.mark.parametrize("rule", [steps.same_number, steps.same_share], ids=lambda f: f.__name__)
def test_a_schedule_falls_to_its_end(rule, n, number, data):
    final = data.draw(st.integers(1, n))
    got = rule(n, final, number)
    assert len(got) == number
    assert got[-1] == final
    assert list(got) == sorted(got, reverse=True)
    assert got[0] <= n


@DRAWS
@given(n=st.integers(2, 300), number=st.integers(1, 12), data=st.data())
def test_the_same_number_goes_in_each_step(n, number, data):
    got = [n, *steps.same_number(n, data.draw(st.integers(1, n)), number)]
    removed = [a - b for a, b in zip(got, got[1:])]
    assert max(removed) - min(removed) <= 1


@DRAWS
@given(depth=st.integers(1, 48), fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_fractions_of_the_depth_are_blocks(depth, fractions):
    blocks = steps.at_fractions(*fractions)(depth)
    assert list(blocks) == sorted(set(blocks))
    assert all(0 <= b < depth for b in blocks)


@pytest.mark.parametrize(("rule", "want"), [
    (steps.all_blocks, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)),
    (steps.stages().blocks, (3, 6, 9)),
    (steps.once(1 / 6).blocks, (2,)),
    (steps.once(1.0).blocks, (11,)),
    (steps.at_fractions(0.0, 0.01), (0,)),
], ids=["all", "stages", "sixth", "end", "start"])  # fmt: skip
def test_where_methods_stand_in_12_blocks(rule, want):
    assert tuple(rule(12)) == want


@pytest.mark.parametrize(("r", "inflect", "depth", "want"), [
    (8, 0.0, 4, [8, 8, 8, 8]),
    (8, -1.0, 5, [16, 12, 8, 4, 0]),
    (8, 1.0, 5, [0, 4, 8, 12, 16]),
    (8, 0.5, 3, [4, 8, 12]),
    (5, 0.3, 4, [3, 4, 5, 7]),
    (8, 0.0, 1, [8]),
    (0, 0.0, 3, [0, 0, 0]),
], ids=str)  # fmt: skip
def test_r_of_each_block_is_that_of_the_tome_code(r, inflect, depth, want):
    """tome/utils.py: min_val = int(r * (1 - inflect)); max_val = 2r - min_val; int(min_val + step * i)."""
    assert Remove(r, inflect).per_block(depth) == want


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "want"), [
    (0.5, [(0, 20, 18), (1, 18, 15), (2, 15, 13), (3, 13, 10)]),
    (Share(0.26), [(0, 20, 17), (1, 17, 13), (2, 13, 9), (3, 9, 5)]),
    (0.01, [(0, 20, 16), (1, 16, 11), (2, 11, 6), (3, 6, 1)]),
    (Tokens(18), [(1, 20, 19), (3, 19, 18)]),
    (Tokens(20), []),
    (1, []),
    (Share(1.0), []),
    (KeepRate(0.5), [(0, 20, 10), (1, 10, 5), (2, 5, 3), (3, 3, 2)]),
    (KeepRate(1.0), []),
    (Remove(0), []),
    (Remove(6), [(0, 20, 14), (1, 14, 8), (2, 8, 2), (3, 2, 1)]),
    (Schedule({1: 7}), [(1, 20, 7)]),
    (Schedule({3: 4, 0: 9}), [(0, 20, 9), (3, 9, 4)]),
    ({2: 20, 3: 4}, [(3, 20, 4)]),
], ids=str)  # fmt: skip
def test_budgets_on_20_tokens_and_4_blocks(budget, want):
    assert counts(model((4, 21, 1, 0)), recipe(), budget) == want


def test_remove_is_clipped_to_what_one_step_can_do():
    half = recipe(least=lambda n: n - n // 2)
    assert counts(model((3, 20, 0, 0)), half, Remove(15)) == [(0, 20, 10), (1, 10, 5), (2, 5, 3)]


def test_a_schedule_that_a_step_cannot_meet_is_refused():
    half = recipe(least=lambda n: n - n // 2)
    with pytest.raises(BudgetError, match=r"block 1: 'test' cannot go from 20 to 3 tokens in one step, only to 10"):
        counts(model((3, 20, 0, 0)), half, Schedule({1: 3}))


@pytest.mark.parametrize(
    "budget", [Share(0.5), Tokens(3), Flops(0.7), KeepRate(0.9), Remove(4, -0.5), Schedule({1: 7})], ids=str
)
def test_budgets_go_to_json(budget):
    data = json.loads(json.dumps(to_data(budget)))
    assert data.pop("kind") == type(budget).__name__
    if isinstance(budget, Schedule):
        data = {"counts": {int(b): k for b, k in data["counts"].items()}}
    assert type(budget)(**data) == budget


def test_numbers_and_mappings_are_budgets():
    assert as_budget(0.3) == Share(0.3)
    assert as_budget(1) == Share(1.0)
    assert as_budget({2: 5}) == Schedule({2: 5})


# -- which blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "want"), [(None, [0, 1, 2, 3]), ([1], [1]), ([-1, 0], [0, 3]), (["blocks.2"], [2])], ids=str)
def test_where(where, want):
    slots = choose_slots(model((4, 21, 1, 0)), recipe(), Share(0.5), where, None, Layout())
    assert [slot.block.index for slot in slots] == want


@pytest.mark.parametrize(("stages", "want"), [
    (((2, 99, 1, 0), (6, 50, 1, 0), (1, 17, 1, 0)), [2, 3, 4, 5, 6, 7]),  # most blocks
    (((2, 560, 0, 0), (3, 17, 0, 0)), [0, 1]),  # the crops of an image, beside the image itself
])  # fmt: skip
def test_the_stage_where_most_is_computed_is_reduced(stages, want):
    assert [b.index for b in visual_blocks(model(*stages), None)] == want


def test_blocks_that_cannot_be_reduced_are_left_out_or_refused():
    found = model((4, 20, 0, 0), why_not=[0, 2])
    assert [b for b, _, _ in counts(found, recipe(), 0.5)] == [1, 3]
    with pytest.raises(UnsupportedGraph, match=r"tokens cannot be reduced in block 2 \(blocks.2\): a grid"):
        counts(found, recipe(), 0.5, where=[2])


def test_two_stages_cannot_be_mixed():
    with pytest.raises(UnsupportedGraph, match=r"the blocks \[0, 2\] hold \[50, 17\] tokens[\s\S]*where=\[0, 1\] or \[2, 3\]"):
        counts(model((2, 50, 1, 0), (2, 17, 1, 0)), recipe(), 0.5, where=[0, 2])


def test_a_model_without_blocks():
    with pytest.raises(UnsupportedGraph, match="no softmax between two matrix products, no fused attention"):
        counts(Structure(), recipe(), 0.5)
    with pytest.raises(UnsupportedGraph, match="softmax_3: left alone"):
        counts(Structure(unrecognised=["softmax_3: left alone"]), recipe(), 0.5)


# -- spans, units, segments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spans", "layout", "want"), [
    (None, Layout(), [(1, 17)]),
    ([(2, 12)], Layout(), [(2, 12)]),
    ([(2, 6), (9, 12)], Layout(), [(2, 6), (9, 12)]),
    ([(4, 12)], Layout(4), [(1, 3)]),
    ([(0, 20)], Layout(1, (5, 10)), [(0, 5), (5, 10), (10, 20)]),
    ([(4, 16)], Layout(2, (4, 6, 9)), [(2, 4), (4, 6), (6, 8)]),
], ids=str)  # fmt: skip
def test_spans_are_cut_into_segments_of_groups(spans, layout, want):
    (slot,) = choose_slots(model((1, 20, 1, 3)), recipe(), Share(0.5), None, spans, layout)
    assert list(slot.spans) == want
    assert slot.n == sum(stop - start for start, stop in want)


@pytest.mark.parametrize("spans", [[(3, 11)], [(4, 10)]], ids=str)
def test_spans_must_be_whole_groups(spans):
    with pytest.raises(UnsupportedGraph, match=r"are not whole groups of 4"):
        choose_slots(model((1, 20, 0, 0)), recipe(), Share(0.5), None, spans, Layout(4))


def test_reductions_of_segments():
    found = model((2, 24, 0, 0))
    slots = [Slot(b, "attention", b.stage, ((0, 2), (2, 5)), (2, 3), unit=4) for b in found.blocks]
    got = reductions([4, 2], slots, recipe(), {})
    assert [(r.block, r.n, r.k, r.prefix, r.suffix, r.unit) for r in got] == [
        (0, 3, 2, 8, 4, 4), (1, 2, 1, 0, 16, 4), (1, 2, 1, 8, 4, 4)]  # fmt: skip


class Merger(nn.Module):
    """Attention over 24 patches, 4 neighbours become one token, and attention over those."""

    def __init__(self, again: bool):
        super().__init__()
        self.qkv, self.merge, self.again = nn.Linear(16, 48), nn.Linear(64, 16), again

    def attend(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        x = self.merge(self.attend(x).reshape(x.shape[0], 6, 64))
        return self.attend(x) if self.again else x


@pytest.mark.parametrize(("again", "outputs", "want"), [
    (True, "keep", (6, 3, 4)),
    (True, "reduced", (6, 3, 4)),
    (False, "reduced", (6, 3, 4)),
    (False, "keep", (24, 12, 1)),  # nothing follows: the tokens are given back, and then merged
], ids=["inside", "inside-reduced", "end-reduced", "end"])  # fmt: skip
def test_a_merger_makes_groups(again, outputs, want):
    model, args = Merger(again).eval(), (torch.randn(2, 24, 16),)
    optimized = tokcompile.optimize(model, args, method="random", budget=0.5, outputs=outputs, where=0)
    (reduction,) = optimized.plan.reductions
    assert (reduction.n, reduction.k, reduction.unit) == want
    assert tokcompile.check(model, args, blocks=[0]).ok


def test_images_in_one_sequence_are_segments():
    """Pixtral lays the images of a batch end to end: each keeps its share."""
    plan = tokcompile.optimize(export("hf/pixtral_vision", 3), method="random", budget=0.5, where=[1]).plan
    assert sum(r.k for r in plan.reductions) == round(0.5 * sum(r.n for r in plan.reductions))


# -- the plan as data --------------------------------------------------------------------------------------------------

PLAN = Plan("tome", (Reduction(3, 196, 98, prefix=1, path="blocks.3"), Reduction(6, 98, 49, "block", 1, 2, 4)),
            {"proportional": False}, to_data(Share(0.25)), "reduced", "anywhere")  # fmt: skip


def test_a_plan_survives_json(tmp_path):
    assert Plan.from_json(PLAN.json()) == PLAN
    (tmp_path / "plan.json").write_text(PLAN.json())
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert Plan.load(str(tmp_path / "plan.json")) == PLAN
    assert json.loads(PLAN.json())["version"] == 1


def test_a_plan_is_a_value():
    assert PLAN.replace(outputs="keep") == replace(PLAN, outputs="keep")
    assert PLAN.outputs == "reduced"
    with pytest.raises(FrozenInstanceError):
        PLAN.method = "dart"
    with pytest.raises(FrozenInstanceError):
        PLAN.reductions[0].k = 3


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_has_a_plan_on_a_plain_vit(method):
    plan = tokcompile.optimize(export("timm/vit"), method=method, budget=Tokens(30), **TOLD.get(method, {})).plan
    assert plan.method == method
    assert plan.reductions[0].n == 49
    assert plan.reductions[-1].k == 30
    assert all(r.n > r.k for r in plan.reductions)
    assert Plan.from_json(plan.json()) == plan


def test_a_method_place_is_kept():
    places = {m: tokcompile.optimize(export("timm/vit"), method=m, budget=Tokens(40)).plan.reductions[0].place
              for m in ("tome", "divprune", "dart")}  # fmt: skip
    assert places == {"tome": "attention", "divprune": "block", "dart": "block"}
