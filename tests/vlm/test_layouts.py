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


def processed(name, path, prompt):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder(name))
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[Image.open(path)], text=[text], return_tensors="pt")


@pytest.mark.parametrize("name", SIZES)
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


def assert_says(text, pattern):
    import re

    assert re.search(pattern, " ".join(text.split())), text


FAMILY = {"llava_next": "llava_next_cut", "idefics3_tiles": "idefics3"}


def test_files_that_hold_too_little(tmp_path, capsys):
    """A plain array is taken as it is, and what is not checked then is said."""
    path = picture(tmp_path / "a.png", 1, SIZES["llava_next"][0])
    out = str(tmp_path / "out")
    assert (
        main(["vlm", f"hf:{folder('llava_next')}", "--image", path, "--prompt", PROMPT, "--max-new-tokens", "2", "--out", out])
        == 0
    )
    inputs = processed("llava_next", path, PROMPT)
    np.save(tmp_path / "plain.npy", inputs["pixel_values"].numpy())
    np.savez(tmp_path / "pixels.npz", pixel_values=inputs["pixel_values"].numpy())
    np.savez(tmp_path / "ids.npz", input_ids=inputs["input_ids"].numpy())
    run = ["generate", out, "--prompt", PROMPT, "--pixels"]
    capsys.readouterr()
    assert main([*run, str(tmp_path / "plain.npy")]) == 0
    assert_says(
        capsys.readouterr().out, r"note: images and tiles have to lie as in the example .*, image_sizes \[\[40, 112\]\]"
    )
    for name, message in (("pixels.npz", "lacks image_sizes"), ("ids.npz", "holds no pixel_values")):
        assert main([*run, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
