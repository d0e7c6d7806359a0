"""Models of three blocks: one in the middle block of which anything may happen, and one with causal attention."""

import functools

import torch
from torch import nn

import tokcompile
from tests.models.family import seeded
from tests.shared import shared

WIDTH, LENGTH = 16, 12


class Block(nn.Module):
    """A pre-norm block; `between` is applied to the tokens between its attention and its MLP."""

    def __init__(self, between=None):
        super().__init__()
        self.between = between
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))
        if self.between is not None:
            x = self.between(x)
        return x + self.mlp(self.norm2(x))


class Tiny(nn.Module):
    """Three blocks over LENGTH tokens; what stands `between` is in the middle one."""

    def __init__(self, between=None, before=None):
        super().__init__()
        self.before = before
        self.blocks = nn.ModuleList([Block(), Block(between), Block()])

    def forward(self, x):
        if self.before is not None:
            x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return x


class Causal(nn.Module):
    """Blocks with a causal fused attention and no mask."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x).relu()
        return x


@functools.cache
def plain():
    with seeded():
        return shared(Tiny().eval()), (torch.randn(1, LENGTH, WIDTH),)


def tiny(between=None, before=None):
    if between is None and before is None:
        return plain()
    return Tiny(between, before).eval(), (torch.randn(1, LENGTH, WIDTH),)


def optimize(model_and_args, **options):
    return tokcompile.optimize(*model_and_args, **{"method": "random", **options})
