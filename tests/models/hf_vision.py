"""Small vision towers of transformers: images to tokens."""

from __future__ import annotations

import torch

from .family import Family, noise, tokens
from .hf_base import BEIT, BODY, DINO, EAGER, QWEN, TEXT, VIT, image, pair, qwen, row


def _mae(batch: int) -> dict:
    """An image and the noise that picks the masked patches."""
    return dict(pixel_values=noise(batch, 3, 56, 56), noise=noise(batch, 49))


def _siglip2(batch: int) -> dict:
    """Patches of a 6 x 6 grid padded to 40, their mask and the grid."""
    mask = (torch.arange(40) < 36).long().repeat(batch, 1)
    return dict(
        pixel_values=noise(batch, 40, 3 * 8 * 8),
        pixel_attention_mask=mask,
        spatial_shapes=torch.tensor([[6, 6]] * batch),
    )


def _document(batch: int) -> dict:
    """Words with their boxes on a page, and the page."""
    boxes = torch.randint(0, 20, (batch, 12, 4), generator=torch.Generator().manual_seed(0)).sort(-1).values
    ids = tokens(batch, 12, 64)
    return dict(input_ids=ids, bbox=boxes, attention_mask=torch.ones_like(ids), pixel_values=noise(batch, 3, 56, 56))


VISION: tuple[Family, ...] = (
    # images to tokens
    row("vit", "ViTModel", "ViTConfig", VIT, image()),
    row("vit_eager", "ViTModel", "ViTConfig", VIT | EAGER, image()),
    row("vit_hidden_states", "ViTModel", "ViTConfig", VIT, image(output_hidden_states=True)),
    row("vit_attentions", "ViTModel", "ViTConfig", VIT | EAGER, image(output_attentions=True)),
    row("vit_classifier", "ViTForImageClassification", "ViTConfig", VIT | dict(num_labels=10), image()),
    row(
        "vit_interpolated",
        "ViTModel",
        "ViTConfig",
        VIT,
        image(40, interpolate_pos_encoding=True),
        note="position table is resampled in the graph",
    ),
    row(
        "vit_masked_image",
        "ViTForMaskedImageModeling",
        "ViTConfig",
        VIT | dict(encoder_stride=8),
        image(),
        note="dense output",
    ),
    row("deit", "DeiTModel", "DeiTConfig", VIT, image()),
    row(
        "deit_distilled_classifier",
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        VIT | dict(num_labels=10),
        image(),
    ),
    row("dinov2", "Dinov2Model", "Dinov2Config", DINO, image()),
    row("dinov2_eager", "Dinov2Model", "Dinov2Config", DINO | EAGER, image(output_attentions=True)),
    row("dinov2_hidden_states", "Dinov2Model", "Dinov2Config", DINO, image(output_hidden_states=True)),
    row(
        "dinov2_classifier",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        DINO | dict(num_labels=10),
        image(),
        note="CLS joined with the mean of the patches",
    ),
    row(
        "dinov2_backbone",
        "Dinov2Backbone",
        "Dinov2Config",
        DINO | dict(out_features=["stage2", "stage4"]),
        image(),
        note="feature maps after blocks 2 and 4",
    ),
    row("dinov2_with_registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, image()),
    row(
        "dinov3",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        DINO | dict(intermediate_size=96, num_register_tokens=4),
        image(),
    ),
    row("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", VIT, image()),
    row(
        "clip_vision_projection",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        VIT | dict(projection_dim=32),
        image(),
    ),
    row(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        dict(vision_config=("CLIPVisionConfig", VIT), text_config=("CLIPTextConfig", TEXT), projection_dim=32),
        pair,
    ),
    row("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", VIT, image()),
    row(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        dict(
            vision_config=("SiglipVisionConfig", VIT),
            text_config=("SiglipTextConfig", TEXT | dict(projection_size=48)),
        ),
        pair,
    ),
    row(
        "siglip2_vision",
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        BODY | dict(patch_size=8, num_patches=36),
        _siglip2,
        note="4 of 40 patches are padding",
    ),
    row(
        "radio",
        "RadioModel",
        "RadioConfig",
        dict(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=2.0,
            patch_size=8,
            image_size=64,
            max_img_size=64,
        ),
        lambda batch: dict(pixel_values=noise(batch, 3, 64, 48)),
        note="3 class tokens and 7 registers",
    ),
    row("beit", "BeitModel", "BeitConfig", BEIT | dict(use_relative_position_bias=True), image()),
    row("beit_shared", "BeitModel", "BeitConfig", BEIT | dict(use_shared_relative_position_bias=True), image()),
    row(
        "data2vec_vision",
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        BEIT | dict(use_relative_position_bias=True),
        image(),
    ),
    row(
        "yolos",
        "YolosForObjectDetection",
        "YolosConfig",
        VIT | dict(image_size=[56, 56], num_detection_tokens=6, num_labels=5),
        image(),
        note="6 suffix tokens",
    ),
    row(
        "layoutlmv3",
        "LayoutLMv3Model",
        "LayoutLMv3Config",
        TEXT
        | dict(max_position_embeddings=40, input_size=56, patch_size=8, max_2d_position_embeddings=64, coordinate_size=8)
        | dict(shape_size=8, rel_pos_bins=8, max_rel_pos=16, rel_2d_pos_bins=8, max_rel_2d_pos=16),
        _document,
        note="12 words before the patches, biases by bucketed distances",
    ),
    row("ijepa", "IJepaModel", "IJepaConfig", VIT, image()),
    row("vit_mae", "ViTMAEModel", "ViTMAEConfig", VIT, _mae, note="drops 3 of 4 patches by the given noise"),
    row("vit_msn", "ViTMSNModel", "ViTMSNConfig", VIT, image()),
    row("blip_vision", "BlipVisionModel", "BlipVisionConfig", VIT, image()),
    row("blip2_vision", "Blip2VisionModel", "Blip2VisionConfig", VIT, image()),
    row(
        "internvl_vision",
        "InternVLVisionModel",
        "InternVLVisionConfig",
        VIT | dict(image_size=[56, 56], patch_size=[8, 8], use_qk_norm=True, layer_scale_init_value=1e-5),
        image(),
    ),
    row(
        "pixtral_vision",
        "PixtralVisionModel",
        "PixtralVisionConfig",
        VIT,
        image(),
        note="the images of a batch share one sequence",
    ),
    row("aimv2_vision", "Aimv2VisionModel", "Aimv2VisionConfig", VIT, image()),
    row("mlcd_vision", "MLCDVisionModel", "MLCDVisionConfig", VIT, image()),
    row("owlvit_vision", "OwlViTVisionModel", "OwlViTVisionConfig", VIT, image()),
    row(
        "groupvit_vision",
        "GroupViTVisionModel",
        "GroupViTVisionConfig",
        VIT | dict(depths=(2, 1, 1), num_group_tokens=(8, 4, 0), num_output_groups=(8, 4, 4)),
        image(),
        note="groups its own tokens",
    ),
    row(
        "llama4_vision",
        "Llama4VisionModel",
        "Llama4VisionConfig",
        VIT | dict(image_size=64, intermediate_size=192, vision_output_dim=48, projector_input_dim=48, projector_output_dim=48),
        image(64),
        note="pixel shuffle merges 2 x 2 patches",
    ),
    row("idefics3_vision", "Idefics3VisionTransformer", "Idefics3VisionConfig", VIT, image()),
    row(
        "qwen2_vl_vision",
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        QWEN | dict(embed_dim=64, hidden_size=80),
        qwen,
        note="groups of 2 x 2 patches are merged",
    ),
    row(
        "qwen2_5_vl_vision",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        QWEN | dict(hidden_size=64, intermediate_size=112, out_hidden_size=80, window_size=32, fullatt_block_indexes=[1, 3]),
        qwen,
        note="window attention, 2 x 2 merger",
    ),
    row(
        "qwen3_vl_vision",
        "Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        QWEN
        | dict(
            hidden_size=64,
            intermediate_size=112,
            out_hidden_size=80,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 2],
        ),
        qwen,
        note="DeepStack features, 2 x 2 merger",
    ),
    row(
        "pixio",
        "PixioModel",
        "PixioConfig",
        {k: v for k, v in DINO.items() if k != "layerscale_value"},
        image(),
        note="8 CLS tokens",
    ),
)
