"""Which placeholders the features of a reduced vision part stand for, where more than the kept tokens is among them."""

import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.vlm.models import video_llava
from tokcompile.vlm import split

FRAME = 17


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["random", "topk", "tome"])
@pytest.mark.parametrize("batch", [1, 2])
def test_class_tokens_among_the_features(method, batch):
    """Those of every frame are kept beside what the frame's indices name."""
    model, inputs = video_llava(batch)
    clip = inputs["pixel_values_videos"]
    parts = split(model, inputs)
    short, dense = (
        tokcompile.optimize(*parts.vision, method=method, outputs=outputs, budget=0.5, where=[1])
        for outputs in ("reduced", "keep")
    )
    left = parts.after(short)
    seen = left.see(clip)
    rows = (run(short, clip).kept["s0_index"] + 1).unflatten(0, (batch, 3))
    want = [[0, *rows[b, f].tolist()] for b in range(batch) for f in range(3)]
    want = torch.tensor([[f % 3 * FRAME + i for i in one] for f, one in enumerate(want)])
    assert torch.equal(seen["kept"], want.reshape(batch, -1))
    whole = run(dense, clip)["features"].reshape(batch, 3 * FRAME, -1)
    assert error(seen["features"], whole.take_along_dim(seen["kept"][..., None], 1)) < 1e-6
    ids, at = inputs["input_ids"], seen["kept"] + 5
    text = model.get_input_embeddings()(ids)
    embeds = torch.cat([text[:, :5], seen["features"], text[:, -3:]], 1)
    positions = torch.cat([torch.arange(5).expand(batch, -1), at, torch.arange(56, 59).expand(batch, -1)], 1)
    want = run(model.model.language_model, inputs_embeds=embeds, position_ids=positions).last_hidden_state
    assert error(run(left, clip, ids)["logits"], run(model.lm_head, want[:, -1:])) < 1e-5
