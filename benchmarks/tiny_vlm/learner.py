"""What is trained: the language model with its updates, and the projector, on 256 patches or on 64 pooled ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny_vlm import model as parts
from benchmarks.tiny_vlm.data import GRID, WORDS
from benchmarks.tiny_vlm.packing import IGNORED, Pack

COARSE = GRID // 2


def pooled(features: Tensor) -> Tensor:
    """(B, 256, D) -> (B, 64, D), means of 2 x 2."""
    b, _, d = features.shape
    return features.view(b, COARSE, 2, COARSE, 2, d).mean((2, 4)).reshape(b, COARSE * COARSE, d)


def cells_of(count: int) -> Tensor:
    """The cell of the fine grid in which each of `count` tokens has its position; a pooled one that of its first patch."""
    if count == GRID * GRID:
        return torch.arange(count)
    rows = torch.arange(COARSE)
    return (rows[:, None] * 2 * GRID + rows[None] * 2).flatten()


def visual(projector: parts.Projector, features: Tensor) -> Tensor:
    """The embeddings of 256 or of 64 pooled tokens."""
    cells = cells_of(features.shape[1])
    if features.shape[1] == GRID * GRID:
        return projector(features, cells)
    step = cells + GRID + 1  # the middle of the four places
    where = [projector.rows[c // GRID] + projector.columns[c % GRID] for c in (cells, step)]
    return projector.shown(features) + 0.5 * (where[0] + where[1])


def plain_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
    """Three plain matrix products, faster here than the fused form with a mask; q: (B, H, N, D), k and v have fewer heads."""
    b, h, n, d = q.shape
    groups = h // k.shape[1]
    q = (q * scaling).reshape(b, k.shape[1], groups * n, d)
    scores = (q @ k.transpose(-1, -2)).view(b, h, n, -1) + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype).view(b, k.shape[1], groups * n, -1)
    return (weights @ v).view(b, h, n, d).transpose(1, 2), None


class Learner:
    """The language model with its updates, and the projector."""

    def __init__(self, folder: Path, seed: int):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        torch.manual_seed(seed)
        ALL_ATTENTION_FUNCTIONS.register("tiny_plain", plain_attention)
        self.lm = parts.language_model(folder, torch.bfloat16)
        self.lm.config._attn_implementation = "tiny_plain"
        self.updates = parts.add_low_rank(self.lm)
        self.projector = parts.Projector()
        self.tokenizer = parts.tokenizer(folder)
        self._start_from_words()

    def word(self, text: str) -> Tensor:
        """(D,): the mean input embedding of a word."""
        return self.lm.model.embed_tokens.weight[self.tokenizer(f" {text}", add_special_tokens=False).input_ids].float().mean(0)

    def _start_from_words(self) -> None:
        """Places start as the words for them, the size of what is shown as that of a word."""
        with torch.no_grad():
            names = torch.stack([self.word(w) for w in WORDS])
            self.projector.gain *= names.pow(2).mean().sqrt()
            half = GRID // 2
            for table, words in ((self.projector.rows, ("top", "bottom")), (self.projector.columns, ("left", "right"))):
                table[:half], table[half:] = 0.6 * self.word(words[0]), 0.6 * self.word(words[1])

    def parameters(self) -> list[nn.Parameter]:
        return [*self.projector.parameters(), *(p for u in self.updates.values() for p in u.parameters())]

    def hidden(self, features: Tensor, text: Pack) -> Tensor:
        """features: (B, N, 384) -> the last hidden states of the text, (B, T, D)."""
        embed = self.lm.model.embed_tokens
        shown = visual(self.projector, features.float()).bfloat16()
        b, n, _ = shown.shape
        first = embed(torch.full((b, 1), parts.START))
        where = (cells_of(n) + parts.PREFIX)[None].expand(b, -1)
        if n < GRID * GRID:
            where = where + COARSE  # near the middle of the four positions
        positions = torch.cat([torch.zeros(b, 1, dtype=torch.long), where, text.positions], 1)
        mask = torch.zeros(text.seen.shape, dtype=torch.bfloat16).masked_fill(~text.seen, -1e4)
        out = self.lm.model(
            inputs_embeds=torch.cat([first, shown, embed(text.ids)], 1),
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
        )
        return out.last_hidden_state[:, parts.PREFIX + n :]

    def loss(self, features: Tensor, text: Pack, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, weighted by weights: (B, T); and of each answer token, in the order of `text.targets`, whether it was
        right."""
        wanted = text.targets != IGNORED
        targets = text.targets[wanted]
        logits = self.lm.lm_head(self.hidden(features, text)[wanted]).float()
        each = F.cross_entropy(logits, targets, reduction="none")
        share = weights[wanted]
        return (each * share).sum() / share.sum(), logits.argmax(-1) == targets

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self.projector.load_state_dict(parts.of_projector(trained))
        with torch.no_grad():
            for name, update in self.updates.items():
                update.a.copy_(trained[f"{name}.a"])
                update.b.copy_(trained[f"{name}.b"])
