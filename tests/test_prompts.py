"""Whole vision-language models: the traced graph is right for other images and texts, and refuses what it was not made for."""

import functools

import pytest
import torch

from tests.conftest import build, error, leaves, run, traced
from tests.models import FAMILIES, shake
from tests.models.prompts import PROMPTS
from tokcompile.errors import InputError, module_path
from tokcompile.passes.arguments import flat_caller
from tokcompile.passes.canonicalise import FIXED as PLACEHOLDERS
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.placeholders import SPANS
from tokcompile.passes.trace import from_program, trace

IMAGE = 60
TOLERANCE = 1e-5  # relative to the largest entry

# what is read back into Python while tracing is fixed; the other models find their image tokens anew at every call
FIXED = [
    "hf/gemma4",
    "hf/glm4v",
    "hf/hunyuan_vl",
    "hf/kimi_k25",
    "hf/qwen2_vl",
    "hf/qwen2_5_vl",
    "hf/qwen2_5_vl_two_images",
    "hf/qwen3_vl",
    "hf/qwen3_vl_moe",
]


@functools.cache
def canonical(name, batch=1):
    program, guards = traced(name, batch)
    flat = from_program(program, *program.example_inputs, None, guards)
    return flat, canonicalise(flat.gm, flat.inputs)


def other(kwargs):
    """Other pixels and other text around the same image tokens."""
    draw = torch.Generator().manual_seed(7)
    ids = kwargs["input_ids"]
    text = torch.randint(1, 50, ids.shape, generator=draw)
    pixels = torch.randn(kwargs["pixel_values"].shape, generator=draw)
    return kwargs | dict(input_ids=torch.where(ids == IMAGE, ids, text), pixel_values=pixels)


def moved(kwargs):
    """The same prompt with its image tokens one place further to the right."""
    return {k: v.roll(1, 1) if k in ("input_ids", "mm_token_type_ids", "token_type_ids") else v for k, v in kwargs.items()}


def assert_equals_the_model(built, flat, graph, kwargs):
    got = leaves(run(graph, *flat_caller(flat)(*built.args, **kwargs)))
    assert error(got, run(built.model, *built.args, **kwargs)) <= TOLERANCE


@pytest.mark.every(3)
@pytest.mark.parametrize("name", PROMPTS)
def test_the_graph_holds_for_other_images_and_texts(name):
    flat, graph = canonical(name)
    built = build(name)
    for kwargs in (built.kwargs, other(built.kwargs)):
        assert_equals_the_model(built, flat, graph, kwargs)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", PROMPTS)
def test_image_tokens_are_found(name):
    _, graph = canonical(name)
    found = [n.meta[SPANS] for n in graph.graph.nodes if SPANS in n.meta]
    assert found == [tuple(PROMPTS[name])] * (3 if name.startswith("hf/qwen3_vl") else 1)  # DeepStack writes twice more
    written = [n for n in graph.graph.nodes if "masked_scatter" in n.name or "index_put" in n.name]
    written = [n for n in written if not module_path(n).endswith(".experts")]  # which put their rows back in order
    assert len(written) == (name == "hf/kimi_k25")  # which writes zeros where features will stand


@pytest.mark.every(3)
@pytest.mark.parametrize("name", PROMPTS)
def test_moved_image_tokens_are_recomputed_or_refused(name):
    """The traced graph still takes them where nothing was read back; the canonical graph has them fixed."""
    flat, graph = canonical(name)
    built = build(name)
    kwargs = moved(built.kwargs)
    if name in FIXED:
        with pytest.raises(InputError, match="these inputs differ from the example inputs in what was fixed while tracing"):
            flat_caller(flat)(*built.args, **kwargs)
    else:
        inputs = flat_caller(flat)(*built.args, **kwargs)
        assert_equals_the_model(built, flat, flat.gm, kwargs)
        with pytest.raises(InputError, match="positions than the example, in which the prompt holds image features"):
            graph.meta[PLACEHOLDERS][0].check(inputs)


@pytest.mark.parametrize(("name", "change"), [
    ("hf/qwen2_5_vl", dict(image_grid_thw=torch.tensor([[1, 6, 8]]))),
    ("hf/glm4v", dict(image_grid_thw=torch.tensor([[1, 6, 8]]))),
    ("hf/llava_next", dict(image_sizes=torch.tensor([[112, 56]]))),
    ("hf/mistral3", dict(image_sizes=torch.tensor([[32, 128]]))),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_another_layout_of_the_image_is_refused(name, change):
    flat, _ = canonical(name)
    built = build(name)
    with pytest.raises(InputError, match=f"gave .* from .*{next(iter(change))}"):
        flat_caller(flat)(*built.args, **built.kwargs | change)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["hf/gemma3", "hf/idefics3", "hf/llava_next", "hf/qwen3_vl"])
def test_several_samples(name):
    flat, graph = canonical(name, 3)
    built = build(name, 3)
    for kwargs in (built.kwargs, other(built.kwargs)):
        assert_equals_the_model(built, flat, graph, kwargs)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["hf/gemma3", "hf/qwen2_5_vl", "hf/smolvlm"])
def test_attention_written_out(name):
    model, args, kwargs = FAMILIES[name].build(1)
    shake(model).set_attn_implementation("eager")
    flat = trace(model, args, kwargs)
    graph = canonicalise(flat.gm, flat.inputs)
    assert not [n for n in graph.graph.nodes if "scaled_dot_product" in n.name]
    for values in (kwargs, other(kwargs)):
        got = leaves(run(graph, *flat_caller(flat)(*args, **values)))
        assert error(got, run(model, *args, **values)) <= TOLERANCE


def test_the_table_names_families():
    assert {*PROMPTS} <= {*FAMILIES}
    assert {*FIXED} <= {*PROMPTS}
