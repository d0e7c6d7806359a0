"""Convolutions behind a tower: as linear maps where windows lie side by side, and otherwise as they are."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import error, run
from tests.passes.test_regroup import Attend
from tokcompile.compiler import analyse
from tokcompile.passes.graph import packet

SIDE_BY_SIDE = [dict(kernel_size=2, stride=2), dict(kernel_size=(3, 1), stride=(3, 1), bias=False)]
OTHERS = [
    dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=3, padding="same"), dict(kernel_size=2, stride=2, groups=2),
    dict(kernel_size=2, stride=2, dilation=2), dict(kernel_size=4, stride=4),
]  # fmt: skip


class Merged(nn.Module):
    """6 x 6 patches through two blocks, a convolution, a map of one token, newline tokens, and a head."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.vision = nn.Conv2d(3, 16, 2, 2), nn.Sequential(Attend(16), Attend(16))
        self.first, self.second = nn.Conv2d(16, 16, **first), nn.Conv2d(16, 16, 1)
        self.newline, self.head = nn.Parameter(torch.randn(16)), nn.Linear(16, 16)

    def forward(self, image):
        x = self.vision(self.patch(image).flatten(2).transpose(1, 2))
        x = self.second(self.first(x.transpose(1, 2).view(len(x), 16, 6, 6)).tanh())
        newline = self.newline[None, :, None, None].expand(len(x), -1, x.shape[2], 1)
        return self.head(torch.cat([x, newline], 3).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("first", SIDE_BY_SIDE)
def test_windows_side_by_side(first):
    model, image = Merged(first).eval(), torch.randn(1, 3, 12, 12)
    analysis = analyse(model, (image,), None)
    assert [packet(n) for n in analysis.graph.graph.nodes].count("aten.conv2d") == 1  # that of the patches
    assert error(run(analysis.graph, image)[0], run(model, image)) < 1e-5
    check = tokcompile.check(model, (image,))
    assert check.ok, str(check)
    assert not [r for r in check.results if "recover" in r.note]
    fast = tokcompile.optimize(model, (image,), method="random", where=[1], budget=tokcompile.Tokens(4), outputs="reduced")
    newlines = 3 if first["kernel_size"] == 2 else 2
    assert run(fast, image).output.shape == (1, 4 + newlines, 16)


@pytest.mark.parametrize("first", OTHERS)
def test_other_windows_want_the_grid(first):
    model, image = Merged(first).eval(), torch.randn(1, 3, 12, 12)
    assert error(run(analyse(model, (image,), None).graph, image)[0], run(model, image)) < 1e-5
    fast = tokcompile.optimize(model, (image,), method="random", where=[1], budget=0.5, outputs="reduced")
    assert [r["reason"] for r in fast.report.recoveries] == ["it views the tokens as a grid, as windows or as groups"]
    assert run(fast, image).output.shape == run(model, image).shape
