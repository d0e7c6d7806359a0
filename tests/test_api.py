"""tokcompile.optimize from the outside: what it takes, how it is called, and what it answers."""

import copy
import sys
import threading

import pytest
import torch

import tokcompile
from tests.conftest import TOLD, assert_equal, counts, error, leaves, run
from tests.models import FAMILIES
from tokcompile import Flops, KeepRate, Remove, Share, Tokens
from tokcompile.recipe import methods as known_methods

RECIPES = known_methods()
METHODS = sorted(RECIPES)
PATCHES = 49
DATA_DEPENDENT = ("nonzero", "_local_scalar", "aten.item", "masked_select", "unique", "_assert_scalar", "_assert_async")
PLAIN = ["timm/vit", "hf/vit", "hf/dinov2_with_registers", "torchvision/vit", "torch/encoder_batch_first",
         "torch/encoder_sequence_first", "torch/einsum_vit"]  # fmt: skip


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_a_module_a_program_and_a_file_give_the_same(family, program, tmp_path):
    args = family("timm/vit").args
    model = copy.deepcopy(family("timm/vit").model)  # traced by itself
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


@pytest.mark.every(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["timm/vit", "hf/dinov2_with_registers"])
def test_every_method_reduces(method, name, family, program):
    _, args, kwargs = family(name, 3)
    optimized = tokcompile.optimize(program(name, 3), method=method, budget=Tokens(30), **TOLD.get(method, {}))
    assert optimized.plan.reductions[-1].k == 30
    assert optimized.report.flops_ratio < 0.95
    got, want = leaves(run(optimized, *args, **kwargs)), family(name, 3)()
    assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in want]
    assert all(g.isfinite().all() and not torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.every(2)
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


@pytest.mark.every(3)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_reduced_outputs_say_which_tokens_are_left(method, batch, family, program):
    _, args, _ = family("timm/vit_features", batch)
    optimized = tokcompile.optimize(program("timm/vit_features", batch), method=method, budget=Tokens(28),
                                    outputs="reduced", **TOLD.get(method, {}))  # fmt: skip
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


@pytest.mark.every(2)
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


def test_the_public_names_stay_what_they_are():
    """The subpackage tokcompile.methods must not hide the function of that name once it has been imported."""
    assert set(tokcompile.methods()) == set(METHODS)
    assert set(tokcompile.methods()) == set(METHODS)
    assert all(hasattr(tokcompile, name) for name in tokcompile.__all__)


def test_threads_optimize_one_after_the_other():
    """Tracing has one state for the whole process, and so has its output."""
    before, outputs, x = sys.stdout, [], torch.randn(1, 12, 32)

    def work():
        layer = torch.nn.TransformerEncoderLayer(32, 2, 32, batch_first=True, norm_first=True)
        model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        outputs.append(tokcompile.optimize(model, (x,), method="random")(x).shape)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == [x.shape] * 3
    assert sys.stdout is before
