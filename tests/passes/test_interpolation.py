"""Interpolations that change nothing, and those that are means of four."""

import pytest
import torch
from torch.nn.functional import interpolate

from tests.conftest import error
from tests.passes.graphs import canonical
from tokcompile.passes.graph import packet

SAME, POOLED, KEPT = "aten.mul", "aten.avg_pool2d", "aten.upsample"


@pytest.mark.parametrize(("options", "what"), [
    (dict(size=(6, 4), mode="bilinear"), SAME),
    (dict(size=(6, 4), mode="bicubic"), SAME),
    (dict(size=(6, 4), mode="nearest"), SAME),
    (dict(scale_factor=1.0, mode="bilinear"), SAME),
    (dict(scale_factor=1.2, mode="bilinear"), KEPT),  # to 7 x 4
    (dict(scale_factor=1.1, mode="bilinear"), KEPT),  # as long, but from other places
    (dict(size=(3, 2), mode="bilinear"), POOLED),
    (dict(scale_factor=0.5, mode="bilinear"), POOLED),
    (dict(size=(3, 2), mode="bilinear", align_corners=True), KEPT),
    (dict(size=(3, 2), mode="bicubic"), KEPT),
    (dict(size=(3, 4), mode="bilinear"), KEPT),
    (dict(size=(2, 2), mode="bilinear"), KEPT),
])  # fmt: skip
def test_what_becomes_of_an_interpolation(options, what):
    x = torch.randn(2, 3, 6, 4)
    gm = canonical(lambda x: interpolate(x, **options) * 2, x)
    first = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert packet(first).startswith(what)
    assert error(gm(x)[0], interpolate(x, **options) * 2) < 1e-6
