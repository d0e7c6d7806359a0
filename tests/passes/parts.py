"""The parts of one block, and the plainest of the ways in which they can be wired."""

import torch
import torch.nn.functional as F
from torch import nn

D = 16


class Parts(nn.Module):
    """Weights for one block, however it is wired."""

    def __init__(self, wiring):
        super().__init__()
        self.wiring = wiring
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.mlp, self.scale = nn.Linear(D, D), nn.Parameter(torch.ones(D))
        self.heads = nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        return self.wiring(self, x)

    def attend(self, x, memory=None, **options):
        memory = x if memory is None else memory
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (4, 8)).transpose(1, 2).chunk(2, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))

    def mix(self, scores):
        return torch.einsum("bhij,hg->bgij", scores, self.heads)

    def by_hand(self, x, change=lambda scores: scores, weigh=lambda weights: weights):
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (4, 8)).transpose(1, 2).chunk(2, 1)
        weights = weigh(change((q * 0.3) @ k.transpose(-1, -2)).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def pre_norm(m, x):
    x = x + m.attend(m.norm1(x))
    return x + m.mlp(m.norm2(x))
