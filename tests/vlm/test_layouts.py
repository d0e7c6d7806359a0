"""Folders of models that cut an image into tiles, with the pixel values of the family's own processor: right for the layout of
the example, refused for another one of as many tiles."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vlm.folders import folder
from tests.vlm.models import vlm
from tests.vlm.test_folders import PROMPT, picture
from tokcompile.cli import main

SIZES = {  # (width, height): of the example, of another image in the same tiles, of one that takes as many otherwise
    "llava_next": ((112, 40), (112, 40), (112, 56)),
    "idefics3_tiles": ((128, 64), (128, 60), (64, 128)),
}
WRONG = {
    "llava_next": r"image_sizes is \[\[56, 112\]\], and .* was made for \[\[40, 112\]\]",
    "idefics3_tiles": r"the text between images \d and \d of .* is not that of the example",
}


LAYOUT = {"llava_next": r"image_sizes \[\[40, 112\]\]", "idefics3_tiles": r"pixel_attention_mask \["}


def processed(name, path, prompt):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder(name))
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[Image.open(path)], text=[text], return_tensors="pt")


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["llava_next", "idefics3_tiles"])
def test_pixel_values_of_a_processor_are_checked_for_their_layout(name, tmp_path, capsys):
    paths = [picture(tmp_path / f"{i}.png", i, size) for i, size in enumerate(SIZES[name])]
    out = str(tmp_path / "out")
    assert (
        main(["vlm", f"hf:{folder(name)}", "--image", paths[0], "--prompt", PROMPT, "--max-new-tokens", "6", "--out", out]) == 0
    )
    assert "needs ready pixel values (--pixels) instead of --image" in capsys.readouterr().out
    run = ["generate", out, "--prompt", "a cat ?", "--ignore-eos"]
    given = [processed(name, path, "a cat ?") for path in paths]
    for i, inputs in enumerate(given):
        np.savez(tmp_path / f"{i}.npz", **{k: v.numpy() for k, v in inputs.items()})
    assert given[1]["pixel_values"].shape == given[2]["pixel_values"].shape
    assert main([*run, "--pixels", str(tmp_path / "1.npz"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        want = vlm(FAMILY[name])[0].generate(
            **given[1], max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert data["tokens"] == want[:, given[1]["input_ids"].shape[1] :].tolist()
    assert data["method"] is None
    assert main([*run, "--pixels", str(tmp_path / "2.npz")]) == 2
    assert_says(capsys.readouterr().err, WRONG[name])
    assert main([*run, "--image", paths[0]]) == 2
    assert "does not say how images are preprocessed" in capsys.readouterr().err
    np.save(tmp_path / "plain.npy", given[1]["pixel_values"].numpy())  # taken as it is, and what is not checked then is said
    assert main([*run, "--pixels", str(tmp_path / "plain.npy")]) == 0
    assert_says(capsys.readouterr().out, f"note: images and tiles have to lie as in the example .*, {LAYOUT[name]}")
    np.savez(tmp_path / "pixels.npz", pixel_values=given[1]["pixel_values"].numpy())
    np.savez(tmp_path / "ids.npz", input_ids=given[1]["input_ids"].numpy())
    for file, message in (("pixels.npz", f"lacks {LAYOUT[name].split()[0]}"), ("ids.npz", "holds no pixel_values")):
        assert main([*run, "--pixels", str(tmp_path / file)]) == 2
        assert message in capsys.readouterr().err


def assert_says(text, pattern):
    import re

    assert re.search(pattern, " ".join(text.split())), text


FAMILY = {"llava_next": "llava_next_cut", "idefics3_tiles": "idefics3"}
