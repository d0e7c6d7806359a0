"""Small transformers models that take images and text."""

from __future__ import annotations

from .family import Family
from .hf_base import DECODER, QWEN, VIT, row
from .hf_prompts import (
    anyres_prompt,
    gemma3_prompt,
    idefics2_prompt,
    lfm2_prompt,
    mistral3_prompt,
    mllama_prompt,
    onevision_prompt,
    pi0_prompt,
    prompt,
    qwen_prompt,
    qwen_two_images,
    smolvlm_prompt,
)

_LLAMA = ("LlamaConfig", DECODER)
_PALIGEMMA = dict(
    vision_config=("SiglipVisionConfig", VIT | dict(vision_use_head=False)),
    text_config=("GemmaConfig", DECODER | dict(head_dim=16)),
    image_token_index=60,
    projection_dim=48,
)
_MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])
_QWEN3_VISION = QWEN | dict(
    hidden_size=64, intermediate_size=112, out_hidden_size=48, num_position_embeddings=64, deepstack_visual_indexes=[0, 2]
)
_QWEN_IDS = dict(image_token_id=60, video_token_id=59, vision_start_token_id=61, vision_end_token_id=62)


LANGUAGE: tuple[Family, ...] = (
    # vision and language in one model
    row(
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        dict(vision_config=("CLIPVisionConfig", VIT), text_config=_LLAMA, image_token_index=60, image_seq_length=49),
        prompt(49),
        depth=8,
        note="49 image tokens between 5 and 7 text tokens",
    ),
    row(
        "internvl",
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        dict(
            vision_config=("InternVLVisionConfig", VIT | dict(image_size=[64, 64], patch_size=[8, 8])),
            text_config=("Qwen2Config", DECODER),
            image_token_id=60,
            image_seq_length=16,
        ),
        prompt(16, 64),
        depth=8,
        note="pixel shuffle merges 2 x 2 patches: 16 image tokens",
    ),
    row(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        "AyaVisionConfig",
        dict(
            vision_config=("SiglipVisionConfig", VIT | dict(image_size=64, vision_use_head=False)),
            text_config=("Cohere2Config", DECODER | dict(sliding_window=16)),
            image_token_index=60,
            downsample_factor=2,
        ),
        prompt(16, 64),
        depth=8,
        note="pixel shuffle on the grid, gated projector: 16 image tokens",
    ),
    row(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        _PALIGEMMA,
        prompt(49, type_ids=True),
        depth=8,
        note="the prompt attends both ways",
    ),
    row(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        dict(
            vision_config=("SiglipVisionConfig", VIT | dict(image_size=64, vision_use_head=False)),
            text_config=("Gemma3TextConfig", DECODER | dict(head_dim=16, sliding_window=16)),
            mm_tokens_per_image=16,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        ),
        gemma3_prompt,
        depth=8,
        note="patches are pooled 2 x 2; image tokens attend both ways",
    ),
    row(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        dict(
            vision_config=("Qwen2VLVisionConfig", QWEN | dict(embed_dim=64, hidden_size=48)),
            text_config=("Qwen2VLTextConfig", DECODER | dict(rope_parameters=_MROPE)),
            **_QWEN_IDS,
        ),
        qwen_prompt,
        depth=8,
        note="2 x 2 merger, 3-axis rope",
    ),
    row(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        dict(
            vision_config=(
                "Qwen2_5_VLVisionConfig",
                QWEN
                | dict(
                    hidden_size=64,
                    intermediate_size=112,
                    out_hidden_size=48,
                    window_size=32,
                    fullatt_block_indexes=[1, 3],
                ),
            ),
            text_config=("Qwen2_5_VLTextConfig", DECODER | dict(rope_parameters=_MROPE)),
            **_QWEN_IDS,
        ),
        qwen_prompt,
        depth=8,
        note="window attention, 2 x 2 merger, 3-axis rope",
    ),
    row(
        "qwen2_5_vl_two_images",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        dict(
            vision_config=(
                "Qwen2_5_VLVisionConfig",
                QWEN
                | dict(
                    hidden_size=64,
                    intermediate_size=112,
                    out_hidden_size=48,
                    window_size=32,
                    fullatt_block_indexes=[1, 3],
                ),
            ),
            text_config=("Qwen2_5_VLTextConfig", DECODER | dict(rope_parameters=_MROPE)),
            **_QWEN_IDS,
        ),
        qwen_two_images,
        depth=8,
        note="images of 12 and 6 tokens",
    ),
    row(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        dict(
            vision_config=("Qwen3VLVisionConfig", _QWEN3_VISION),
            text_config=("Qwen3VLTextConfig", DECODER | dict(head_dim=12, rope_parameters=_MROPE)),
            **_QWEN_IDS,
        ),
        qwen_prompt,
        depth=8,
        note="DeepStack features, 2 x 2 merger, 3-axis rope",
    ),
    row(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        dict(
            vision_config=("Qwen3VLMoeVisionConfig", _QWEN3_VISION),
            text_config=(
                "Qwen3VLMoeTextConfig",
                DECODER
                | dict(head_dim=12, rope_parameters=_MROPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
            ),
            **_QWEN_IDS,
        ),
        qwen_prompt,
        depth=8,
        note="two of four experts a token, DeepStack features",
    ),
    row(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        dict(
            vision_config=("SmolVLMVisionConfig", VIT | dict(image_size=64)),
            text_config=_LLAMA,
            image_token_id=60,
            scale_factor=2,
        ),
        smolvlm_prompt,
        depth=8,
        note="pixel shuffle: 16 image tokens",
    ),
    row(
        "lfm2_vl",
        "Lfm2VlForConditionalGeneration",
        "Lfm2VlConfig",
        dict(
            vision_config=("Siglip2VisionConfig", VIT | dict(num_hidden_layers=3, num_patches=64, vision_use_head=False)),
            text_config=(
                "Lfm2Config",
                DECODER | dict(layer_types=["full_attention", "conv"] * 2, block_auto_adjust_ff_dim=False),
            ),
            image_token_id=60,
            downsample_factor=2,
            projector_hidden_size=64,
        ),
        lfm2_prompt,
        depth=5,
        note="short convolutions between the layers that attend",
    ),
    row(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        dict(
            vision_config=("Idefics3VisionConfig", VIT | dict(image_size=64)),
            text_config=_LLAMA,
            image_token_id=60,
            scale_factor=2,
        ),
        smolvlm_prompt,
        depth=8,
        note="pixel shuffle: 16 image tokens",
    ),
    row(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        dict(
            vision_config=("SiglipVisionConfig", VIT | dict(vision_use_head=False)),
            text_config=("Qwen2Config", DECODER),
            image_token_index=60,
            video_token_index=59,
            image_grid_pinpoints=[[56, 56]],
        ),
        onevision_prompt,
        depth=8,
        note="base view, tile and newline tokens",
    ),
    row(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        dict(
            vision_config=("CLIPVisionConfig", VIT),
            text_config=_LLAMA,
            image_token_index=60,
            image_seq_length=49,
            image_grid_pinpoints=[[56, 56], [56, 112]],
        ),
        anyres_prompt,
        depth=8,
        note="base view, two tiles and newline tokens",
    ),
    row(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        dict(
            vision_config=("PixtralVisionConfig", VIT | dict(image_size=64)),
            text_config=("MistralConfig", DECODER | dict(head_dim=12)),
            image_token_index=60,
        ),
        mistral3_prompt,
        depth=8,
        note="Pixtral's tower, 2 x 2 merger",
    ),
    row(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        "Idefics2Config",
        dict(
            vision_config=("Idefics2VisionConfig", VIT),
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
            text_config=("MistralConfig", DECODER | dict(head_dim=12)),
            image_token_id=60,
        ),
        idefics2_prompt,
        depth=8,
        note="a resampler makes 8 tokens of an image",
    ),
    row(
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
            text_config=("Glm4vTextConfig", DECODER | dict(rope_parameters=_MROPE)),
            image_token_id=60,
            video_token_id=59,
            image_start_token_id=61,
            image_end_token_id=62,
        ),
        qwen_prompt,
        depth=8,
        note="position table is resampled in the graph, 2 x 2 merger",
    ),
    row(
        "mllama",
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        dict(
            vision_config=(
                "MllamaVisionConfig",
                dict(
                    hidden_size=48,
                    intermediate_size=96,
                    num_hidden_layers=3,
                    num_global_layers=2,
                    attention_heads=4,
                    vision_output_dim=3 * 48,
                    image_size=56,
                    patch_size=14,
                    max_num_tiles=4,
                    intermediate_layers_indices=[1, 2],
                    supported_aspect_ratios=[[1, 1], [1, 2], [2, 1], [2, 2]],
                ),
            ),
            text_config=(
                "MllamaTextConfig",
                DECODER | dict(cross_attention_layers=[1, 3], rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
            ),
            image_token_index=60,
        ),
        mllama_prompt,
        depth=5,
        note="Llama 3.2 Vision: four tiles with padding tokens, which are cut off before the decoder's cross-attention",
    ),
    row(
        "pi0",
        "PI0ForConditionalGeneration",
        "PI0Config",
        dict(
            vlm_config=("PaliGemmaConfig", _PALIGEMMA),
            dit_config=("GemmaConfig", DECODER | dict(hidden_size=32, intermediate_size=64, head_dim=16)),
            chunk_size=5,
            max_state_dim=6,
            max_action_dim=6,
        ),
        pi0_prompt,
        depth=8,
        note="actions of a robot, by a second decoder that looks at the first one's keys",
    ),
)
