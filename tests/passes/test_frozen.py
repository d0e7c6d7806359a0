"""Values that a model reads back into Python are fixed by tracing: where reduced tokens would change them, that is refused."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import tokcompile
from tests.conftest import run


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (t[:, None] for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.proj(scaled_dot_product_attention(q, k, v)[:, 0])


class Routed(nn.Module):
    """Between two pairs of blocks an expert takes the tokens that a gate names, as many as these are."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.gate, self.expert = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 1), nn.Linear(width, width)
        self.first, self.last = (nn.Sequential(Block(width), Block(width)) for _ in range(2))

    def forward(self, image):
        x = self.first(self.patch(image).flatten(2).transpose(1, 2))[0]
        rows = torch.where(self.gate(x)[:, 0] > 0)[0]
        return self.last(x.index_add(0, rows, self.expert(x[rows]))[None])


def test_a_reduction_in_front_of_a_value_read_back_is_refused(tmp_path):
    model, image = Routed().eval(), torch.randn(1, 3, 24, 24)
    with pytest.raises(tokcompile.UnsupportedGraph, match=r"(?s)reads values back into Python.*where gave.*experts_impl"):
        tokcompile.optimize(model, (image,), method="random", where=[1], recover="anywhere")
    assert not tokcompile.check(model, (image,), blocks=[0]).ok
    behind = tokcompile.optimize(model, (image,), method="random", where=[2])
    assert run(behind, image).shape == (1, 36, 16)
    with pytest.raises(tokcompile.InputError, match="where gave"):
        behind(torch.randn(1, 3, 24, 24))
    with pytest.raises(tokcompile.ExportError, match=r"(?s)would take them for every input: where gave"):
        behind.export_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
