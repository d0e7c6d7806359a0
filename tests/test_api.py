"""tokcompile.optimize from the outside: what it takes, what it answers, and what its report and its plan say."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokcompile
from tests.conftest import leaves, run
from tests.models import FAMILIES
from tokcompile import Flops, KeepRate, Plan, Recipe, Remove, Schedule, Share, Tokens
from tokcompile.methods.random import RANDOM
from tokcompile.recipe import methods as known_methods

RECIPES = known_methods()
METHODS = sorted(RECIPES)
PLAIN = ["timm/vit", "hf/vit", "hf/dinov2_with_registers", "torchvision/vit", "torch/encoder_batch_first",
         "torch/encoder_sequence_first", "torch/einsum_vit"]  # fmt: skip
PATCHES = 49
DATA_DEPENDENT = ("nonzero", "_local_scalar", "aten.item", "masked_select", "unique", "_assert_scalar", "_assert_async")


def counts(model) -> list[tuple[int, int, int]]:
    """(block, tokens before, tokens after) of each reduction."""
    return [(r.block, r.n, r.k) for r in model.plan.reductions]


def assert_equal(got, want):
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def error(got, want) -> float:
    """The largest difference relative to the largest entry."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(leaves(got), leaves(want)))


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_a_module_a_program_and_a_file_give_the_same(family, program, tmp_path):
    model, args, _ = family("timm/vit")
    torch.export.save(program("timm/vit"), tmp_path / "vit.pt2")
    want = run(tokcompile.optimize(model, args), *args)
    assert_equal(run(tokcompile.optimize(program("timm/vit")), *args), want)
    assert_equal(run(tokcompile.optimize(tmp_path / "vit.pt2"), *args), want)
    assert_equal(run(tokcompile.optimize(str(tmp_path / "vit.pt2")), *args), want)


@pytest.mark.parametrize("name", PLAIN)
def test_a_budget_of_one_changes_no_bit(name, family):
    model, args, kwargs = family(name)
    optimized = tokcompile.optimize(model, args, kwargs, budget=1.0)
    assert optimized.plan.reductions == ()
    assert optimized.report.flops == optimized.report.original_flops
    assert_equal(run(optimized, *args, **kwargs), family(name)())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, Share(1.0), Flops(1.0), KeepRate(1.0), Tokens(PATCHES), Remove(0)],
                         ids=lambda b: type(b).__name__)  # fmt: skip
def test_every_method_can_keep_all(method, budget, family, program):
    optimized = tokcompile.optimize(program("timm/vit"), method=method, budget=budget)
    assert optimized.plan.reductions == ()
    assert_equal(run(optimized, *family("timm/vit").args), family("timm/vit")())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["timm/vit", "hf/dinov2_with_registers"])
def test_every_method_reduces(method, name, family, program):
    _, args, kwargs = family(name, 3)
    optimized = tokcompile.optimize(program(name, 3), method=method, budget=Tokens(30))
    assert optimized.plan.reductions[-1].k == 30
    assert optimized.report.flops_ratio < 0.95
    got, want = leaves(run(optimized, *args, **kwargs)), family(name, 3)()
    assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in want]
    assert all(g.isfinite().all() and not torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["fp16", "bf16", "fp64"])
@pytest.mark.parametrize("method", ["tome", "evit", "dart"])
def test_the_dtype_is_kept(dtype, method):
    model, (image,), _ = FAMILIES["timm/vit"].build(2)
    model, image = model.to(dtype), image.to(dtype)
    optimized = tokcompile.optimize(model, (image,), method=method, budget=Tokens(30))
    out = run(optimized, image)
    assert out.dtype == dtype
    assert out.isfinite().all()
    floating = {p.dtype for p in optimized.graph_module.parameters()}
    assert floating == {dtype}


def test_each_sample_of_a_batch_keeps_its_own_tokens(family, program):
    _, (images,), _ = family("timm/vit", 3)
    optimized = tokcompile.optimize(program("timm/vit", 3), outputs="reduced", method="topk")
    alone = tokcompile.optimize(program("timm/vit"), outputs="reduced", method="topk")
    together = run(optimized, images)
    for b in range(3):
        one = run(alone, images[b : b + 1])
        assert [v[b].tolist() for v in together.kept.values()] == [v[0].tolist() for v in one.kept.values()]
        torch.testing.assert_close(together.output[b], one.output[0], rtol=0, atol=1e-5)
    assert len({tuple(row) for row in together.kept["s2_index"].tolist()}) == 3


# -- how it is called --------------------------------------------------------------------------------------------------


def test_a_transformers_output_keeps_its_class(family):
    model, args, kwargs = family("hf/vit")
    want = run(model, **kwargs)
    got = run(tokcompile.optimize(model, args, kwargs), **kwargs)
    assert type(got) is type(want)
    assert list(got.keys()) == list(want.keys())
    assert got.last_hidden_state.shape == want.last_hidden_state.shape == (1, 50, 48)
    assert got.pooler_output.shape == want.pooler_output.shape


def test_nested_outputs_keep_their_structure(family):
    model, args, kwargs = family("hf/vit_hidden_states")
    want = run(model, **kwargs)
    got = run(tokcompile.optimize(model, args, kwargs), **kwargs)
    assert isinstance(got.hidden_states, tuple)
    assert [h.shape for h in got.hidden_states] == [h.shape for h in want.hidden_states]


def test_arguments_may_move_between_positions_and_keywords(family):
    model, _, kwargs = family("hf/vit")
    image = kwargs["pixel_values"]
    by_name = tokcompile.optimize(model, kwargs=kwargs)
    by_place = tokcompile.optimize(model, (image,))
    want = run(by_name, pixel_values=image)
    assert_equal(run(by_name, image), want)
    assert_equal(run(by_place, image), want)
    assert_equal(run(by_place, pixel_values=image), want)


def test_constant_arguments_are_part_of_the_call(family):
    model, args, kwargs = family("hf/vit_interpolated")
    optimized = tokcompile.optimize(model, args, kwargs, budget=1.0)
    assert_equal(run(optimized, **kwargs), family("hf/vit_interpolated")())
    with pytest.raises(tokcompile.InputError, match=r"input 1 is False, but the model was compiled for True"):
        optimized(kwargs["pixel_values"], interpolate_pos_encoding=False)


# -- outputs="reduced" -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_reduced_outputs_say_which_tokens_are_left(method, batch, family, program):
    _, args, _ = family("timm/vit_features", batch)
    optimized = tokcompile.optimize(program("timm/vit_features", batch), method=method, budget=Tokens(28),
                                    outputs="reduced")  # fmt: skip
    output, kept = run(optimized, *args)
    last = optimized.plan.reductions[-1]
    assert output.shape == (batch, 1 + last.k, 48)
    index = next(value for name, value in kept.items() if name.endswith("_index"))
    assert index.shape == (batch, last.k)
    assert index.dtype == torch.int64
    assert ((index >= 0) & (index < PATCHES)).all()
    assert all(len(set(row)) == last.k for row in index.tolist())
    sizes = [value for name, value in kept.items() if name.endswith("_size")]
    assert len(sizes) == (1 if RECIPES[method].track_size else 0)
    for size in sizes:
        assert size.shape == index.shape
        assert size.sum(1).tolist() == [PATCHES] * batch


def test_kept_indices_name_the_rows_of_the_output(family):
    """Reduced after the last block, the rows of the output are the original's rows at the kept positions."""
    model, args, _ = family("timm/vit_features", 3)
    (want,) = family("timm/vit_features", 3)()
    output, kept = run(tokcompile.optimize(model, args, method="random", where=3, outputs="reduced"), *args)
    rows = torch.cat([torch.zeros(3, 1, dtype=torch.int64), kept["s0_index"] + 1], 1)
    dense = run(tokcompile.optimize(model, args, method="random", where=3), *args)
    torch.testing.assert_close(output, dense.gather(1, rows[:, :, None].expand(-1, -1, 48)), rtol=0, atol=0)
    assert error(output[:, 0], want[:, 0]) < 1e-6  # attention of block 3 comes before the reduction


def test_reduced_names_match_the_program(program, family):
    optimized = tokcompile.optimize(program("timm/vit_features"), method="tome", outputs="reduced")
    names = [name for name in optimized.output_names if name not in optimized.extra_outputs]
    assert len(names) == 1
    assert list(run(optimized, *family("timm/vit_features").args).kept) == optimized.extra_outputs


# -- where and spans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "blocks"), [
    (2, [2]),
    ("blocks.1", [1]),
    ([0, 3], [0, 3]),
    (["blocks.0", 2], [0, 2]),
    ([-1], [3]),
    (None, [1, 2, 3]),
], ids=str)  # fmt: skip
def test_where_names_blocks(where, blocks, program):
    optimized = tokcompile.optimize(program("timm/vit"), method="random", where=where)
    assert [b % 4 for b, _, _ in counts(optimized)] == blocks
    assert [r.path for r in optimized.plan.reductions] == [f"blocks.{b}" for b in blocks]
    assert optimized.plan.reductions[-1].k == 25


@pytest.mark.parametrize(("spans", "expected"), [
    ([(5, 30)], [(5, 25, 10)]),
    ([(0, 40)], [(0, 40, 0)]),
    ([(2, 12), (20, 30)], [(2, 10, 28), (20, 10, 10)]),
], ids=["one", "all", "two"])  # fmt: skip
def test_spans_say_what_is_visual(spans, expected, family, program):
    optimized = tokcompile.optimize(program("hf/llama"), method="random", spans=spans, where=1)
    assert [(r.prefix, r.n, r.suffix) for r in optimized.plan.reductions] == expected
    assert [r.k for r in optimized.plan.reductions] == [(r.n + 1) // 2 if r.n % 2 else r.n // 2
                                                       for r in optimized.plan.reductions]  # fmt: skip
    want = run(family("hf/llama").model, **family("hf/llama").kwargs).logits
    got = run(optimized, **family("hf/llama").kwargs).logits
    assert got.shape == want.shape
    first = spans[0][0]
    torch.testing.assert_close(got[:, :first], want[:, :first], rtol=0, atol=1e-5)  # causal: text before is untouched


@pytest.mark.parametrize("name", ["hf/llama", "hf/gpt2", "hf/llava", "hf/llava_onevision", "hf/internvl", "hf/paligemma"])
def test_text_is_never_reduced_without_spans(name, family):
    """Either the visual tokens are found or the user is asked for them."""
    model, args, kwargs = family(name)
    try:
        optimized = tokcompile.optimize(model, args, kwargs, method="random")
    except tokcompile.UnsupportedGraph as error:
        refusal = str(error)
    else:
        refusal = ""
        text = [r for r in optimized.plan.reductions if "language" in r.path or r.path.startswith("model.layers")]
        assert all(r.prefix >= 5 and r.suffix >= 7 for r in text)
    assert not refusal or "spans=[(start, stop)]" in refusal or "recover='anywhere'" in refusal


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


# -- the report --------------------------------------------------------------------------------------------------------


def counted(model, *args, **kwargs) -> int:
    """FLOPs by torch's own counter, with attention as two matrix products (it knows nothing of the fused CPU kernel)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(model, *args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "method"), [
    ("timm/vit", "tome"), ("timm/vit", "divprune"), ("torchvision/swin", None), ("timm/dinov3", "topk"),
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
    assert any("item gave" in guard for guard in report.guards)


# -- saving, copying, exporting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("tome", {"outputs": "reduced"}), ("random", {"seed": 3}),
                                                 ("evit", {"fuse": False}), ("tome", {"size_weighted_mean": False})],
                         ids=["reduced", "seed", "fuse", "mean"])  # fmt: skip
def test_save_and_load(method, options, family, program, tmp_path):
    args = family("timm/vit_gap").args
    optimized = tokcompile.optimize(program("timm/vit_gap"), method=method, budget=0.6, **options)
    optimized.save(tmp_path / "model.pt2")
    loaded = tokcompile.load(tmp_path / "model.pt2")
    assert loaded.plan == optimized.plan
    assert_equal(run(loaded, *args), run(optimized, *args))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_load_needs_the_registered_recipe(family, program, tmp_path):
    loud = Recipe(
        "loudest",
        lambda tokens, site: tokcompile.Keep(tokcompile.primitives.top_k(tokens.x.norm(dim=-1), site.k), ordered=False),
        steps=tokcompile.steps.once(0.5),
    )
    optimized = tokcompile.optimize(program("timm/vit"), method=loud)
    optimized.save(tmp_path / "loud.pt2")
    with pytest.raises(tokcompile.MethodError, match=r"uses the method 'loudest'.*register it before loading"):
        tokcompile.load(tmp_path / "loud.pt2")
    tokcompile.register_method(loud)
    try:
        args = family("timm/vit").args
        assert_equal(run(tokcompile.load(tmp_path / "loud.pt2"), *args), run(optimized, *args))
    finally:
        tokcompile.recipe._REGISTRY.pop("loudest")


@pytest.mark.parametrize(("name", "method"), [("timm/vit", "tome"), ("timm/vit", "divprune"), ("timm/vit", "dart"),
                                              ("timm/vit", "evit"), ("hf/vit", "pitome"), ("timm/beit", "topk"),
                                              ("torchvision/vit", "random")])  # fmt: skip
def test_the_exported_program_equals_the_model(name, method, family, program):
    _, args, kwargs = family(name, 3)
    optimized = tokcompile.optimize(program(name, 3), method=method, budget=Tokens(30))
    exported = optimized.exported_program
    assert_equal(run(exported.module(), *args, **kwargs), run(optimized, *args, **kwargs))
    ops = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert not [op for op in ops if any(word in op for word in DATA_DEPENDENT)]
    assert all(isinstance(size, int) for n in exported.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)
               for size in v.shape)  # fmt: skip
    assert exported is optimized.exported_program


def test_a_copy_is_independent(family, program):
    args = family("timm/vit").args
    optimized = tokcompile.optimize(program("timm/vit"), budget=0.6)
    want = run(optimized, *args)
    other = copy.deepcopy(optimized)
    assert_equal(run(other, *args), want)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in optimized.parameters()}
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_equal(run(optimized, *args), want)


@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_weights_are_shared_with_the_model(budget):
    model, args, _ = FAMILIES["timm/vit"].build(1)
    optimized = tokcompile.optimize(model, args, budget=budget)
    mine = {p.data_ptr() for p in optimized.graph_module.parameters()}
    assert mine <= {p.data_ptr() for p in model.parameters()}
    before = run(optimized, *args)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    torch.testing.assert_close(run(optimized, *args), before + 1.0, rtol=0, atol=1e-6)


def test_the_given_model_and_program_are_not_changed(family, program):
    model, args, _ = family("timm/vit")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    code = str(program("timm/vit").graph)
    for given, inputs in ((model, args), (program("timm/vit"), None)):
        tokcompile.optimize(given, inputs, budget=0.6)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    assert str(program("timm/vit").graph) == code


@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_it_stays_in_eval_mode(budget, program, family):
    optimized = tokcompile.optimize(program("timm/vit"), budget=budget)
    assert not optimized.training
    assert optimized.eval() is optimized
    assert not any(m.training for m in optimized.modules())
    with pytest.raises(tokcompile.InputError, match="train the original and optimize it again"):
        optimized.train()
    assert not run(optimized, *family("timm/vit").args).requires_grad


def test_it_fits_into_a_larger_module(family, program):
    args = family("timm/vit").args
    optimized = tokcompile.optimize(program("timm/vit"), budget=0.6)
    whole = nn.Sequential(optimized, nn.Softmax(-1))
    assert torch.equal(run(whole, *args), run(optimized, *args).softmax(-1))


# -- recipes of one's own ----------------------------------------------------------------------------------------------


def test_a_recipe_of_ones_own(family, program):
    seen = []

    def first(tokens, site):
        seen.append(site)
        return tokcompile.Keep(torch.arange(site.k).expand(tokens.x.shape[0], -1))

    recipe = Recipe("first", first, steps=tokcompile.steps.every_block(), options={"shade": 1})
    optimized = tokcompile.optimize(program("timm/vit_features"), method=recipe, budget=0.5, outputs="reduced", shade=2)
    _, kept = run(optimized, *family("timm/vit_features").args)
    assert kept["s3_index"].tolist() == [list(range(25))]
    sites = {site.block: site for site in seen}
    assert [(s.n, s.k, s.step, s.grid) for s in sites.values()] == [
        (49, 43, 0, (7, 7)), (43, 37, 1, None), (37, 31, 2, None), (31, 25, 3, None)]  # fmt: skip
    assert {(s.prefix, s.suffix, s.steps, s.depth, s.options["shade"]) for s in sites.values()} == {(1, 0, 4, 4, 2)}


def test_pruning_equals_pruning_by_hand(family):
    """The model written out with the dropped tokens really dropped gives the same numbers."""
    model, (image,), _ = family("timm/vit", 2)
    optimized = tokcompile.optimize(model, (image,), method="random", where=[1], outputs="reduced")
    got, kept = run(optimized, image)

    def by_hand(image):
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
        for i, block in enumerate(model.blocks):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            if i == 1:
                rows = torch.cat([torch.zeros(2, 1, dtype=torch.int64), kept["s0_index"] + 1], 1)
                x = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))

    assert error(got, run(by_hand, image)) < 1e-6


def tome_by_hand(model, image, removed):
    """timm's ViT with ToMe written out as in the paper: sizes, proportional attention, merging by similar keys."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
    size = torch.ones(*x.shape[:2], 1)
    for block, r in zip(model.blocks, removed):
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        scores = q * attn.scale @ k.mT + size.log()[:, None, None, :, 0]
        x = x + block.ls1(attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        metric = torch.nn.functional.normalize(k.mean(1), dim=-1)
        similar = metric[:, ::2] @ metric[:, 1::2].mT
        similar[:, 0] = float("-inf")  # the class token is never merged
        best, partner = similar.max(-1)
        order = best.argsort(-1, descending=True, stable=True)
        merged, kept = order[:, :r], order[:, r:].sort(-1).values
        partner = partner.gather(1, merged)[..., None]

        def join(value, merged=merged, kept=kept, partner=partner):
            width = value.shape[-1]
            even, odd = value[:, ::2], value[:, 1::2]
            source = even.gather(1, merged[..., None].expand(-1, -1, width))
            odd = odd.scatter_add(1, partner.expand(-1, -1, width), source)
            return torch.cat([even.gather(1, kept[..., None].expand(-1, -1, width)), odd], 1)

        x, size = join(x * size), join(size)
        x = x / size
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("r", [3, 8])
def test_tome_equals_tome_by_hand(r, batch, family, program):
    model, (image,), _ = family("timm/vit", batch)
    optimized = tokcompile.optimize(program("timm/vit", batch), method="tome", budget=Remove(r))
    assert [n - k for _, n, k in counts(optimized)] == [r] * 4
    assert error(run(optimized, image), run(tome_by_hand, model, image, [r] * 4)) < 1e-5


def test_the_seed_of_random_matters(family, program):
    args = family("timm/vit").args
    a, b, c = (run(tokcompile.optimize(program("timm/vit"), method="random", seed=seed), *args) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert RANDOM.options == {"seed": 0}


def test_the_public_names_stay_what_they_are():
    """The subpackage tokcompile.methods must not hide the function of that name once it has been imported."""
    assert set(tokcompile.methods()) == set(METHODS)
    assert set(tokcompile.methods()) == set(METHODS)
    assert all(hasattr(tokcompile, name) for name in tokcompile.__all__)
