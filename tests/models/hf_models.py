"""Small transformers models: vision towers, dense heads, video, two-tower models, decoders and full VLMs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
from torch import nn

from .family import Family, noise, seeded, tokens

Inputs = Callable[[int], dict]

# 56 px and patch 8 give 7 x 7 = 49 patches, width 48 with 4 heads of 12
_BODY = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96)
_VIT = _BODY | dict(image_size=56, patch_size=8)
_DINO = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=8, layerscale_value=1e-5)
_TEXT = _BODY | dict(vocab_size=64, max_position_embeddings=20, bos_token_id=0, eos_token_id=63, pad_token_id=0)
_DECODER = _BODY | dict(
    vocab_size=64, max_position_embeddings=128, num_key_value_heads=2, bos_token_id=0, eos_token_id=63, pad_token_id=0
)


def _class(name: str) -> type:
    """A transformers class by name, or by dotted path where the package does not export it."""
    import transformers

    return attrgetter(name)(transformers)


def _config(name: str, options: dict):
    """A transformers configuration; a value ("ConfigName", options) inside `options` is a nested one."""
    nested = {k: _config(*v) if isinstance(v, tuple) and isinstance(v[0], str) else v for k, v in options.items()}
    return _class(name)(**nested)


def _hf(model: str, config: str, options: dict, inputs: Inputs, batch: int) -> tuple[nn.Module, tuple, dict]:
    """Builds `model` by class name from `config`; every input is a keyword argument."""
    with seeded():
        built = _class(model)(_config(config, options))
    return built.eval(), (), inputs(batch)


def _family(name: str, model: str, config: str, options: dict, inputs: Inputs, depth: int = 4, note: str = "") -> Family:
    """One table row."""
    return Family(f"hf/{name}", partial(_hf, model, config, options, inputs), "transformers", depth, note)


def _image(size: int = 56, **more) -> Inputs:
    """One image a sample, and constant arguments of the call."""
    return lambda batch: dict(pixel_values=noise(batch, 3, size, size), **more)


def _video(frames: int, size: int, key: str = "pixel_values", **more) -> Inputs:
    """One clip a sample."""
    return lambda batch: {key: noise(batch, frames, 3, size, size), **more}


def _embeds(length: int = 40, width: int = 48, **more) -> Inputs:
    """Embeddings for a decoder's prefill."""
    return lambda batch: dict(inputs_embeds=noise(batch, length, width), **more)


def _padded_embeds(batch: int) -> dict:
    """Embeddings with four padding positions on the left."""
    mask = torch.ones(batch, 40, dtype=torch.long)
    mask[:, :4] = 0
    return dict(inputs_embeds=noise(batch, 40, 48), attention_mask=mask, use_cache=False)


def _pair(batch: int) -> dict:
    """An image and 12 text tokens that end with the end-of-text token."""
    ids = tokens(batch, 12, 64)
    ids[:, -1] = 63
    return dict(pixel_values=noise(batch, 3, 56, 56), input_ids=ids, attention_mask=torch.ones_like(ids))


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


def _qwen(batch: int) -> dict:
    """Patches of `batch` images of 8 x 6 patches in one flat sequence."""
    return dict(hidden_states=noise(batch, 48, 3 * 2 * 8 * 8).flatten(0, 1), grid_thw=torch.tensor([[1, 8, 6]] * batch))


def _prompt(image_tokens: int, size: int = 56, type_ids: bool = False) -> Inputs:
    """An image and a prompt: 5 text tokens, the image's placeholders (id 60), 7 text tokens."""

    def make(batch: int) -> dict:
        ids = _prompt_ids(batch, image_tokens)
        more = dict(token_type_ids=torch.zeros_like(ids)) if type_ids else {}
        return dict(
            input_ids=ids,
            pixel_values=noise(batch, 3, size, size),
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            **more,
        )

    return make


def _prompt_ids(batch: int, image_tokens: int) -> torch.Tensor:
    """5 text tokens, placeholders (id 60), 7 text tokens."""
    text = tokens(batch, 12, 60)
    return torch.cat([text[:, :5], torch.full((batch, image_tokens), 60), text[:, 5:]], dim=1)


def _qwen_prompt(batch: int) -> dict:
    """A prompt with 12 placeholders a sample, for images of 8 x 6 patches merged by 2 x 2."""
    ids = _prompt_ids(batch, 12)
    vision = _qwen(batch)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == 60).int(),
        pixel_values=vision["hidden_states"],
        image_grid_thw=vision["grid_thw"],
        use_cache=False,
    )


def _qwen_two_images(batch: int) -> dict:
    """Two images a sample, of 8 x 6 and 4 x 6 patches: 12 and 6 placeholders, with text around both."""
    ids = torch.cat([_prompt_ids(batch, 12), _prompt_ids(batch, 6)], dim=1)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == 60).int(),
        pixel_values=noise(batch, 48 + 24, 3 * 2 * 8 * 8).flatten(0, 1),
        image_grid_thw=torch.tensor([[1, 8, 6], [1, 4, 6]] * batch),
        use_cache=False,
    )


def _smolvlm_prompt(batch: int) -> dict:
    """A prompt with 16 placeholders and one image (the second axis counts images) a sample."""
    return _prompt(16, 64)(batch) | dict(pixel_values=noise(batch, 1, 3, 64, 64))


def _gemma3_prompt(batch: int) -> dict:
    """A prompt with 16 placeholders a sample, marked as image tokens."""
    inputs = _prompt(16, 64)(batch)
    return inputs | dict(token_type_ids=(inputs["input_ids"] == 60).long())


def _onevision_prompt(batch: int) -> dict:
    """A prompt for one image given as a base view and one tile of 7 x 7 patches, with a newline token a row."""
    ids = _prompt_ids(batch, 49 + 49 + 7)
    return dict(
        input_ids=ids,
        pixel_values=noise(batch, 2, 3, 56, 56),
        image_sizes=torch.tensor([[56, 56]] * batch),
        attention_mask=torch.ones_like(ids),
        use_cache=False,
    )


def _anyres_prompt(batch: int) -> dict:
    """A prompt for one wide image: a base view of 7 x 7 patches and two tiles side by side, with a newline token a row."""
    ids = _prompt_ids(batch, 49 + 7 * (14 + 1))
    return dict(
        input_ids=ids,
        pixel_values=noise(batch, 3, 3, 56, 56),
        image_sizes=torch.tensor([[56, 112]] * batch),
        attention_mask=torch.ones_like(ids),
        use_cache=False,
    )


def _mistral3_prompt(batch: int) -> dict:
    """A prompt with 16 placeholders a sample and the size of each image."""
    return _prompt(16, 64)(batch) | dict(image_sizes=torch.tensor([[64, 64]] * batch))


def _idefics2_prompt(batch: int) -> dict:
    """A prompt with 8 placeholders, one for each latent of the resampler, and one image a sample."""
    return _prompt(8)(batch) | dict(pixel_values=noise(batch, 1, 3, 56, 56))


_EAGER = dict(attn_implementation="eager")
_BEIT = _VIT | dict(layer_scale_init_value=1e-5, drop_path_rate=0.0)
_QWEN = dict(depth=4, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2)
_LLAMA = ("LlamaConfig", _DECODER)
_MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])
_QWEN_IDS = dict(image_token_id=60, video_token_id=59, vision_start_token_id=61, vision_end_token_id=62)


def _llama_cache(batch: int) -> tuple[nn.Module, tuple, dict]:
    """Llama that returns its cache, which torch.export takes only once transformers has registered it."""
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    return _hf("LlamaForCausalLM", "LlamaConfig", _DECODER, _embeds(use_cache=True), batch)


def _document(batch: int) -> dict:
    """Words with their boxes on a page, and the page."""
    boxes = torch.randint(0, 20, (batch, 12, 4), generator=torch.Generator().manual_seed(0)).sort(-1).values
    ids = tokens(batch, 12, 64)
    return dict(input_ids=ids, bbox=boxes, attention_mask=torch.ones_like(ids), pixel_values=noise(batch, 3, 56, 56))


HF_FAMILIES: tuple[Family, ...] = (
    # images to tokens
    _family("vit", "ViTModel", "ViTConfig", _VIT, _image()),
    _family("vit_eager", "ViTModel", "ViTConfig", _VIT | _EAGER, _image()),
    _family("vit_hidden_states", "ViTModel", "ViTConfig", _VIT, _image(output_hidden_states=True)),
    _family("vit_attentions", "ViTModel", "ViTConfig", _VIT | _EAGER, _image(output_attentions=True)),
    _family("vit_classifier", "ViTForImageClassification", "ViTConfig", _VIT | dict(num_labels=10), _image()),
    _family(
        "vit_interpolated",
        "ViTModel",
        "ViTConfig",
        _VIT,
        _image(40, interpolate_pos_encoding=True),
        note="position table is resampled in the graph",
    ),
    _family(
        "vit_masked_image",
        "ViTForMaskedImageModeling",
        "ViTConfig",
        _VIT | dict(encoder_stride=8),
        _image(),
        note="dense output",
    ),
    _family("deit", "DeiTModel", "DeiTConfig", _VIT, _image()),
    _family(
        "deit_distilled_classifier",
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        _VIT | dict(num_labels=10),
        _image(),
    ),
    _family("dinov2", "Dinov2Model", "Dinov2Config", _DINO, _image()),
    _family("dinov2_eager", "Dinov2Model", "Dinov2Config", _DINO | _EAGER, _image(output_attentions=True)),
    _family("dinov2_hidden_states", "Dinov2Model", "Dinov2Config", _DINO, _image(output_hidden_states=True)),
    _family(
        "dinov2_classifier",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        _DINO | dict(num_labels=10),
        _image(),
        note="CLS joined with the mean of the patches",
    ),
    _family(
        "dinov2_backbone",
        "Dinov2Backbone",
        "Dinov2Config",
        _DINO | dict(out_features=["stage2", "stage4"]),
        _image(),
        note="feature maps after blocks 2 and 4",
    ),
    _family("dinov2_with_registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _DINO, _image()),
    _family(
        "dinov3",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        _DINO | dict(intermediate_size=96, num_register_tokens=4),
        _image(),
    ),
    _family("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", _VIT, _image()),
    _family(
        "clip_vision_projection",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        _VIT | dict(projection_dim=32),
        _image(),
    ),
    _family(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        dict(vision_config=("CLIPVisionConfig", _VIT), text_config=("CLIPTextConfig", _TEXT), projection_dim=32),
        _pair,
    ),
    _family("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", _VIT, _image()),
    _family(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        dict(
            vision_config=("SiglipVisionConfig", _VIT),
            text_config=("SiglipTextConfig", _TEXT | dict(projection_size=48)),
        ),
        _pair,
    ),
    _family(
        "siglip2_vision",
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        _BODY | dict(patch_size=8, num_patches=36),
        _siglip2,
        note="4 of 40 patches are padding",
    ),
    _family("beit", "BeitModel", "BeitConfig", _BEIT | dict(use_relative_position_bias=True), _image()),
    _family("beit_shared", "BeitModel", "BeitConfig", _BEIT | dict(use_shared_relative_position_bias=True), _image()),
    _family(
        "data2vec_vision",
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        _BEIT | dict(use_relative_position_bias=True),
        _image(),
    ),
    _family(
        "yolos",
        "YolosForObjectDetection",
        "YolosConfig",
        _VIT | dict(image_size=[56, 56], num_detection_tokens=6, num_labels=5),
        _image(),
        note="6 suffix tokens",
    ),
    _family(
        "layoutlmv3",
        "LayoutLMv3Model",
        "LayoutLMv3Config",
        _TEXT
        | dict(max_position_embeddings=40, input_size=56, patch_size=8, max_2d_position_embeddings=64, coordinate_size=8)
        | dict(shape_size=8, rel_pos_bins=8, max_rel_pos=16, rel_2d_pos_bins=8, max_rel_2d_pos=16),
        _document,
        note="12 words before the patches, biases by bucketed distances",
    ),
    _family("ijepa", "IJepaModel", "IJepaConfig", _VIT, _image()),
    _family("vit_mae", "ViTMAEModel", "ViTMAEConfig", _VIT, _mae, note="drops 3 of 4 patches by the given noise"),
    _family("vit_msn", "ViTMSNModel", "ViTMSNConfig", _VIT, _image()),
    _family("blip_vision", "BlipVisionModel", "BlipVisionConfig", _VIT, _image()),
    _family("blip2_vision", "Blip2VisionModel", "Blip2VisionConfig", _VIT, _image()),
    _family(
        "internvl_vision",
        "InternVLVisionModel",
        "InternVLVisionConfig",
        _VIT | dict(image_size=[56, 56], patch_size=[8, 8], use_qk_norm=True, layer_scale_init_value=1e-5),
        _image(),
    ),
    _family(
        "pixtral_vision",
        "PixtralVisionModel",
        "PixtralVisionConfig",
        _VIT,
        _image(),
        note="the images of a batch share one sequence",
    ),
    _family("aimv2_vision", "Aimv2VisionModel", "Aimv2VisionConfig", _VIT, _image()),
    _family("mlcd_vision", "MLCDVisionModel", "MLCDVisionConfig", _VIT, _image()),
    _family("owlvit_vision", "OwlViTVisionModel", "OwlViTVisionConfig", _VIT, _image()),
    _family(
        "groupvit_vision",
        "GroupViTVisionModel",
        "GroupViTVisionConfig",
        _VIT | dict(depths=(2, 1, 1), num_group_tokens=(8, 4, 0), num_output_groups=(8, 4, 4)),
        _image(),
        note="groups its own tokens",
    ),
    _family(
        "llama4_vision",
        "Llama4VisionModel",
        "Llama4VisionConfig",
        _VIT
        | dict(image_size=64, intermediate_size=192, vision_output_dim=48, projector_input_dim=48, projector_output_dim=48),
        _image(64),
        note="pixel shuffle merges 2 x 2 patches",
    ),
    _family("idefics3_vision", "Idefics3VisionTransformer", "Idefics3VisionConfig", _VIT, _image()),
    _family(
        "qwen2_vl_vision",
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        _QWEN | dict(embed_dim=64, hidden_size=80),
        _qwen,
        note="groups of 2 x 2 patches are merged",
    ),
    _family(
        "qwen2_5_vl_vision",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        _QWEN | dict(hidden_size=64, intermediate_size=112, out_hidden_size=80, window_size=32, fullatt_block_indexes=[1, 3]),
        _qwen,
        note="window attention, 2 x 2 merger",
    ),
    _family(
        "qwen3_vl_vision",
        "Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        _QWEN
        | dict(
            hidden_size=64,
            intermediate_size=112,
            out_hidden_size=80,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 2],
        ),
        _qwen,
        note="DeepStack features, 2 x 2 merger",
    ),
    _family(
        "pixio",
        "PixioModel",
        "PixioConfig",
        {k: v for k, v in _DINO.items() if k != "layerscale_value"},
        _image(),
        note="8 CLS tokens",
    ),
    # dense heads
    _family(
        "sam_vision",
        "SamVisionModel",
        "SamVisionConfig",
        _VIT | dict(output_channels=24, window_size=4, global_attn_indexes=[1, 3], num_pos_feats=12, mlp_dim=96),
        _image(),
        note="7 x 7 grid padded to windows of 4",
    ),
    _family(
        "vitdet",
        "VitDetModel",
        "VitDetConfig",
        dict(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=56,
            pretrain_image_size=56,
            patch_size=8,
            window_size=4,
            window_block_indices=[0, 2],
            residual_block_indices=[1],
            use_relative_position_embeddings=True,
        ),
        _image(),
        note="7 x 7 grid padded to windows of 4",
    ),
    _family(
        "dpt",
        "DPTForSemanticSegmentation",
        "DPTConfig",
        _VIT
        | dict(
            image_size=64,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[12, 16, 20, 24],
            fusion_hidden_size=16,
            num_labels=5,
        ),
        _image(64),
    ),
    _family(
        "depth_anything",
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        dict(
            backbone_config=(
                "Dinov2Config",
                _DINO | dict(out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False),
            ),
            patch_size=8,
            reassemble_hidden_size=48,
            neck_hidden_sizes=[12, 16, 20, 24],
            fusion_hidden_size=16,
            head_hidden_size=8,
            depth_estimation_type="metric",
            max_depth=10,
        ),
        _image(),
        note="a final sigmoid: the relative form's final ReLU may be zero everywhere",
    ),
    _family(
        "segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        dict(
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 24, 32, 48],
            num_attention_heads=[1, 2, 4, 4],
            decoder_hidden_size=32,
            num_labels=5,
        ),
        _image(64),
    ),
    _family(
        "beit_segmentation",
        "BeitForSemanticSegmentation",
        "BeitConfig",
        _BEIT
        | dict(
            image_size=64,
            use_relative_position_bias=True,
            out_indices=[1, 2, 3, 4],
            num_labels=5,
            auxiliary_channels=16,
            pool_scales=[1, 2],
        ),
        _image(64),
    ),
    _family(
        "eomt",
        "EomtForUniversalSegmentation",
        "EomtConfig",
        dict(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            num_blocks=2,
            num_queries=6,
            num_upscale_blocks=1,
            layerscale_value=1e-5,
            num_labels=5,
        ),
        _image(64),
        note="6 query tokens join before block 3; masked attention",
    ),
    # pyramids
    _family(
        "swin",
        "SwinModel",
        "SwinConfig",
        dict(image_size=56, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=7),
        _image(),
    ),
    _family(
        "pvt",
        "PvtModel",
        "PvtConfig",
        dict(
            image_size=64,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 24, 32, 48],
            num_attention_heads=[1, 2, 4, 4],
            mlp_ratios=[2, 2, 2, 2],
        ),
        _image(64),
    ),
    # video
    _family("videomae", "VideoMAEModel", "VideoMAEConfig", _VIT | dict(image_size=40, num_frames=4), _video(4, 40)),
    _family(
        "vivit",
        "VivitModel",
        "VivitConfig",
        _BODY | dict(image_size=40, num_frames=4, tubelet_size=[2, 8, 8]),
        _video(4, 40),
    ),
    _family(
        "timesformer",
        "TimesformerModel",
        "TimesformerConfig",
        _VIT | dict(image_size=40, num_frames=3),
        _video(3, 40),
        note="divided space-time attention",
    ),
    _family(
        "vjepa2",
        "VJEPA2Model",
        "VJEPA2Config",
        dict(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            patch_size=8,
            crop_size=40,
            frames_per_clip=4,
            tubelet_size=2,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        ),
        _video(4, 40, "pixel_values_videos", skip_predictor=True),
    ),
    # decoders
    _family("llama", "LlamaForCausalLM", "LlamaConfig", _DECODER, _embeds(use_cache=False)),
    _family("llama_eager", "LlamaForCausalLM", "LlamaConfig", _DECODER | _EAGER, _embeds(use_cache=False)),
    _family("llama_padded", "LlamaForCausalLM", "LlamaConfig", _DECODER, _padded_embeds, note="4 padding positions"),
    Family("hf/llama_cache", _llama_cache, "transformers", 4, "the key-value cache is an output"),
    _family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _DECODER, _embeds(use_cache=False)),
    _family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _DECODER | dict(head_dim=16), _embeds(use_cache=False)),
    _family(
        "mistral",
        "MistralForCausalLM",
        "MistralConfig",
        _DECODER | dict(sliding_window=16),
        _embeds(use_cache=False),
        note="sliding window of 16",
    ),
    _family("gemma", "GemmaForCausalLM", "GemmaConfig", _DECODER | dict(head_dim=16), _embeds(use_cache=False)),
    _family(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _DECODER | dict(head_dim=16, sliding_window=16),
        _embeds(use_cache=False),
        note="sliding window in every other block, soft-capped logits",
    ),
    _family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _DECODER | dict(head_dim=16, sliding_window=16),
        _embeds(use_cache=False),
        note="sliding window in most blocks, norms before and after",
    ),
    _family("phi", "PhiForCausalLM", "PhiConfig", _DECODER, _embeds(use_cache=False), note="parallel blocks"),
    _family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_embd=48, n_layer=4, n_head=4, n_positions=64, vocab_size=64, bos_token_id=0, eos_token_id=63),
        _embeds(use_cache=False),
        note="learned positions",
    ),
    # vision and language in one model
    _family(
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        dict(vision_config=("CLIPVisionConfig", _VIT), text_config=_LLAMA, image_token_index=60, image_seq_length=49),
        _prompt(49),
        depth=8,
        note="49 image tokens between 5 and 7 text tokens",
    ),
    _family(
        "internvl",
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        dict(
            vision_config=("InternVLVisionConfig", _VIT | dict(image_size=[64, 64], patch_size=[8, 8])),
            text_config=("Qwen2Config", _DECODER),
            image_token_id=60,
            image_seq_length=16,
        ),
        _prompt(16, 64),
        depth=8,
        note="pixel shuffle merges 2 x 2 patches: 16 image tokens",
    ),
    _family(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        dict(
            vision_config=("SiglipVisionConfig", _VIT | dict(vision_use_head=False)),
            text_config=("GemmaConfig", _DECODER | dict(head_dim=16)),
            image_token_index=60,
            projection_dim=48,
        ),
        _prompt(49, type_ids=True),
        depth=8,
        note="the prompt attends both ways",
    ),
    _family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        dict(
            vision_config=("SiglipVisionConfig", _VIT | dict(image_size=64, vision_use_head=False)),
            text_config=("Gemma3TextConfig", _DECODER | dict(head_dim=16, sliding_window=16)),
            mm_tokens_per_image=16,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        ),
        _gemma3_prompt,
        depth=8,
        note="patches are pooled 2 x 2; image tokens attend both ways",
    ),
    _family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        dict(
            vision_config=("Qwen2VLVisionConfig", _QWEN | dict(embed_dim=64, hidden_size=48)),
            text_config=("Qwen2VLTextConfig", _DECODER | dict(rope_parameters=_MROPE)),
            **_QWEN_IDS,
        ),
        _qwen_prompt,
        depth=8,
        note="2 x 2 merger, 3-axis rope",
    ),
    _family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        dict(
            vision_config=(
                "Qwen2_5_VLVisionConfig",
                _QWEN
                | dict(
                    hidden_size=64,
                    intermediate_size=112,
                    out_hidden_size=48,
                    window_size=32,
                    fullatt_block_indexes=[1, 3],
                ),
            ),
            text_config=("Qwen2_5_VLTextConfig", _DECODER | dict(rope_parameters=_MROPE)),
            **_QWEN_IDS,
        ),
        _qwen_prompt,
        depth=8,
        note="window attention, 2 x 2 merger, 3-axis rope",
    ),
    _family(
        "qwen2_5_vl_two_images",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        dict(
            vision_config=(
                "Qwen2_5_VLVisionConfig",
                _QWEN
                | dict(
                    hidden_size=64,
                    intermediate_size=112,
                    out_hidden_size=48,
                    window_size=32,
                    fullatt_block_indexes=[1, 3],
                ),
            ),
            text_config=("Qwen2_5_VLTextConfig", _DECODER | dict(rope_parameters=_MROPE)),
            **_QWEN_IDS,
        ),
        _qwen_two_images,
        depth=8,
        note="images of 12 and 6 tokens",
    ),
    _family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        dict(
            vision_config=(
                "Qwen3VLVisionConfig",
                _QWEN
                | dict(
                    hidden_size=64,
                    intermediate_size=112,
                    out_hidden_size=48,
                    num_position_embeddings=64,
                    deepstack_visual_indexes=[0, 2],
                ),
            ),
            text_config=("Qwen3VLTextConfig", _DECODER | dict(head_dim=12, rope_parameters=_MROPE)),
            **_QWEN_IDS,
        ),
        _qwen_prompt,
        depth=8,
        note="DeepStack features, 2 x 2 merger, 3-axis rope",
    ),
    _family(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        dict(
            vision_config=("SmolVLMVisionConfig", _VIT | dict(image_size=64)),
            text_config=_LLAMA,
            image_token_id=60,
            scale_factor=2,
        ),
        _smolvlm_prompt,
        depth=8,
        note="pixel shuffle: 16 image tokens",
    ),
    _family(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        dict(
            vision_config=("Idefics3VisionConfig", _VIT | dict(image_size=64)),
            text_config=_LLAMA,
            image_token_id=60,
            scale_factor=2,
        ),
        _smolvlm_prompt,
        depth=8,
        note="pixel shuffle: 16 image tokens",
    ),
    _family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        dict(
            vision_config=("SiglipVisionConfig", _VIT | dict(vision_use_head=False)),
            text_config=("Qwen2Config", _DECODER),
            image_token_index=60,
            video_token_index=59,
            image_grid_pinpoints=[[56, 56]],
        ),
        _onevision_prompt,
        depth=8,
        note="base view, tile and newline tokens",
    ),
    _family(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        dict(
            vision_config=("CLIPVisionConfig", _VIT),
            text_config=_LLAMA,
            image_token_index=60,
            image_seq_length=49,
            image_grid_pinpoints=[[56, 56], [56, 112]],
        ),
        _anyres_prompt,
        depth=8,
        note="base view, two tiles and newline tokens",
    ),
    _family(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        dict(
            vision_config=("PixtralVisionConfig", _VIT | dict(image_size=64)),
            text_config=("MistralConfig", _DECODER | dict(head_dim=12)),
            image_token_index=60,
        ),
        _mistral3_prompt,
        depth=8,
        note="Pixtral's tower, 2 x 2 merger",
    ),
    _family(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        "Idefics2Config",
        dict(
            vision_config=("Idefics2VisionConfig", _VIT),
            perceiver_config=(
                "Idefics2PerceiverConfig",
                dict(
                    hidden_size=48,
                    resampler_n_latents=8,
                    resampler_depth=2,
                    resampler_n_heads=4,
                    resampler_head_dim=12,
                    num_key_value_heads=2,
                ),
            ),
            text_config=("MistralConfig", _DECODER | dict(head_dim=12)),
            image_token_id=60,
        ),
        _idefics2_prompt,
        depth=8,
        note="a resampler makes 8 tokens of an image",
    ),
    _family(
        "glm4v",
        "Glm4vForConditionalGeneration",
        "Glm4vConfig",
        dict(
            vision_config=(
                "Glm4vVisionConfig",
                dict(
                    depth=4,
                    hidden_size=48,
                    num_heads=4,
                    image_size=64,
                    patch_size=8,
                    out_hidden_size=48,
                    intermediate_size=96,
                ),
            ),
            text_config=("Glm4vTextConfig", _DECODER | dict(rope_parameters=_MROPE)),
            image_token_id=60,
            video_token_id=59,
            image_start_token_id=61,
            image_end_token_id=62,
        ),
        _qwen_prompt,
        depth=8,
        note="position table is resampled in the graph, 2 x 2 merger",
    ),
    # other uses of the same parts
    _family(
        "clipseg",
        "CLIPSegForImageSegmentation",
        "CLIPSegConfig",
        dict(
            vision_config=("CLIPSegVisionConfig", _VIT),
            text_config=("CLIPSegTextConfig", _TEXT),
            projection_dim=32,
            extract_layers=[0, 1, 2],
            reduce_dim=24,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=96,
        ),
        _pair,
        note="dense output steered by text",
    ),
    _family(
        "ast",
        "ASTModel",
        "ASTConfig",
        _BODY | dict(patch_size=8, frequency_stride=8, time_stride=8, max_length=64, num_mel_bins=40),
        lambda batch: dict(input_values=noise(batch, 64, 40)),
        note="audio spectrogram; 2 CLS tokens",
    ),
    _family(
        "vitpose_backbone",
        "VitPoseBackbone",
        "VitPoseBackboneConfig",
        dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=[64, 40], patch_size=[8, 8]),
        lambda batch: dict(pixel_values=noise(batch, 3, 64, 40)),
        note="grid 8 x 5",
    ),
    _family(
        "hiera",
        "HieraModel",
        "HieraConfig",
        dict(image_size=[64, 64], embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
        _image(64),
    ),
)
