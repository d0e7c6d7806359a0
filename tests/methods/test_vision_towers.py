"""What the newer taps give in a CLIP tower, against the maps that the model itself returns."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import error, leaves, run
from tests.reference.hiprune import hiprune
from tests.reference.topk import topk
from tokcompile import Keep, Mix, Recipe, Tokens
from tokcompile.errors import MethodError
from tokcompile.passes import rotary


def maps_of(model, kwargs):
    """The softmax maps of all blocks, computed without the fused kernel."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return run(model, **kwargs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("layer", [0, 1, 0.5, 1 / 3])
def test_hiprune_reads_a_middle_layer_and_the_one_before(layer, family, program):
    model, args, kwargs = family("hf/clip_vision", 2)
    optimized = tokcompile.optimize(
        program("hf/clip_vision", 2), method="hiprune", budget=Tokens(20), outputs="reduced", layer=layer, alpha=0.6
    )
    assert [(r.block, r.place) for r in optimized.plan.reductions] == [(3, "block")]
    kept = run(optimized, *args, **kwargs).kept["s0_index"]
    maps = maps_of(model, kwargs)
    middle, deep = (maps[i].mean(2)[..., 1:].numpy() for i in (layer if isinstance(layer, int) else round(4 * layer), 2))
    for b in range(2):
        assert kept[b].tolist() == hiprune(middle[b], deep[b], 20, 0.6, 7)


@pytest.mark.parametrize(("name", "layer"), [("hf/clip_vision", 0), ("hf/clip_vision", 0.25), ("hf/siglip_vision", 1)])
def test_vtc_cls_adds_up_the_rows_of_several_layers(name, layer, family, program, tmp_path):
    model, args, kwargs = family(name, 2)
    optimized = tokcompile.optimize(program(name, 2), method="vtc_cls", budget=Tokens(20), outputs="reduced", layer=layer)
    kept = run(optimized, *args, **kwargs).kept["s0_index"]
    maps = maps_of(model, kwargs)[int(layer * 4) if layer < 1 else 1 : 3]
    has_class = name == "hf/clip_vision"
    rows = torch.stack([m.mean(1)[:, 0, 1:] if has_class else m.mean((1, 2)) for m in maps], 1)
    for b in range(2):
        assert kept[b].tolist() == sorted(topk(rows[b].numpy(), 20))
    beside = [n.meta["val"].shape[-2] for n in optimized.graph_module.graph.nodes if n.target is torch.ops.aten.softmax.int]
    assert beside[: len(maps)] == [1 if has_class else 49] * len(maps)  # of a class token its row alone
    if has_class:
        assert optimized.export_onnx(tmp_path / "model.onnx").error < 1e-4  # the indices are outputs, and equal


@pytest.mark.parametrize("name", ["hf/clip_vision", "hf/vit_eager"])
@pytest.mark.parametrize("block", [0, 2])
def test_pyramiddrop_reads_the_block_that_follows(block, name, family, program):
    model, args, kwargs = family(name, 2)
    given = dict(method="pyramiddrop", budget={block: 15}, outputs="reduced")
    optimized = tokcompile.optimize(program(name, 2), **given)
    kept = run(optimized, *args, **kwargs).kept["s0_index"]
    rows = maps_of(model, kwargs)[block][:, :, -1, 1:].numpy()
    for b in range(2):
        assert kept[b].tolist() == sorted(topk(rows[b], 15))


def test_what_stands_for_the_text_where_there_is_none(family, program):
    """SparseVLM without text: every query rates alike."""
    model, args, kwargs = family("hf/clip_vision", 2)
    given = dict(method="sparsevlm", recycle=0, budget={2: 15}, outputs="reduced")
    kept = run(tokcompile.optimize(program("hf/clip_vision", 2), **given), *args, **kwargs).kept["s0_index"]
    received = maps_of(model, kwargs)[1].mean(2)[..., 1:].numpy()
    for b in range(2):
        assert kept[b].tolist() == sorted(topk(received[b], 15))


def test_a_middle_layer_with_other_tokens_is_refused(program):
    for method in ("hiprune", "vtc_cls"):
        with pytest.raises(tokcompile.UnsupportedGraph, match=r"(?s)attention of block 0, which had more tokens.*where="):
            tokcompile.optimize(program("hf/clip_vision"), method=method, where=[1, 3], layer=0)


def test_a_recipe_says_which_layer_it_means():
    for wrong in (dict(taps=("x", "earlier_attention")), dict(earlier=lambda depth, options: 0)):
        with pytest.raises(MethodError, match="must have both a tap 'earlier_' and `earlier`, or neither"):
            Recipe("wrong", lambda tokens, site: None, **wrong)
    with pytest.raises(MethodError, match="has place 'mlp'"):
        Recipe("wrong", lambda tokens, site: None, language_place="mlp")


def alone(shift):
    """Each token by itself, at four positions: its own, or `shift` further on."""

    def plan(tokens, site):
        index = torch.arange(site.k).expand(tokens.x.shape[0], -1)
        weights = torch.eye(site.n)[: site.k].expand(tokens.x.shape[0], -1, -1)
        positions = torch.stack([index, index, index + (shift or 0), index], -1)
        return Mix(index, weights, None if shift is None else positions)

    return Recipe("alone", plan, place="block", steps=tokcompile.steps.once(0.5))


def shares(monkeypatch):
    """Which position each channel is taken at, of all rotary tables that are read from now on."""
    found, right = [], rotary.channel_shares
    monkeypatch.setattr(rotary, "channel_shares", lambda *given: found.append(right(*given)) or found[-1])
    return found


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("name", "pairs"), [("timm/eva02", True), ("hf/dinov3", False), ("timm/vit_rope", True), ("hf/pixtral_vision", False)]
)
def test_several_positions_in_rotary_tables(name, pairs, family, program, monkeypatch):
    found = shares(monkeypatch)
    _, args, kwargs = family(name)
    out = []
    for shift in (None, 0, 1):
        optimized = tokcompile.optimize(program(name), method=alone(shift), where=[2], budget=0.6)
        out.append(leaves(run(optimized, *args, **kwargs))[0])
    width = len(found[0])
    half = [i * 4 // (width // 2) for i in range(width // 2)]
    assert found[0] == ([s for s in half for _ in range(2)] if pairs else half * 2)
    assert torch.equal(out[0], out[1])  # the same position four times is that position
    assert not torch.equal(out[0], out[2])


def test_shares_of_the_channels():
    assert rotary.channel_shares(12, 3, (), False, None) == [0, 0, 1, 1, 2, 2] * 2
    assert rotary.channel_shares(12, 3, (), True, None) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert rotary.channel_shares(6, 2, (2, 4), False, None) == [0, 1, 0, 0, 1, 1]
    assert rotary.channel_shares(12, 2, (2, 4), False, None) == [0, 1, 0, 0, 1, 1] * 2
    assert rotary.channel_shares(8, 8, (), False, None) == [0, 2, 4, 6] * 2  # more positions than frequencies
    with pytest.raises(tokcompile.UnsupportedGraph, match="7 channels does not hold 4 frequencies once or twice"):
        rotary.channel_shares(7, 2, (4,), False, None)


class Joined(nn.Module):
    """Attention also to learned keys, which stand before or after those of the tokens; with fused attention or without."""

    def __init__(self, fused, zeros):
        super().__init__()
        self.fused, self.zeros = fused, zeros
        self.qkv, self.mlp, self.more = nn.Linear(16, 48), nn.Linear(16, 16), nn.Parameter(torch.randn(2, 3, 8))

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            more = self.more.expand(len(x), -1, -1, -1)
            k, v = (nn.functional.pad(y, (0, 0, 1, 0)) if self.zeros else torch.cat([y, more], 2) for y in (k, v))
            if self.fused:
                y = nn.functional.scaled_dot_product_attention(q, k, v)
            else:
                y = (q @ k.mT * 0.3).softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2)
            x = x + self.mlp(x)
        return x


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_learned_keys_are_not_those_of_the_tokens(fused, zeros):
    model, x = Joined(fused, zeros).eval(), torch.randn(2, 12, 16)
    seen = []

    def plan(tokens, site):
        seen.append(tokens.k)
        return Keep(torch.arange(site.k).expand(len(tokens.k), -1))

    recipe = Recipe("probe", plan, taps=("x", "k"))
    run(tokcompile.optimize(model, (x,), method=recipe, budget=Tokens(8), where=[0]), x)
    want = run(model.qkv, x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)[1]
    assert error(seen[-1], want) < 1e-6
    assert tokcompile.check(model, (x,)).ok
