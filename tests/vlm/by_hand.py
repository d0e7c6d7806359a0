"""A vision-language model run by hand, in eager mode: features placed among embeddings, its own layers over lists that grow.

It knows nothing of the package. Every token has an index in the full prompt; positions, masks and what is dropped go by it.
"""

import torch

from tests.llm.by_hand import Lists, cache_of


class ByHand:
    """One sample. dropped: {layer: indices that are gone from there on}; hide: they stay, and nobody sees them there.

    positions: (axes, L), of the prompt. after: of the first generated token. together: groups of indices that see each other
    whatever their order. padding: indices that nobody ever sees.
    """

    def __init__(self, model, positions, after, dropped, hide=False, together=(), deepstack=(), padding=()):
        self.model, self.positions, self.after = model, positions, after
        self.dropped, self.hide, self.together, self.padding = dropped, hide, [set(one) for one in together], set(padding)
        self.deepstack = deepstack
        self.base = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
        self.lists = Lists(len(self.base.layers))
        self.leaving, self.there = {}, {}

    def gone(self, layer):
        return {p for i, some in self.dropped.items() if i <= layer for p in some}

    def rotary(self, x, indices, layer):
        length = self.positions.shape[1]
        first = self.positions[:, 0]
        later = [self.positions[:, i] if i < length else first * 0 + self.after + i - length for i in indices]
        where = torch.stack(later, 1)
        several = len(where) > 1
        types = getattr(self.base.config, "layer_types", None)
        by_type = (types[layer],) if type(self.base).__name__.startswith("Gemma3") else ()
        return self.base.rotary_emb(x, where[:, None] if several else where, *by_type)

    def __call__(self, x, indices):
        """The logits of the last of the tokens x with those indices, which go into the lists."""
        for i, layer in enumerate(self.base.layers):
            if not self.hide:
                stay = [j for j, p in enumerate(indices) if p not in self.gone(i)]
                x, indices = x[:, stay], [indices[j] for j in stay]
            self.there.setdefault(i, indices)
            stored = self.lists.positions[i]
            stored += indices
            x = layer(
                x,
                attention_mask=self.mask(indices, stored, i),
                position_ids=None,
                position_embeddings=self.rotary(x, indices, i),
                use_cache=True,
                **{cache_of(layer): self.lists},
            )
            x = x[0] if isinstance(x, tuple) else x
            for at, features in self.deepstack[i : i + 1]:
                rows = {p: j for j, p in enumerate(at)}
                for j, p in enumerate(indices):
                    if p in rows:
                        x[:, j] += features[rows[p]]
            self.leaving.setdefault(i, x)
        return self.model.lm_head(self.base.norm(x[:, -1]))

    def mask(self, queries, keys, layer):
        types = getattr(self.base.config, "layer_types", None) or ["full_attention"] * len(self.base.layers)
        window = self.base.config.sliding_window if types[layer] == "sliding_attention" else 10**6
        hidden = self.padding | (self.gone(layer) if self.hide else set())

        def sees(q, k):
            near = 0 <= q - k < window or any(q in one and k in one for one in self.together)
            return k == q or (near and k not in hidden)

        return torch.tensor([[sees(q, k) for k in keys] for q in queries])[None, None]

    @torch.no_grad()
    def generate(self, embeds, count, tokens=None):
        """(ids, logits) of `count` tokens, the likeliest ones or those given."""
        length = embeds.shape[1]
        logits = [self(embeds, list(range(length)))]
        ids = [int(logits[0].argmax()) if tokens is None else int(tokens[0])]
        for t in range(count - 1):
            one = self.model.get_input_embeddings()(torch.tensor([[ids[-1]]]))
            logits.append(self(one, [length + t]))
            ids.append(int(logits[-1].argmax()) if tokens is None else int(tokens[t + 1]))
        return ids, logits


@torch.no_grad()
def by_hand(name, model, inputs, row, positions, after, features=None, deepstack=(), at=None, **rest):
    """(ByHand, embeddings of the prompt) of one sample. features: what a reduced vision part gave, at the indices `at`."""
    ids = inputs["input_ids"][row : row + 1]
    places = (ids[0] == 60).nonzero()[:, 0].tolist()
    if features is None:
        features, deepstack, at = *own_features(model, inputs, row), places
    embeds = model.get_input_embeddings()(ids)
    embeds[0, at] = features
    together = {"paligemma": [range(ids.shape[1])], "gemma3": [places]}.get(name.removesuffix("_left"), [])
    deep = [(at, one) for one in deepstack]
    return ByHand(model, positions, after, together=together, deepstack=deep, **rest), embeds


def own_features(model, inputs, row):
    """The model's own features of one sample: (n, D), and those of DeepStack."""
    named = {k: inputs[k] for k in ("image_grid_thw", "image_sizes") if k in inputs}
    out = model.get_image_features(inputs["pixel_values"], **named)
    batch = len(inputs["input_ids"])

    def mine(images):
        images = list(images)
        each = len(images) // batch
        return torch.cat(images[row * each : (row + 1) * each])

    return mine(out.pooler_output), [mine(one) for one in getattr(out, "deepstack_features", None) or []]
