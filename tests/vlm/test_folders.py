"""`tokcompile vlm hf:FOLDER`: from a transformers folder to one that generates, and what it says where something is missing."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vlm.folders import folder
from tests.vlm.models import vlm
from tokcompile.cli import main

PROMPT = "what is this ?"


def picture(path, seed, size):
    """Smooth colours, of the size that the processor wants: it has nothing to resample."""
    width, height = size
    y, x = np.mgrid[:height, :width] / 64
    pixels = np.stack([np.sin(3 * x + seed), np.cos(4 * y - seed), np.sin(x + y * seed)], -1)
    Image.fromarray((127 * pixels + 128).astype(np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("qwen2_vl", [(48, 64), (64, 32)]), pytest.param("idefics3", [(64, 64), (64, 64)], marks=pytest.mark.matrix)],
    ids=["qwen2_vl", "idefics3"],
)
def test_two_images_and_a_text_are_what_transformers_makes_of_them(name, sizes, tmp_path, capsys):
    """Nothing is removed: token by token the model's own `generate` on what its processor gives, for another prompt and other
    images than those of the export."""
    from transformers import AutoProcessor

    first, second, third, fourth = (picture(tmp_path / f"{i}.png", i, sizes[i % 2]) for i in range(4))
    given = ["vlm", f"hf:{folder(name)}", "--image", first, "--image", second, "--prompt", PROMPT, "--max-new-tokens", "6"]
    assert main([*given, "--out", str(tmp_path / "new" / "out"), "--room", "6,4,12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    run = ["generate", str(tmp_path / "new" / "out"), "--prompt", "a cat ?", "--ignore-eos"]
    assert main([*run, "--image", third, "--image", fourth, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    model, processor = vlm(name)[0], AutoProcessor.from_pretrained(folder(name))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a cat ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(third), Image.open(fourth)], text=[text], return_tensors="pt")
    with torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert data["tokens"] == want[:, inputs["input_ids"].shape[1] :].tolist()
    assert data["text"] == processor.batch_decode(data["tokens"], skip_special_tokens=True)
    assert main([*run, "--image", first]) == 2
    assert "was exported for 2 image(s), and 1 are given" in capsys.readouterr().err


def without(*names):
    def change(path):
        for name in names:
            for file in path.glob(name):
                file.unlink()

    return change


def lacking(path):
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def of_text(path):
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))


CALL = ["--image", "PICTURE", "--prompt", PROMPT]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, [], "needs an example call: pass --image FILE, once for each image of a prompt, and --prompt TEXT"),
        (None, ["--prompt", PROMPT], "needs an example call"),
        (None, ["--image", "none.png", "--prompt", PROMPT], "cannot read the image 'none.png'"),
        (without("*.safetensors"), CALL, "holds no weights (*.safetensors or *.bin)"),
        (without("config.json"), CALL, "holds no config.json"),
        (without("processor_config.json"), CALL, "holds no processor (processor_config.json or preprocessor_config.json)"),
        (without("tokenizer.json"), CALL, "holds no tokenizer.json"),
        (without("chat_template.jinja"), CALL, "there is no image placeholder in the prompt, and "),
        (without("chat_template.jinja"), [*CALL[:3], "user : {image} {image} ?"], "has 2 image placeholder(s), and 1 image(s)"),
        (None, [*CALL, "--template", "user {prompt}"], "has to hold {prompt} once, and {image} 1 time(s)"),
        (lacking, CALL, "lack 1 of the model's, such as lm_head.weight"),
        (of_text, CALL, "as a vision-language model: "),
        (None, [*CALL, "--room", "1,2"], "room=[1, 2], and the example has [2, 6] tokens"),
    ],
)  # fmt: skip
def test_refused(change, arguments, message, tmp_path, capsys):
    source = folder("llava")
    if change is not None:
        source = shutil.copytree(source, tmp_path / "source")
        change(source)
    image = picture(tmp_path / "a.png", 1, (56, 56))
    given = [image if a == "PICTURE" else a for a in arguments]
    assert main(["vlm", f"hf:{source}", *given, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_and_options_of_the_other_kind(tmp_path, capsys):
    assert main(["vlm", f"hf:{tmp_path / 'none'}", "--image", "a.png", "--prompt", "a", "--out", str(tmp_path / "out")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["vlm", "tests.vlm.test_command:build", "--prompt", "a", "--out", str(tmp_path / "out")]) == 2
    assert "--prompt goes with hf:FOLDER" in capsys.readouterr().err
