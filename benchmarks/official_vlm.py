"""The comparisons of official.py for the methods of vision-language models; what is missing is skipped as there:

git clone https://github.com/Cooperx521/PyramidDrop       repos/PyramidDrop
git clone https://github.com/Gumpest/SparseVLMs           repos/SparseVLMs
git clone https://github.com/Danielement321/HiPrune       repos/HiPrune
git clone https://github.com/THU-MIG/VTC-CLS              repos/VTC-CLS
git clone https://github.com/LaVi-Lab/AIM                 repos/AIM
git clone https://github.com/MouxiaoHuang/PPE             repos/PPE
python -m benchmarks.official_vlm --repos repos
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import tokcompile
from benchmarks.official import Row, compare_all, official, randn, run
from tokcompile.methods.aim import importance, merge_to
from tokcompile.methods.ppe import last_members
from tokcompile.methods.sparsevlm import kept, recycled
from tokcompile.passes.rotary import channel_shares
from tokcompile.primitives import density_peaks, members
from tokcompile.recipe import Tokens


class Quiet(types.ModuleType):
    """torch without noise: `rand` gives zeros, and `sort` keeps the lower index first among equals."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def rand(*size: Any, **given: Any) -> Tensor:
        return torch.zeros(*size, **given)

    @staticmethod
    def sort(x: Tensor, **given: Any) -> Any:
        return torch.sort(x, stable=True, **given)


def decoder(seed: int, length: int) -> tuple[nn.Module, Tensor]:
    """A small Llama with random weights and a prompt of embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=100, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model, randn(1, length, 64, seed=seed)


def pyramiddrop(repos: Path) -> Iterator[Row]:
    """LlamaModel.pdrop_rank_drop before layer 1 of a small Llama, with that layer's weights, against the compiled prefill."""
    from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask

    file = repos / "PyramidDrop/llava/model/modeling_llama_pdrop.py"
    names = ("rotate_half", "apply_rotary_pos_emb", "LlamaModel.pdrop_rank_drop")
    mask = {"_prepare_4d_causal_attention_mask": _prepare_4d_causal_attention_mask, "IGNORE_INDEX": -100}
    code = official(file, *names, **mask)
    start, text = 5, 12
    for n, ratio in ((144, 0.5), (144, 0.25), (61, 0.4)):
        differ, error = 0, 0.0
        for seed in range(5):
            model, prompt = decoder(seed, start + n + text)
            k = int(n * ratio)
            given = dict(method="pyramiddrop", budget={1: k}, spans=[(start, start + n)], outputs="reduced")
            ours = tokcompile.optimize(model, kwargs={"inputs_embeds": prompt, "use_cache": False}, **given)
            index = ours(inputs_embeds=prompt, use_cache=False).kept["s0_index"][0]
            hidden = model.model(inputs_embeds=prompt, output_hidden_states=True).hidden_states[1]
            features = code["pdrop_rank_drop"](ranking(model, n, ratio, start, text), 0, 1, hidden, None, None, None)[2]
            expected = torch.cat([hidden[0, :start], hidden[0, start + index], hidden[0, start + n :]])
            differ += not torch.equal(features[0], expected)
            error = max(error, float((features[0] - expected).abs().max()))
        yield Row("pyramiddrop", f"layer 1 of a Llama, N={n} k={k}", differ, 5, error)


def ranking(model: nn.Module, n: int, ratio: float, start: int, text: int) -> SimpleNamespace:
    """The object that pdrop_rank_drop is a method of."""
    layer: Any = model.model.layers[1]

    def rotary(value: Tensor, seq_len: int) -> tuple[Tensor, ...]:
        return tuple(table[0] for table in model.model.rotary_emb(value, torch.arange(seq_len)[None]))

    own = layer.self_attn
    attention = SimpleNamespace(num_heads=4, num_key_value_heads=4, head_dim=16, rotary_emb=rotary)
    attention.q_proj, attention.k_proj, attention.v_proj = own.q_proj, own.k_proj, own.v_proj
    ahead = SimpleNamespace(input_layernorm=layer.input_layernorm, self_attn=attention)
    counts = dict(image_tokens=[n], image_token_ratio_list=[1.0, ratio], image_token_posi=[start], prompt_len=[start + text])
    return SimpleNamespace(config=SimpleNamespace(), layers=[None, ahead], training=False, **counts)


def sparsevlm(repos: Path) -> Iterator[Row]:
    """attn_postprocess_topk with its table of counts, and cluster_and_merge without noise."""
    folder = repos / "SparseVLMs/llava/model/language_model"
    axes = {"b l r -> b l () r": 2, "b l r -> b () l r": 1}
    ein = SimpleNamespace(rearrange=lambda x, how: x.unsqueeze(axes[how]))
    score = official(folder / "score.py", "attn_postprocess_topk", RETAIN_TOKN=0, layer_dict={2: 0})
    merge = official(folder / "utils.py", "index_points", "cluster_and_merge", torch=Quiet("torch"), ein=ein)
    start, text = 5, 20
    for n, k in ((576, 309), (309, 204), (204, 113)):  # 192 tokens on average, as released: 300, 200 and 110 kept
        differ, error = 0, 0.0
        for seed in range(5):
            length, options = start + n + text, {"recycle": 0.3, "per_cluster": 10}
            count, image = kept(n, k, options), slice(start, start + n)
            attention, x = randn(1, 4, length, length, seed=seed).softmax(-1), randn(1, length, 64, seed=seed)
            embeds, words = randn(1, n, 64, seed=seed + 50) / 8, randn(1, text, 64, seed=seed + 60) / 8
            share = (embeds @ words.transpose(1, 2)).softmax(2).mean(1)
            raters = torch.where(share > share.mean())
            score["sparse_token_dict"] = {0: [count]}
            mask, _, value = score["attn_postprocess_topk"](attention, start, n, start + n, raters, 2)
            again, clusters = recycled(n - count, options)
            dropped = value[0].masked_fill(mask[0], -1).topk(again).indices
            theirs = torch.cat([x[0, image][mask[0]], merge["cluster_and_merge"](x[:, image][:, dropped], clusters)[0]])
            rows = attention[:, :, start + n :, image]
            body = Tokens(x=x[:, image], text_attention=rows, embeds=embeds, text_embeds=words)
            where = {"text": ((start + n, length),), "start": start}
            plan, ours, _ = run("sparsevlm", body, k, where=where)
            differ += not torch.equal(plan.index[0, :count], mask[0].nonzero()[:, 0])
            error = max(error, float((ours[0] - theirs).abs().max()))
        yield Row("sparsevlm", f"N={n} -> {count} and {clusters} recycled of {again}", differ, 5, error)


class OnHost:
    """Attention maps whose `.cuda()` leaves them where they are."""

    def __init__(self, maps: list[Tensor]):
        self.maps = maps

    def __getitem__(self, layer: int) -> SimpleNamespace:
        return SimpleNamespace(cuda=lambda: self.maps[layer].clone())


def behind_tower(x: Tensor, maps: list[Tensor]) -> SimpleNamespace:
    """The object that encode_images is a method of: its tower gives x and these maps for any image."""
    model = SimpleNamespace(get_vision_tower=lambda: lambda image: (x, OnHost(maps)), mm_projector=lambda x: x)
    return SimpleNamespace(get_model=lambda: model, config=SimpleNamespace(mm_vision_select_layer=-2))


def hiprune(repos: Path) -> Iterator[Row]:
    """LlavaMetaForCausalLM.encode_images behind a tower of 24 layers of random attention."""
    file = repos / "HiPrune/LLaVA/llava/model/llava_arch.py"
    for k in (192, 128, 64):
        settings = {"HIPRUNE_RETENTION": str(k), "HIPRUNE_OBJECT_LAYER": "9", "HIPRUNE_ALPHA": "0.1"}
        code = official(file, "LlavaMetaForCausalLM.encode_images", os=SimpleNamespace(environ=settings))
        differ, error = 0, 0.0
        for seed in range(5):
            maps = [randn(1, 4, 577, 577, seed=100 * seed + layer).softmax(-1) for layer in range(24)]
            x = randn(1, 576, 32, seed=seed)
            model = SimpleNamespace(
                get_vision_tower=lambda x=x, maps=maps: lambda _: (x, OnHost(maps)), mm_projector=lambda x: x
            )
            self = SimpleNamespace(get_model=lambda model=model: model, config=SimpleNamespace(mm_vision_select_layer=-2))
            mask = code["encode_images"](self, None)[1][0]
            received = [maps[layer].mean(2)[..., 1:] for layer in (8, -2)]
            body = Tokens(x=x, earlier_attention=received[0], received_attention=received[1])
            plan, ours, _ = run("hiprune", body, k, 1, {"grid": (24, 24)})
            differ += not torch.equal(plan.index[0], mask.nonzero()[:, 0])
            error = max(error, float((ours[0] - x[0, plan.index[0]]).abs().max()))
        yield Row("hiprune", f"N=576 k={k}", differ, 5, error)


def vtc_cls(repos: Path) -> Iterator[Row]:
    """CLIPVisionTower.cls_token_only behind a tower of 24 layers of random attention, and the choice of encode_images."""
    file = repos / "VTC-CLS/llava/model/multimodal_encoder/clip_encoder.py"
    code = official(file, "CLIPVisionTower.cls_token_only")
    for first in (16, 8, 22):
        differ, error = 0, 0.0
        for seed in range(5):
            maps = [randn(1, 4, 577, 577, seed=100 * seed + layer).softmax(-1) for layer in range(24)]
            x = randn(1, 576, 32, seed=seed)
            out = SimpleNamespace(attentions=maps)
            self = SimpleNamespace(vision_tower=lambda *a, out=out, **k: out, feature_select=lambda _, x=x: x, device="cpu")
            self.dtype = torch.float32
            score, features = code["cls_token_only"](self, x, start_layer=first)
            index = score.topk(64).indices.sort().values
            rows = torch.stack([maps[layer][:, :, 0, 1:].mean(1) for layer in range(first, 23)], 1)
            plan, ours, _ = run("vtc_cls", Tokens(x=x, earlier_cls_attention=rows), 64, 1)
            differ += not torch.equal(plan.index[0], index)
            error = max(error, float((ours - features[:, index]).abs().max()))
        yield Row("vtc_cls", f"N=576 k=64 from layer {first}", differ, 5, error)


def aim(repos: Path) -> Iterator[Row]:
    """bipartite_soft_matching_merge in one and two rounds, and get_importance."""
    merge = official(repos / "AIM/llava/model/token_merge.py", "bipartite_soft_matching_merge")["bipartite_soft_matching_merge"]
    for n, rounds in ((196, (60,)), (196, (98, 49)), (576, (288, 144))):
        differ, error = 0, 0.0
        for seed in range(5):
            x = theirs = randn(2, n, 64, seed=seed)
            for r in rounds:
                theirs = merge(theirs, r, theirs)
            plan = merge_to(x, n - sum(rounds))
            ours = plan.weights @ x
            differ += int((ours - theirs).abs().max() > 1e-4)  # another order, or another partner, is far off
            error = max(error, float((ours - theirs).abs().max()))
        yield Row("aim", f"merging, N={n} - {' - '.join(map(str, rounds))}", differ, 5, error)
    file = repos / "AIM/other_packages/transformers/src/transformers/models/qwen2/modeling_qwen2.py"
    rank = official(file, "get_importance")["get_importance"]
    differ, error = 0, 0.0
    for seed in range(5):
        scores = randn(2, 4, 200, 200, seed=seed).masked_fill(torch.ones(200, 200).triu(1).bool(), float("-inf"))
        theirs, ours = rank(scores), importance(scores, 0.1, 5)
        best = [one[:, 14:158].topk(72).indices.sort().values for one in (theirs, ours)]
        differ += int((best[0] != best[1]).any(1).sum())
        error = max(error, float((theirs - ours).abs().max()))
    yield Row("aim", "pruning, 72 of 144 image tokens of 200", differ, 10, error)


def ppe(repos: Path) -> Iterator[Row]:
    """cluster_dpc_knn and merge_tokens without noise and with a stable sort; then the rotary tables of Qwen2.5-VL."""
    names = ("index_points", "cluster_dpc_knn", "select_pos_topk", "merge_tokens")
    code = official(repos / "PPE/src/models/chatunivi.py", *names, torch=Quiet("torch"), DEVICE_TYPE="CPU")
    for n, k in ((144, 65), (400, 180), (63, 12)):
        differ, error = 0, 0.0
        for seed in range(5):
            x = randn(1, n, 64, seed=seed)
            ids = torch.stack([torch.arange(n) + 1000 * axis for axis in range(3)])
            tokens = {"x": x, "idx_token": torch.arange(n)[None], "agg_weight": x.new_ones(1, n, 1), "mask": None}
            tokens |= {"position_ids": ids, "ppe_k": 8}
            theirs = code["merge_tokens"](tokens, code["cluster_dpc_knn"](tokens, k)[0], k)
            inside = members(density_peaks(x, k, 5)[1], k)
            many = last_members(inside, 8)[0]  # (k, 8)
            differ += not torch.equal(theirs["position_ids"], torch.cat([ids[axis][many].T for axis in range(3)]))
            error = max(error, float(((inside / inside.sum(-1, keepdim=True)) @ x - theirs["x"]).abs().max()))
        yield Row("ppe", f"N={n} k={k}, 8 positions on each of 3 axes", differ, 5, error)
    yield rotary_tables(repos)


def rotary_tables(repos: Path) -> Row:
    """Channels of the tables by the authors' sections against ours, for heads of 128 and sections 16, 24 and 24."""
    scope = official(repos / "PPE/src/training/monkey_patch_forward.py", "apply_multimodal_rotary_pos_emb_ppe",
                     rotate_half=lambda x: torch.cat([-x[..., 64:], x[..., :64]], -1))  # fmt: skip
    angle = 10000 ** -(torch.arange(64) / 64).repeat(2)
    g = torch.Generator().manual_seed(0)
    where = torch.randint(0, 60, (3, 8, 1, 20), generator=g)  # axis, member, sample, token
    rows = where.flatten(0, 1)[..., None] * angle  # (24, 1, 20, 128), axis by axis
    q, k = randn(1, 4, 20, 128, seed=1), randn(1, 4, 20, 128, seed=2)
    theirs = scope["apply_multimodal_rotary_pos_emb_ppe"](q, k, rows.cos(), rows.sin(), [2] * 8 + [3] * 16)[0]
    axis = torch.tensor(([0] * 16 + [1] * 24 + [2] * 24) * 2)
    share = torch.tensor(channel_shares(128, 8, (16, 24, 24), False, None))
    own = where[axis, share].movedim(0, -1) * angle  # (1, 20, 128): each channel at its axis' position of its share's member
    ours = q * own.cos() + torch.cat([-q[..., 64:], q[..., :64]], -1) * own.sin()
    error = float((ours - theirs).abs().max())
    return Row("ppe", "rotary embedding, head 128, sections 16 24 24", int(error > 1e-4), 1, error)


COMPARISONS = (pyramiddrop, sparsevlm, hiprune, vtc_cls, aim, ppe)

if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers, of the mask that PyramidDrop makes
    sys.exit(compare_all(COMPARISONS, __doc__ or ""))
