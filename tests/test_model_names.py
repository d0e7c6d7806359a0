"""Every way to name a model on the command line, and what is said where a name leads nowhere."""

import json
import sys

import pytest
import torch

from tests.command_line import TINY, Vit, refused, tiny
from tokcompile.models import example_input, load_model


def bare():
    return Vit()


def keywords():
    return Vit(), (), {"image": torch.randn(2, 3, 28, 28)}


def fixed():
    return Vit(), torch.randn(1, 3, 28, 28)


def program():
    model, args = tiny()
    return torch.export.export(model.eval(), args)


def junk():
    return "a string"


def greedy(width, depth, batch):
    return Vit(width, 2, depth)


number = 7
instance = Vit()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "does not name a model; a MODEL is one of"),
        ("no_such_package.models:build", "there is no module 'no_such_package'"),
        ("tests.no_such_module:build", "there is no module 'tests.no_such_module'"),
        (".tests:build", "is not the name of a module"),
        ("tests.test_model_names:tini", "tests.test_model_names has no 'tini'; did you mean tiny"),
        ("tests.test_model_names:Vit.blocks", "has no 'Vit.blocks'"),
        ("tests.test_model_names:junk", "returned a str; it has to return a module"),
        ("tests.test_model_names:number", "is an int; it has to be a function"),
        ("tests.test_model_names:greedy", "needs the arguments width, depth, but only `batch` is passed"),
        ("tests.test_model_names:bare", "returns no example inputs: pass --input"),
        ("missing.pt2", "there is no file missing.pt2"),
        ("hf:missing", "there is no folder 'missing'"),
    ],
)
def test_names_that_lead_nowhere_are_refused(cli, name, message):
    assert refused(cli("inspect", name), message)


def test_a_module_that_cannot_be_imported_is_refused(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    (tmp_path / "tokcompile_test_needy.py").write_text("import tokcompile_test_absent\n")
    (tmp_path / "tokcompile_test_typo.py").write_text("def build(:\n")
    assert refused(cli("inspect", "tokcompile_test_needy:build"), "No module named 'tokcompile_test_absent'")
    assert refused(cli("inspect", "tokcompile_test_typo:build"), "SyntaxError")


@pytest.mark.parametrize("name", ["fixed", "keywords", "instance", "bare", "Vit", "program"])
def test_every_kind_of_named_object_is_understood(cli, name):
    given = ["--input", "1x3x28x28"] if name in ("instance", "bare", "Vit") else []
    code, out, _ = cli("inspect", f"tests.test_model_names:{name}", "--json", *given)
    assert code == 0
    assert len(json.loads(out)["sites"]) == 4


def test_batch_reaches_the_function_or_is_refused(cli):
    assert load_model(TINY, batch=3).args[0].shape == (3, 3, 28, 28)
    assert load_model("tests.test_model_names:bare", ["1x3x28x28"], batch=3).args[0].shape == (3, 3, 28, 28)
    assert refused(cli("inspect", "tests.test_model_names:fixed", "--batch", "2"), "give it a parameter `batch`")


def test_example_inputs_are_seeded_and_typed():
    image = example_input("2x3x5:float16")
    assert (image.shape, image.dtype) == ((2, 3, 5), torch.float16)
    assert torch.equal(image, example_input("2x3x5:float16"))
    ids = example_input("1x77:int64")
    assert (ids.dtype, int(ids.min()), int(ids.max())) == (torch.int64, 0, 7)
    assert example_input("1x4:bool").all()


@pytest.mark.parametrize("text", ["", "1x", "3,4", "0x3", "1x3:floaty", "1x3:nn"])
def test_bad_example_inputs_are_refused(cli, text):
    assert refused(cli("inspect", TINY, "--input", text), "input")


def test_exported_programs_are_read_from_files(cli, tmp_path):
    path = tmp_path / "tiny.pt2"
    torch.export.save(program(), path)
    assert cli("check", path)[0] == 0
    assert refused(cli("check", path, "--batch", "4"), "export it again with --batch 4")
    path.write_text("nothing")
    assert refused(cli("check", path), "is not a torch.export archive")


def test_timm_models_by_name(cli, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    model = timm.create_model("test_vit", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    named = load_model("timm:test_vit", batch=2, weights=tmp_path / "weights.pt")
    assert named.args[0].shape == (2, 3, 160, 160)
    torch.testing.assert_close(named.model(*named.args), model.eval()(*named.args))
    assert cli("inspect", "timm:test_vit")[0] == 0
    assert refused(cli("inspect", "timm:vit_base_patch16_22"), "did you mean vit_base_patch16_224")
    assert refused(cli("inspect", "timm:test_vit", "--weights", tmp_path / "none"), "there is no weight file")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    wrong = cli("inspect", "timm:test_vit", "--weights", tmp_path / "weights.pt")
    assert refused(wrong, "does not hold weights for timm:test_vit")


def test_transformers_folders(cli, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.ViTConfig(**sizes, image_size=24, patch_size=8)
    config.save_pretrained(tmp_path / "bare")
    assert cli("inspect", f"hf:{tmp_path / 'bare'}")[0] == 0
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path / "full")
    named = load_model(f"hf:{tmp_path / 'full'}", batch=2)
    assert named.kwargs["pixel_values"].shape == (2, 3, 24, 24)
    want = model(**named.kwargs).last_hidden_state
    torch.testing.assert_close(named.model(**named.kwargs).last_hidden_state, want)
    (tmp_path / "empty").mkdir()
    assert refused(cli("inspect", f"hf:{tmp_path / 'empty'}"), "holds no config.json")
    transformers.BertConfig(**sizes, vocab_size=50).save_pretrained(tmp_path / "text")
    assert refused(cli("inspect", f"hf:{tmp_path / 'text'}"), "reads input_ids: write a function")
    transformers.CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 16, "patch_size": 8}).save_pretrained(
        tmp_path / "clip"
    )
    assert refused(cli("inspect", f"hf:{tmp_path / 'clip'}"), "let it return model.vision_model")
