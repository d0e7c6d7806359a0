"""Small decoders of transformers."""

from __future__ import annotations

import torch
from torch import nn

from .family import Family, noise
from .hf_base import DECODER, EAGER, build, embeds, row


def _padded_embeds(batch: int) -> dict:
    """Embeddings with four padding positions on the left."""
    mask = torch.ones(batch, 40, dtype=torch.long)
    mask[:, :4] = 0
    return dict(inputs_embeds=noise(batch, 40, 48), attention_mask=mask, use_cache=False)


def _llama_cache(batch: int) -> tuple[nn.Module, tuple, dict]:
    """Llama that returns its cache, which torch.export takes only once transformers has registered it."""
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    return build("LlamaForCausalLM", "LlamaConfig", DECODER, embeds(use_cache=True), batch)


DECODERS: tuple[Family, ...] = (
    # decoders
    row("llama", "LlamaForCausalLM", "LlamaConfig", DECODER, embeds(use_cache=False)),
    row("llama_eager", "LlamaForCausalLM", "LlamaConfig", DECODER | EAGER, embeds(use_cache=False)),
    row("llama_padded", "LlamaForCausalLM", "LlamaConfig", DECODER, _padded_embeds, note="4 padding positions"),
    Family("hf/llama_cache", _llama_cache, "transformers", 4, "the key-value cache is an output"),
    row("qwen2", "Qwen2ForCausalLM", "Qwen2Config", DECODER, embeds(use_cache=False)),
    row("qwen3", "Qwen3ForCausalLM", "Qwen3Config", DECODER | dict(head_dim=16), embeds(use_cache=False)),
    row(
        "mistral",
        "MistralForCausalLM",
        "MistralConfig",
        DECODER | dict(sliding_window=16),
        embeds(use_cache=False),
        note="sliding window of 16",
    ),
    row("gemma", "GemmaForCausalLM", "GemmaConfig", DECODER | dict(head_dim=16), embeds(use_cache=False)),
    row(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        DECODER | dict(head_dim=16, sliding_window=16),
        embeds(use_cache=False),
        note="sliding window in every other block, soft-capped logits",
    ),
    row(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        DECODER | dict(head_dim=16, sliding_window=16),
        embeds(use_cache=False),
        note="sliding window in most blocks, norms before and after",
    ),
    row("phi", "PhiForCausalLM", "PhiConfig", DECODER, embeds(use_cache=False), note="parallel blocks"),
    row(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_embd=48, n_layer=4, n_head=4, n_positions=64, vocab_size=64, bos_token_id=0, eos_token_id=63),
        embeds(use_cache=False),
        note="learned positions",
    ),
    row(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        DECODER | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        embeds(use_cache=False),
        note="two of four experts a token",
    ),
    row(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        DECODER | dict(head_dim=12, num_local_experts=4),
        embeds(use_cache=False),
        note="two of four experts a token",
    ),
    row(
        "gpt_oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        DECODER | EAGER | dict(head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
        embeds(use_cache=False),
        note="attention sinks, two of four experts a token, sliding window in every other block",
    ),
)
