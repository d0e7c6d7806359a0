"""Models of which engines are built."""

import functools

import torch

import tokcompile
from tests.command_line import Vit
from tests.conftest import TOLD

FUSED = ("dart", "topk", "fastervlm", "fopru", "evit", "tome", "pitome", "divprune")


@functools.cache
def vit(method: str, batch: int = 1) -> tokcompile.OptimizedModel:
    """Two blocks over a class token and 49 patches."""
    torch.manual_seed(0)
    model = Vit(depth=2).eval()
    options = TOLD.get(method, {})
    return tokcompile.optimize(model, (torch.randn(batch, 3, 28, 28),), method=method, budget=0.5, **options)


@functools.cache
def language(method: str) -> tokcompile.OptimizedModel:
    """A small Llama: two images of 25 and 29 tokens with text around them, reduced at the entrance of layer 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    inputs = {"inputs_embeds": torch.randn(1, 80, 32), "use_cache": False}
    options = {"budget": tokcompile.Tokens(24), "spans": [(5, 30), (41, 70)], "where": [1]}
    return tokcompile.optimize(LlamaForCausalLM(config).eval(), kwargs=inputs, method=method, **options)
