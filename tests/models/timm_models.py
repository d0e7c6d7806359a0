"""Small timm models: official architectures by entry point or class, made narrow and shallow."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import nn

from .family import Family, noise, seeded

# plain transformers: 56 px and patch 8 give 7 x 7 = 49 patches, width 48 with 4 heads of 12
_FLAT = dict(img_size=56, patch_size=8, embed_dim=48, num_heads=4, depth=4, num_classes=10)


def _timm(source: str, size: int, options: dict, batch: int) -> tuple[nn.Module, tuple, dict]:
    """Builds an entry point ("vit_tiny_patch16_224") or a class ("nest:Nest") with `options` overridden."""
    import timm

    with seeded():
        if ":" in source:
            module, _, cls = source.partition(":")
            model = getattr(importlib.import_module(f"timm.models.{module}"), cls)(**options)
        else:
            model = timm.create_model(source, pretrained=False, **options)
    return model.eval(), (noise(batch, 3, size, size),), {}


def _mvitv2(batch: int) -> tuple[nn.Module, tuple, dict]:
    """MViTv2, whose sizes come in a configuration object."""
    from timm.models.mvitv2 import MultiScaleVitCfg

    cfg = MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=24, num_heads=2)
    return _timm("mvitv2:MultiScaleVit", 64, dict(cfg=cfg, img_size=(64, 64), num_classes=10), batch)


def _caformer(batch: int) -> tuple[nn.Module, tuple, dict]:
    """CAFormer: convolution stages, then attention stages whose residual streams have a learned scale of their own."""
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, SepConv

    mixers = [SepConv, SepConv, Attention, Attention]
    norms = [LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias]
    options = dict(depths=(1, 1, 3, 1), dims=(16, 24, 32, 64), token_mixers=mixers, norm_layers=norms, num_classes=10)
    return _timm("metaformer:MetaFormer", 112, options, batch)


def _maxvit(batch: int) -> tuple[nn.Module, tuple, dict]:
    """MaxViT (tensorflow style), whose sizes come in a configuration object."""
    from timm.models.maxxvit import MaxxVitCfg, MaxxVitTransformerCfg

    attention = MaxxVitTransformerCfg(dim_head=12, window_size=(4, 4), grid_size=(4, 4))
    cfg = MaxxVitCfg((24, 48), (1, 1), ("M", "M"), stem_width=16, transformer_cfg=attention)
    return _timm("maxxvit:MaxxVit", 64, dict(cfg=cfg, img_size=64, num_classes=10), batch)


def _vitamin(batch: int) -> tuple[nn.Module, tuple, dict]:
    """ViTamin, whose convolution stages come in a configuration object."""
    from timm.models.vitamin import VitCfg, VitConvCfg

    convolutions = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stages = VitCfg(embed_dim=(16, 24, 48), depths=(1, 1, 1), stem_width=16, conv_cfg=convolutions, head_type="1d")
    sizes = dict(img_size=112, embed_dim=48, depth=4, num_heads=4, num_classes=10)
    return _timm("vitamin_small_224", 112, dict(embed_cfg=stages) | sizes, batch)


def _naflexvit_masked(batch: int) -> tuple[nn.Module, tuple, dict]:
    """NaFlexViT on ready patches of a 6 x 6 grid padded to 40, with their coordinates and mask."""
    sizes = dict(patch_size=8, embed_dim=48, depth=4, num_heads=4, pos_embed_grid_size=(6, 6), num_classes=10)
    model, _, _ = _timm("naflexvit_base_patch16_gap", 48, sizes, batch)
    valid = torch.arange(40) < 36
    grid = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    coordinates = torch.cat([grid, torch.zeros(4, 2, dtype=grid.dtype)]).repeat(batch, 1, 1)
    return model, (noise(batch, 40, 3 * 8 * 8), coordinates, valid.repeat(batch, 1)), {}


def _flat(name: str, source: str, note: str = "", /, **options) -> Family:
    """A plain transformer of the common size."""
    options = _FLAT | options
    return Family(f"timm/{name}", partial(_timm, source, options["img_size"], options), "timm", options["depth"], note)


def _other(name: str, source: str, size: int, blocks: int, note: str = "", /, **options) -> Family:
    """A model whose sizes are its own; `size` is the side of the input image."""
    return Family(f"timm/{name}", partial(_timm, source, size, dict(num_classes=10) | options), "timm", blocks, note)


TIMM_FAMILIES: tuple[Family, ...] = (
    _flat("vit", "vit_tiny_patch16_224"),
    _flat("vit_gap", "vit_tiny_patch16_224", global_pool="avg", class_token=False),
    _flat("vit_features", "vit_tiny_patch16_224", "all tokens are the output", num_classes=0, global_pool=""),
    _flat("vit_n_equals_dim", "vit_tiny_patch16_224", "49 patches + CLS = width 50", embed_dim=50, num_heads=2),
    _flat(
        "vit_n_equals_head_dim",
        "vit_tiny_patch16_224",
        "25 patches + CLS = head width 26",
        img_size=40,
        embed_dim=52,
        num_heads=2,
    ),
    _flat("vit_qk_norm", "vit_tiny_patch16_224", qk_norm=True, init_values=1e-5),
    _flat("vit_dynamic", "vit_tiny_patch16_224", "position table is resampled in the graph", dynamic_img_size=True),
    _flat("vit_res_post_norm", "vit_base_patch16_rpn_224"),
    _flat("vit_diff_attention", "vit_dlittle_patch16_reg1_gap_256"),
    _flat("vit_parallel_scaling", "vit_pwee_patch16_reg1_gap_256"),
    _flat("vit_parallel_diff", "vit_dpwee_patch16_reg1_gap_256"),
    _flat("vit_parallel_things", "vit_small_patch16_18x2_224"),
    _flat("vit_siglip", "vit_base_patch16_siglip_224"),
    _flat("vit_clip", "vit_base_patch32_clip_224"),
    _flat("vit_rope", "vit_small_patch16_rope_224"),
    _flat("vit_rope_mixed", "vit_small_patch16_rope_mixed_224"),
    _flat("vit_rope_reg", "vit_medium_patch16_rope_reg1_gap_256"),
    _flat("vit_relpos", "vit_relpos_small_patch16_224"),
    _flat("vit_relpos_cls", "vit_relpos_base_patch16_cls_224"),
    _flat("vit_srelpos", "vit_srelpos_small_patch16_224"),
    _flat("vit_pe_core", "vit_pe_core_tiny_patch16_384", ref_feat_shape=(7, 7), attn_pool_num_heads=4),
    _flat("flexivit", "flexivit_small"),
    _flat("aimv2", "aimv2_large_patch14_224"),
    _flat("deit_distilled", "deit_tiny_distilled_patch16_224"),
    _flat("deit3", "deit3_small_patch16_224"),
    _flat("dinov2", "vit_small_patch14_dinov2"),
    _flat("dinov2_reg4", "vit_small_patch14_reg4_dinov2"),
    _flat("dinov3", "vit_small_patch16_dinov3"),
    _flat("eva02", "eva02_tiny_patch14_224"),
    _flat("beit", "beit_base_patch16_224"),
    _flat("beit_shared", "beit:Beit", use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=1e-5),
    _flat(
        "samvit",
        "samvit_base_patch16",
        "7 x 7 grid padded to windows of 4",
        window_size=4,
        global_attn_indexes=(1, 3),
        neck_chans=24,
    ),
    _flat("cait", "cait_xxs24_224", "CLS joins after the body; 2 class-attention blocks"),
    _flat("xcit", "xcit_nano_12_p16_224", "attention over channels", img_size=112, patch_size=16),
    _flat("convit", "convit_tiny", embed_dim=12, local_up_to_layer=2),
    _other(
        "tnt",
        "tnt_s_legacy_patch16_224",
        112,
        4,
        img_size=112,
        patch_size=16,
        embed_dim=48,
        inner_dim=12,
        depth=4,
        num_heads_outer=4,
        num_heads_inner=2,
    ),
    _other(
        "naflexvit",
        "naflexvit_base_patch16_gap",
        56,
        4,
        patch_size=8,
        embed_dim=48,
        depth=4,
        num_heads=4,
        pos_embed_grid_size=(7, 7),
    ),
    _other(
        "naflexvit_resized",
        "naflexvit_base_patch16_map",
        56,
        4,
        "position table is resampled in the graph",
        patch_size=8,
        embed_dim=48,
        depth=4,
        num_heads=4,
    ),
    Family("timm/naflexvit_masked", _naflexvit_masked, "timm", 4, "4 of 40 patches are padding"),
    _other("pit", "pit_ti_224", 64, 4, img_size=64, base_dims=(12, 12, 12), depth=(2, 1, 1), heads=(2, 4, 8)),
    _other("hiera", "hiera_tiny_224", 64, 4, img_size=(64, 64), embed_dim=12, stages=(1, 1, 1, 1)),
    _other("swin", "swin_tiny_patch4_window7_224", 56, 4, img_size=56, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    _other("swinv2", "swinv2_tiny_window8_256", 64, 4, img_size=64, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    _other(
        "swinv2_cr",
        "swinv2_cr_tiny_224",
        56,
        4,
        img_size=56,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=7,
    ),
    _other(
        "volo",
        "volo:VOLO",
        112,
        4,
        "outlook attention, then 2 class-attention blocks",
        layers=(1, 1, 1, 1),
        img_size=112,
        stem_hidden_dim=16,
        embed_dims=(24, 48, 48, 48),
        num_heads=(2, 4, 4, 4),
    ),
    _other(
        "crossvit",
        "crossvit:CrossVit",
        112,
        4,
        "two branches",
        img_size=112,
        patch_size=(14, 16),
        embed_dim=(24, 48),
        depth=((1, 2, 1), (1, 2, 1)),
        num_heads=(2, 4),
    ),
    _other("mixer", "mlp_mixer:MlpMixer", 56, 4, "no attention", img_size=56, patch_size=8, num_blocks=4, embed_dim=48),
    Family("timm/mvitv2", _mvitv2, "timm", 4),
    _other(
        "visformer",
        "visformer:Visformer",
        112,
        4,
        "convolution blocks, then attention blocks",
        img_size=112,
        init_channels=8,
        embed_dim=48,
        depth=(1, 2, 1),
        num_heads=4,
        attn_stage="011",
        spatial_conv="100",
    ),
    _other(
        "levit",
        "levit:Levit",
        112,
        4,
        img_size=112,
        embed_dim=(32, 48, 64),
        key_dim=8,
        num_heads=(2, 3, 4),
        depth=(1, 2, 1),
    ),
    _other(
        "coat",
        "coat_tiny",
        64,
        6,
        "serial and parallel stages",
        img_size=64,
        embed_dims=(24, 24, 24, 24),
        serial_depths=(1, 1, 1, 1),
        parallel_depth=2,
        num_heads=4,
        crpe_window={3: 1, 5: 1, 7: 2},
    ),
    _other(
        "twins_svt",
        "twins_svt_small",
        112,
        4,
        img_size=112,
        embed_dims=(24, 48),
        num_heads=(2, 4),
        mlp_ratios=(4, 4),
        depths=(2, 2),
        wss=(7, 7),
        sr_ratios=(4, 2),
    ),
    _other(
        "twins_pcpvt",
        "twins_pcpvt_small",
        64,
        4,
        img_size=64,
        embed_dims=(24, 48),
        num_heads=(2, 4),
        mlp_ratios=(4, 4),
        depths=(2, 2),
        sr_ratios=(4, 2),
    ),
    Family("timm/maxvit", _maxvit, "timm", 2),
    _other("davit", "davit:DaVit", 56, 4, depths=(1, 1), embed_dims=(24, 48), num_heads=(2, 4)),
    _other(
        "gcvit",
        "gcvit:GlobalContextVit",
        112,
        4,
        img_size=112,
        window_size=(7, 7),
        window_ratio=None,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    _other("nest", "nest:Nest", 64, 3, img_size=64, embed_dims=(24, 32, 48), num_heads=(2, 4, 4), depths=(1, 1, 1)),
    _other(
        "pvt_v2",
        "pvt_v2:PyramidVisionTransformerV2",
        64,
        4,
        depths=(1, 1, 1, 1),
        embed_dims=(16, 24, 32, 48),
        num_heads=(1, 2, 4, 4),
    ),
    _other(
        "tiny_vit",
        "tiny_vit_5m_224",
        64,
        4,
        embed_dims=(16, 24, 32, 48),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 4, 4),
        window_sizes=(4, 4, 3, 2),
    ),
    Family("timm/caformer", _caformer, "timm", 4, "scaled residual streams"),
    Family("timm/vitamin", _vitamin, "timm", 4, "convolution stages, then a plain ViT"),
    _other(
        "deepseek_vit",
        "deepseek_vit:DeepseekVitClassifier",
        84,
        4,
        img_size=84,
        embed_dim=48,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
    ),
    _other(
        "qwen3_vit",
        "qwen3_vit:Qwen3VitClassifier",
        96,
        4,
        img_size=96,
        embed_dim=48,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
        pos_embed_grid_size=8,
    ),
    _other(
        "qwen3_vit_merge",
        "qwen3_vit:Qwen3VitClassifier",
        96,
        4,
        "groups of 2 x 2 patches are merged",
        img_size=96,
        embed_dim=48,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
        pos_embed_grid_size=8,
        encoder_pool="merge",
    ),
    _other(
        "gemma4_vit",
        "gemma4_vit:Gemma4VitClassifier",
        96,
        4,
        img_size=96,
        embed_dim=48,
        depth=4,
        num_heads=4,
        head_dim=12,
        intermediate_size=96,
        position_embedding_size=64,
    ),
)
