"""Whole vision-language models among the families, and where their prompts hold image tokens."""

# (start, stop) of each run in the first sample
PROMPTS = {
    "hf/aya_vision": [(5, 21)],
    "hf/gemma3": [(5, 21)],
    "hf/gemma4": [(5, 17)],
    "hf/glm4v": [(5, 17)],
    "hf/hunyuan_vl": [(5, 23)],
    "hf/idefics2": [(5, 13)],
    "hf/idefics3": [(5, 21)],
    "hf/internvl": [(5, 21)],
    "hf/kimi_k25": [(5, 17)],
    "hf/llava": [(5, 54)],
    "hf/llava_next": [(5, 159)],
    "hf/llava_onevision": [(5, 110)],
    "hf/mistral3": [(5, 21)],
    "hf/paligemma": [(5, 54)],
    "hf/qwen2_vl": [(5, 17)],
    "hf/qwen2_5_vl": [(5, 17)],
    "hf/qwen2_5_vl_two_images": [(5, 17), (29, 35)],
    "hf/qwen3_vl": [(5, 17)],
    "hf/qwen3_vl_moe": [(5, 17)],
    "hf/smolvlm": [(5, 21)],
    "hf/video_llama_3": [(5, 17)],
}
