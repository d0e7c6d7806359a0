"""Generation by hand, in eager mode: the model's own layers over lists of keys and values that grow, one list a layer.

It knows nothing of the package: what is dropped is left out of the lists of the layers that follow, or hidden there.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import nn


def cache_of(module):
    """As what it takes a cache, which transformers 5.24 named anew."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


class Lists:
    """keys[i], values[i]: what layer i has stored so far; positions[i]: where those tokens stand in the text."""

    def __init__(self, layers):
        self.keys, self.values = ([[] for _ in range(layers)] for _ in range(2))
        self.positions = [[] for _ in range(layers)]

    def update(self, key, value, layer, *args, **kwargs):
        self.keys[layer].append(key)
        self.values[layer].append(value)
        return torch.cat(self.keys[layer], 2), torch.cat(self.values[layer], 2)


class ByHand:
    """A decoder of one sample. dropped: {layer: original positions that are gone from this layer on}. hide: they stay
    everywhere, and nobody sees them there. padding: positions that nobody ever sees."""

    def __init__(self, model, dropped, hide=False, padding=()):
        self.model, self.base, self.hide, self.padding = model, model.model, hide, set(padding)
        self.lists = Lists(len(self.base.layers))
        self.dropped = dropped

    def gone(self, layer):
        return {p for i, positions in self.dropped.items() if i <= layer for p in positions}

    def __call__(self, x, positions):
        """The logits of the last of the tokens x at those positions, which go into the lists."""
        for i, layer in enumerate(self.base.layers):
            if not self.hide:
                stay = [j for j, p in enumerate(positions) if p not in self.gone(i)]
                x, positions = x[:, stay], [positions[j] for j in stay]
            there = self.lists.positions[i]
            there += positions
            where = torch.tensor([positions])
            x = layer(
                x,
                attention_mask=self.mask(positions, there, i),
                position_ids=where,
                position_embeddings=self.base.rotary_emb(x, where),
                use_cache=True,
                **{cache_of(layer): self.lists},
            )
            x = x[0] if isinstance(x, tuple) else x
        norm = self.base.norm if hasattr(self.base, "norm") else self.base.final_layernorm
        return self.model.lm_head(norm(x[:, -1]))

    def mask(self, queries, keys, layer):
        window = getattr(self.base.config, "sliding_window", None) or 10**6
        hidden = self.padding | (self.gone(layer) if self.hide else set())
        seen = [[k == q or (0 <= q - k < window and k not in hidden) for k in keys] for q in queries]
        return torch.tensor(seen)[None, None]

    @torch.no_grad()
    def generate(self, embeds, count, tokens=None):
        """(ids, logits) of `count` tokens, the likeliest ones or those given."""
        length = embeds.shape[1]
        logits = [self(embeds, list(range(length)))]
        ids = [int(logits[0].argmax()) if tokens is None else int(tokens[0])]
        for t in range(count - 1):
            logits.append(self(self.base.embed_tokens(torch.tensor([[ids[-1]]])), [length + t]))
            ids.append(int(logits[-1].argmax()) if tokens is None else int(tokens[t + 1]))
        return ids, logits


@contextmanager
def hidden(gone, layers):
    """Keys at these positions are seen by nobody in these layers of a model that calls fused attention, or a softmax over
    scores, once a layer."""
    functional = nn.functional
    fused, softmax, calls = functional.scaled_dot_product_attention, functional.softmax, []

    def there(count):
        calls.append(count)
        return torch.tensor([len(calls) - 1 not in layers or p not in gone for p in range(count)])

    def attend(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        if attn_mask is None:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
            attn_mask = attn_mask.tril() if is_causal else attn_mask
        seen = there(key.shape[2])
        attn_mask = attn_mask & seen if attn_mask.dtype is torch.bool else attn_mask.masked_fill(~seen, -1e9)
        return fused(query, key, value, attn_mask=attn_mask, **kwargs)

    def weigh(scores, *args, **kwargs):
        return softmax(scores.masked_fill(~there(scores.shape[-1]), -1e9) if scores.ndim > 2 else scores, *args, **kwargs)

    functional.scaled_dot_product_attention, functional.softmax = attend, weigh
    try:
        yield calls
    finally:
        functional.scaled_dot_product_attention, functional.softmax = fused, softmax


def dropped(kept, start, stop):
    """The positions of a span that are not among the kept ones, which are counted from its start."""
    return set(range(start, stop)) - {start + int(i) for i in kept}
