"""What methods read of a block, in models that write it in their own way."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import run
from tests.models import shake
from tests.models.family import seeded
from tokcompile import Keep, Recipe, Tokens

WIDTH, HEADS, LENGTH = 24, 3, 15
ANGLES = torch.linspace(0, 3, LENGTH * WIDTH // HEADS // 2).view(LENGTH, -1)


def complex_numbers(t):
    turns = torch.polar(torch.ones_like(ANGLES), ANGLES)
    return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def pairs(t):
    cos, sin = (f(ANGLES).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    return t * cos + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) * sin


class Model(nn.Module):
    def __init__(self, turned=lambda t: t, last=False):
        super().__init__()
        self.qkv, self.out = (nn.ModuleList(nn.Linear(WIDTH, n * WIDTH) for _ in range(3)) for n in (3, 1))
        self.turned, self.last, self.token = turned, last, nn.Parameter(torch.zeros(1, 1, WIDTH))

    def attended(self, i, x):
        q, k, v = self.qkv[i](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v), q, k

    def forward(self, x):
        if self.last:
            x = torch.cat([x, self.token.expand(len(x), -1, -1)], 1)
        for i, out in enumerate(self.out):
            x = x + out(self.attended(i, x)[0].transpose(1, 2).flatten(2))
        return x[:, -1] if self.last else x.mean(1)


def built(*args):
    with seeded():
        return shake(Model(*args).eval()), torch.randn(2, LENGTH, WIDTH)


@pytest.mark.parametrize("turned", [complex_numbers, pairs])
def test_keys_before_they_are_turned(turned):
    model, x = built(turned)
    largest = Recipe("largest", lambda t, s: Keep(t.k[..., 0].sum(1).topk(s.k, -1).indices.sort(-1).values), taps=("x", "k"))
    opt = tokcompile.optimize(model, (x,), method=largest, budget=Tokens(5), where=[0], outputs="reduced")
    _, _, keys = model.attended(0, x)
    assert torch.equal(run(opt, x).kept["s0_index"], keys[..., 0].sum(1).topk(5, -1).indices.sort(-1).values)


def test_a_class_token_that_comes_last():
    model, x = built(lambda t: t, True)
    opt = tokcompile.optimize(model, (x,), method="topk", budget=Tokens(5), where=[0], outputs="reduced")
    whole = torch.cat([x, model.token.expand(2, -1, -1)], 1)
    _, q, k = model.attended(0, whole)
    row = (q[:, :, -1:] @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)[:, :, 0, :LENGTH].sum(1)
    assert opt.plan.reductions[0].suffix == 1
    assert torch.equal(run(opt, x).kept["s0_index"], row.topk(5, -1).indices.sort(-1).values)
