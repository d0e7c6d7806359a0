"""Image features that a tower makes of ready patches, without any convolution, and that are placed in a prompt."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import run
from tokcompile.compiler import analyse
from tokcompile.passes.tokens import regroup

IMAGE, COUNT = 60, 12


class Prompted(nn.Module):
    """16 patches of which a mask names those that are no padding; their features replace the placeholders."""

    def __init__(self, masked):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.patch, self.embed = nn.Linear(8, 16), nn.Embedding(64, 16)
        self.tower = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.decoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.masked = masked

    def forward(self, ids, patches, real):
        features = self.tower(self.patch(patches))
        features = features[real] if self.masked else features[:, :COUNT]
        x = self.embed(ids)
        return self.decoder(x.masked_scatter((ids == IMAGE)[..., None].expand_as(x), features))


@pytest.mark.every(3)
@pytest.mark.parametrize(("masked", "after"), [(True, 2), (False, 3)], ids=["as long as the tower", "longer"])
def test_a_tower_of_features_is_visual(masked, after):
    ids = torch.tensor([[1, 2, *[IMAGE] * COUNT, *[3] * after]])
    inputs = ids, torch.randn(1, 16, 8), torch.arange(16)[None] < COUNT
    model = Prompted(masked).eval()
    structure = analyse(model, inputs, None).structure
    assert [(s.visual, s.spans) for s in structure.stages] == [(True, ()), (False, ((2, 14),))]
    check = tokcompile.check(model, inputs)
    assert check.ok, str(check)
    assert [r.block for r in check.results if r.oracle == "masked keys"] == [0, 1, 2, 3, 4]
    whole = tokcompile.optimize(model, inputs, method="random", budget=1.0)
    assert torch.equal(run(whole, *inputs), run(model, *inputs))


def test_a_view_without_entries_has_a_label():
    assert regroup(((2,), (3,), (0,)), (2, 3, 4, 0)) == ((2,), (3,), (4,), (0,))
    assert regroup(((2,), (3,), (0,)), (6, 0)) == ((6,), (0,))
