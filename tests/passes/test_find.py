"""What is read off a graph: blocks, the residual stream, prefix and suffix tokens, the patch grid, causality."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tokcompile
from tests.conftest import export
from tests.passes.graphs import Function, canonical
from tests.passes.parts import D, Parts, pre_norm
from tokcompile.compiler import analyse
from tokcompile.passes.find import find
from tokcompile.passes.graph import shape
from tokcompile.passes.origin import slice_bounds, view_sources

# name: (blocks, length, prefix, suffix, grid) of each stage, in order
STAGES = {
    "timm/vit": [(4, 50, 1, 0, (7, 7))],
    "timm/vit_gap": [(4, 49, 0, 0, (7, 7))],
    "timm/vit_n_equals_dim": [(4, 50, 1, 0, (7, 7))],
    "timm/vit_res_post_norm": [(4, 49, 0, 0, (7, 7))],
    "timm/vit_parallel_scaling": [(4, 50, 1, 0, (7, 7))],
    "timm/deit_distilled": [(4, 51, 2, 0, (7, 7))],
    "timm/dinov2_reg4": [(4, 54, 5, 0, (7, 7))],
    "timm/cait": [(4, 49, 0, 0, (7, 7)), (1, 1, 0, 0, None)],
    "timm/swin": [(2, 196, 0, 0, (14, 14)), (2, 49, 0, 0, (7, 7))],
    "timm/pit": [(2, 50, 1, 0, (7, 7)), (1, 17, 1, 0, (4, 4)), (1, 5, 1, 0, (2, 2))],
    "timm/mixer": [],
    "hf/dinov2_with_registers": [(4, 54, 5, 0, (7, 7))],
    "hf/yolos": [(4, 56, 1, 6, (7, 7))],
    "hf/clip": [(4, 50, 1, 0, (7, 7)), (4, 12, 0, 0, None)],
    "hf/siglip_vision": [(4, 49, 0, 0, (7, 7))],
    "hf/vitpose_backbone": [(4, 40, 0, 0, (8, 5))],
    "hf/ast": [(4, 42, 2, 0, (5, 8))],
    "hf/videomae": [(4, 50, 0, 0, (2, 5, 5))],
    "hf/pixio": [(4, 57, 8, 0, (7, 7))],
    "hf/llama": [(4, 40, 0, 0, None)],
    "hf/sam_vision": [(4, 49, 0, 0, (7, 7))],
    "hf/eomt": [(2, 69, 5, 0, (8, 8)), (2, 75, 11, 0, (8, 8))],
    "torchvision/vit": [(4, 50, 1, 0, (7, 7))],
    "torch/encoder_post_norm": [(4, 49, 0, 0, (7, 7))],
    "torch/einsum_vit": [(4, 50, 1, 0, (7, 7))],
}


def structure(name):
    return analyse(export(name), None, None).structure


def stages(found):
    """(blocks, length, prefix, suffix, grid) of each run of blocks over the same tokens."""
    out = []
    for block in found.blocks:
        s = block.stage
        row = (s.length, s.prefix, s.suffix, s.grid)
        out = [*out[:-1], (out[-1][0] + 1, *row)] if out and out[-1][1:] == row else [*out, (1, *row)]
    return out


@pytest.mark.every(2)
@pytest.mark.parametrize("name", STAGES)
def test_stages_of_models(name):
    found = structure(name)
    assert stages(found) == STAGES[name]
    for block in found.blocks:
        assert block.why_not is None
        assert shape(block.entry) == shape(block.mid)
        assert shape(block.mid)[block.token_axis] == block.stage.length
        assert block.entry in block.mid.all_input_nodes
        assert block.end is None or block.mid in block.end.all_input_nodes
        assert found.order[block.entry] < found.order[block.mid]
    assert {b.end or b.mid for b in found.blocks} <= found.leading


@pytest.mark.parametrize(("name", "paths"), [
    ("timm/vit", ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
    ("hf/dinov2_with_registers", [f"encoder.layer.{i}" for i in range(4)]),
    ("hf/llama", [f"model.layers.{i}" for i in range(4)]),
    ("torchvision/vit", [f"encoder.layers.encoder_layer_{i}" for i in range(4)]),
    ("hf/clip", [f"{part}_model.encoder.layers.{i}" for part in ("vision", "text") for i in range(4)]),
])  # fmt: skip
def test_blocks_are_named_by_their_module(name, paths):
    assert [b.path for b in structure(name).blocks] == paths


@pytest.mark.parametrize(("name", "left_alone"), [
    ("timm/vit", 0), ("hf/siglip_vision", 1), ("timm/vit_siglip", 1), ("timm/cait", 1), ("timm/crossvit", 4),
])  # fmt: skip
def test_cross_and_pooling_attention_is_left_alone(name, left_alone):
    unrecognised = structure(name).unrecognised
    assert len(unrecognised) == left_alone
    assert all("no residual add after it (cross or pooling attention" in text for text in unrecognised)


@pytest.mark.parametrize(("name", "kinds"), [
    ("timm/vit", {(True, False)}),
    ("hf/clip", {(True, False), (False, True)}),
    ("hf/llama", {(False, False)}),
    ("hf/llava", {(True, False), (False, True)}),
    ("torch/einsum_vit", {(False, False)}),
])  # fmt: skip
def test_stages_are_visual_or_text_or_neither(name, kinds):
    assert {(b.stage.visual, b.stage.text) for b in structure(name).blocks} == kinds


@pytest.mark.parametrize(("name", "causal"), [("hf/llama", True), ("hf/llama_eager", True), ("hf/gpt2", True), ("hf/phi", True),
                                              ("hf/llama_padded", True), ("timm/vit", False),
                                              ("timm/beit", False)])  # fmt: skip
def test_causal_attention_is_seen(name, causal):
    assert {a.causal for b in structure(name).blocks for a in b.attentions} == {causal}


@pytest.mark.parametrize(("name", "axes"), [
    ("timm/vit", (1, 0)), ("torch/encoder_sequence_first", (0, 1)), ("hf/qwen2_vl_vision", (0, None)),
])  # fmt: skip
def test_where_tokens_and_batch_run(name, axes):
    assert {(b.token_axis, b.batch_axis) for b in structure(name).blocks} == {axes}


@pytest.mark.parametrize(("name", "count"), [("timm/vit", 1), ("timm/vit_parallel_things", 2), ("timm/vit_diff_attention", 2)])
def test_attentions_side_by_side_are_one_block(name, count):
    assert {len(b.attentions) for b in structure(name).blocks} == {count}


def test_feature_maps_say_why_not():
    found = structure("timm/visformer")
    assert found.sites() == []
    assert all("its tokens lie on two axes (a grid), not on one" in b.why_not for b in found.blocks)


def patches(image):
    return F.conv2d(image, torch.ones(D, 3, 4, 4), stride=4)


def rows(x):
    return x.flatten(2).transpose(1, 2)


def put_back(x):
    """Tokens and masks for others in an order of each sample's own, as a masked autoencoder has them."""
    x = torch.cat([x, torch.ones(2, 6, D)], 1)
    return x.gather(1, x.argsort(1))


# name: (patches to tokens, prefix, suffix, grid)
LAYOUTS = {
    "flat": (rows, 0, 0, (3, 5)),
    "channels-last": (lambda x: x.permute(0, 2, 3, 1).reshape(2, 15, D), 0, 0, (3, 5)),
    "mT": (lambda x: x.flatten(2).mT, 0, 0, (3, 5)),
    "class-token": (lambda x: torch.cat([x.new_ones(2, 1, D), rows(x)], 1), 1, 0, (3, 5)),
    "both-sides": (lambda x: torch.cat([x.new_ones(2, 2, D), rows(x), x.new_ones(2, 3, D)], 1), 2, 3, (3, 5)),
    "twice": (lambda x: torch.cat([torch.ones(2, 1, D), torch.cat([torch.ones(2, 4, D), rows(x)], 1) * 2], 1), 5, 0, (3, 5)),
    "cut-off": (lambda x: torch.cat([torch.ones(2, 1, D), rows(x)], 1)[:, 1:] + 1, 0, 0, (3, 5)),
    "partly-cut": (lambda x: torch.cat([torch.ones(2, 3, D), rows(x)], 1)[:, 1:], 2, 0, (3, 5)),
    "packed": (lambda x: torch.cat([torch.ones(4, D), rows(x)[0]], 0).unsqueeze(0), 4, 0, (3, 5)),
    "images-side-by-side": (lambda x: torch.cat([torch.ones(2, 2, D), rows(x), rows(x)[:, :6]], 1), 2, 0, None),
    "images-with-positions": (
        lambda x: torch.cat([torch.ones(2, 2, D), rows(x) + torch.ones(15, D), F.layer_norm(rows(x), (D,), torch.ones(D))], 1),
        2,
        0,
        None,
    ),
    "registers-that-saw-the-image": (lambda x: torch.cat([rows(x)[:, :4] * 0 + 1, rows(x)], 1), 4, 0, (3, 5)),
    "text-that-saw-the-image": (lambda x: torch.cat([rows(x), torch.ones(2, 6, 15) @ rows(x)], 1), 0, 6, (3, 5)),
    "mean-in-front": (lambda x: torch.cat([x.mean((2, 3))[:, None], rows(x)], 1), 1, 0, (3, 5)),
    "a-part": (lambda x: rows(x)[:, :12], 0, 0, None),
    "turned": (lambda x: torch.cat([torch.ones(2, 2, D), rows(x), torch.ones(2, 1, D)], 1).flip(1), 1, 2, (3, 5)),
    "rows-of-all": (lambda x: (torch.cat([torch.ones(2, 1, D), rows(x)], 1).view(-1, D) * 2).view(2, 16, D), 1, 0, (3, 5)),
    "one-of-a-batch": (lambda x: torch.cat([torch.ones(2, 1, D), rows(x)], 1)[0][None], 1, 0, (3, 5)),
    "squeezed": (lambda x: torch.cat([torch.ones(2, 1, D), rows(x)], 1)[:, None].squeeze(1), 1, 0, (3, 5)),
    "put-back": (lambda x: torch.cat([torch.ones(2, 1, D), put_back(rows(x)[:, :9])], 1), 1, 0, None),
    "class-token-in-the-middle": (lambda x: torch.cat([rows(x)[:, :8], torch.ones(2, 1, D), rows(x)[:, 8:]], 1), 0, 8, None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_prefix_suffix_and_grid(name):
    tokens, prefix, suffix, grid = LAYOUTS[name]
    block = Parts(pre_norm)
    gm = canonical(Function(lambda image: block(tokens(patches(image))), block=block), torch.randn(2, 3, 12, 20))
    (found,) = find(gm).blocks
    assert (found.stage.prefix, found.stage.suffix, found.stage.grid) == (prefix, suffix, grid)
    assert found.stage.visual


@pytest.mark.parametrize(("before", "after", "axis", "want"), [
    ((2, 16, 3, 5), (2, 16, 15), 2, [2, 3]),
    ((2, 3, 5, 16), (2, 15, 16), 1, [1, 2]),
    ((2, 15, 16), (2, 15, 4, 4), 1, [1]),
    ((2, 15, 16), (30, 16), 0, [0, 1]),
    ((30, 16), (2, 15, 16), 1, None),
    ((2, 1, 15, 16), (2, 15, 16), 1, [2]),
], ids=str)  # fmt: skip
def test_which_axes_a_view_joined(before, after, axis, want):
    assert view_sources(before, after, axis) == want


def test_slice_bounds_are_pythons():
    assert slice_bounds(1, None, 10) == (1, 10)
    assert slice_bounds(-4, -1, 10) == (6, 9)
    assert slice_bounds(None, 1 << 62, 10) == (0, 10)


@pytest.mark.parametrize("zeros", [True, False])
def test_learned_queries_are_no_patches(zeros):
    """The queries of a decoder are more blocks over image features than the encoder has: still the patches are reduced."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4, 4)
            encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
            decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
            self.decoder = nn.TransformerDecoder(decoder, 4)
            self.queries = nn.Parameter(torch.zeros(1, 10, 16) if zeros else torch.randn(1, 10, 16))

        def forward(self, image):
            memory = self.encoder(self.patch(image).flatten(2).transpose(1, 2))
            return self.decoder(self.queries.expand(len(image), -1, -1), memory)

    model, image = Detector().eval(), torch.randn(2, 3, 24, 24)
    optimized = tokcompile.optimize(model, (image,), method="random", budget=0.5)
    assert {r.n for r in optimized.plan.reductions} <= set(range(18, 37))
    assert [r.path.split(".")[0] for r in optimized.plan.reductions] == ["encoder"] * len(optimized.plan.reductions)
    assert len(optimized.plan.reductions) > 0
