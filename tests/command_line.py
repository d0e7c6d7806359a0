"""Small models that the command line can name, running it, and what every refusal of it has in common."""

import functools
from pathlib import Path

import torch
from torch import nn

from tests.models.family import seeded
from tests.shared import shared
from tokcompile.cli import main

ROOT = Path(__file__).parent.parent
TINY = "tests.command_line:tiny"


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A class token and 7 x 7 patches."""

    def __init__(self, width=16, heads=2, depth=4):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 50, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@functools.cache
def small(batch):
    with seeded():
        return shared(Vit()), (torch.randn(batch, 3, 28, 28),)


def tiny(batch=1):
    model, args = small(batch)
    return model.train(), args  # as models are before anybody calls eval()


def broken():
    raise RuntimeError("no such luck")


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(result, *parts):
    """Exit code 2, one message with all the parts, nothing on stdout and no traceback."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    return True
