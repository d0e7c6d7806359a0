"""`tokcompile vlm`: from a function to a folder, and what it says where that cannot be."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.vlm.models import vlm
from tokcompile.cli import main

MODEL = "tests.vlm.test_command:build"


def build():
    model, inputs = vlm("llava")
    return model, (), dict(inputs)


def bare():
    model, inputs = vlm("llava")
    return model, (inputs["pixel_values"],)


def test_a_folder_that_generates(tmp_path, capsys):
    (tmp_path / "preprocessor.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}))
    given = ["vlm", MODEL, "--out", str(tmp_path / "folder"), "--method", "dart", "--budget", "tokens:9", "--room", "5,9"]
    given += ["-o", "text_pivots=1", "--preprocessor", str(tmp_path / "preprocessor.json"), "--max-new-tokens", "4"]
    assert main([*given, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["plans"]["language"]["reductions"][0]["k"] == 9
    assert [s["length"] for s in data["stages"]] == [63, 63 - 49 + 9]
    Image.fromarray(np.full((30, 40, 3), 99, np.uint8)).save(tmp_path / "a.png")
    run = ["generate", str(tmp_path / "folder"), "--image", str(tmp_path / "a.png"), "--ids", "1,60,2,3", "--json"]
    assert main([*run, "--ignore-eos"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"][0]) == 4
    assert main(given) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.vlm.test_command:bare"], "has to return (model, (), inputs)"),
        ([MODEL, "--room", "5"], "room=[5], and the example has [5, 7] tokens"),
        ([MODEL, "--room", "a,b"], "is not a list of numbers"),
        ([MODEL, "--renumber"], "--renumber is about tokens that --vision-method leaves, and there is none"),
        ([MODEL, "--method", "darts"], "unknown method 'darts'"),
        ([MODEL, "--method", "dart", "--budget", "tokens:60"], "60"),
        ([MODEL, "--preprocessor", "missing.json"], "cannot read 'missing.json'"),
        ([MODEL, "--template", "{prompt}"], "has to hold {prompt} once, and {image} 1 time"),
    ],
)
def test_refused(arguments, message, tmp_path, capsys):
    assert main(["vlm", *arguments, "--out", str(tmp_path / "folder"), "--max-new-tokens", "2"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
