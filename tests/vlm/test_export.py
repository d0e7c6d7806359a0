"""The folder of files: what generates from it in ONNX Runtime, what is in it, and what is refused."""

import copy
import functools
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import tokcompile
from tests.conftest import error, layer
from tests.exports.models import DYNAMIC, all_nodes
from tests.shared import shared
from tests.vlm.models import parts_of, reduced_parts, vlm
from tokcompile import ExportError, InputError, Reduction, Tokens
from tokcompile.cli import main
from tokcompile.exports import tensorrt_rtx
from tokcompile.llm.folder import Session
from tokcompile.vlm import Generator, Patches, Preprocess, export, export_vision, load, split
from tokcompile.vlm.whole import check_same, placed

WORDS = ["<pad>", "what", "is", "this", "?", "a", "cat", "user", ":", "answer"]


def tokenizer(path):
    """Words by white space; those that a model draws beyond them are w10 to w63."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate([*WORDS, *(f"w{i}" for i in range(len(WORDS), 64))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(path))
    return path


@functools.cache
def reduced(name, *room):
    """(parts, prefill): half the features leave the vision part, and 4 tokens of them reach layer 2."""
    parts = reduced_parts(name, room=room, method="divprune", budget=0.5, where=(2,))
    options = dict(method="dart", budget=Tokens(4), text_pivots=2)
    return parts, tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(inputs, parts, generator, folder, report) of LLaVA, with a tokenizer and a template."""
    inputs, (parts, prefill) = vlm("llava")[1], reduced("llava", 6, 10)
    place = tmp_path_factory.mktemp("vlm")
    report = export(
        parts, prefill, place / "folder", max_new_tokens=8, template="user : {image} {prompt} answer :",
        preprocess=Preprocess((56, 56), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), "crop"), tokenizer=tokenizer(place / "t.json"),
    )  # fmt: skip
    return inputs, parts, Generator(parts, prefill, max_new_tokens=8), place / "folder", report


@pytest.fixture
def picture(tmp_path):
    y, x = np.mgrid[:60, :80]
    Image.fromarray(np.stack([x * 3, y * 4, x + y], -1).astype(np.uint8)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_files_and_what_is_in_them(written):
    _, parts, _, folder, report = written
    names = ["decode.onnx", "embeddings.npy", "generate.json", "prefill.onnx", "tokenizer.json", "vision.onnx"]
    assert sorted(os.listdir(folder)) == names
    assert report.bytes == sum(os.path.getsize(folder / name) for name in names)
    assert report.steps == 4
    assert max(report.errors.values()) < 1e-4
    data = json.loads((folder / "generate.json").read_text())
    assert data["images"]["prompt"]["placeholders"] == [[6, 55]]
    assert data["images"]["features"] == {"from": "features", "into": "inputs_embeds", "at": [[6, 31]]}
    assert data["images"]["plan"]["reductions"][0]["k"] == parts.prompt.length - 16 == 25
    assert [s["length"] for s in data["stages"]] == [41, 20]
    for name in ("vision", "prefill", "decode"):
        graph = onnx.load(folder / f"{name}.onnx")
        assert not {node.op_type for node in all_nodes(graph)} & DYNAMIC
    weights = {name: os.path.getsize(folder / f"{name}.onnx") for name in ("vision", "prefill", "decode")}
    assert max(weights.values()) < 2 * min(weights.values())  # none holds the weights of another


@pytest.mark.parametrize("words", ["what is this ?", "a"])
def test_generates_what_torch_generates(words, written, picture, capsys):
    """A text of its own length, through the command line, against the parts in PyTorch on the same ids and pixels."""
    _, parts, made, folder, _ = written
    given = ["generate", str(folder), "--image", picture, "--prompt", words, "--ignore-eos", "--json", "--threads", "1"]
    assert main(given) == 0
    data = json.loads(capsys.readouterr().out)
    text = [[7, 8], [*[WORDS.index(w) for w in words.split()], 9, 8]]
    ids, mask = parts.prompt.lay_out(text, padded=True)
    pixels = Preprocess((56, 56), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), "crop")(picture, (1, 3, 56, 56))
    assert data["tokens"] == made(pixels, ids, mask, eos=()).tokens.tolist()
    assert data["text"] == [" ".join((WORDS + [f"w{i}" for i in range(10, 64)])[i] for i in data["tokens"][0])]
    assert data["time_to_first_token_ms"] > 0
    assert data["tokens_per_second"] > 0
    assert data["cached_tokens"] == {"0-1": 41, "2-3": 20}


def test_ids_and_ready_pixels(written, tmp_path, capsys):
    inputs, parts, made, folder, _ = written
    np.save(tmp_path / "pixels.npy", inputs["pixel_values"].numpy())
    given = [
        "generate",
        str(folder),
        "--pixels",
        str(tmp_path / "pixels.npy"),
        "--ids",
        "3,4,60,5,6,7",
        "--max-new-tokens",
        "5",
    ]
    assert main([*given, "--ignore-eos"]) == 0
    out = capsys.readouterr().out.splitlines()
    want = made(inputs["pixel_values"], *parts.prompt.lay_out([[3, 4], [5, 6, 7]], True), eos=(), max_new_tokens=5)
    assert out[0] == " ".join(map(str, want.tokens[0].tolist()))
    assert out[1].startswith("time to first token ")
    assert "tokens/s (dart; 41 prompt tokens" in out[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "pass --image FILE or --pixels FILE.npz"),
        (["--prompt", "a", "--image", "missing.png"], "cannot read the image 'missing.png'"),
        (["--prompt", "a", "--image", "PICTURE", "--image", "PICTURE"], "was exported for 1 image(s), and 2 are given"),
        (
            ["--prompt", " ".join("a" * 9), "--image", "PICTURE"],
            "the text after image 1 has 11 tokens, and this model was made",
        ),
        (["--ids", "1,2,3", "--image", "PICTURE"], "the prompt has 0 image(s), and this model was made for 1"),
        (["--ids", "1,60,2", "--image", "PICTURE"], "dart reads 2 tokens of the text after the image, and this prompt has 1"),
        (["--ids", "1,60,2,99", "--image", "PICTURE"], "the id 99 is not among the 64"),
        (["--prompt", "a", "--pixels", "missing.npy"], "cannot read the pixel values"),
        (["--prompt-embeds", "x.npy", "--image", "PICTURE"], "makes its own embeddings"),
        (["--prompt", "a", "--image", "PICTURE", "--max-new-tokens", "9"], "take 1 to 8 tokens"),
    ],
)
def test_command_line_refuses(arguments, message, written, picture, capsys):
    given = [picture if a == "PICTURE" else a for a in arguments]
    assert main(["generate", str(written[3]), *given]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "none"), "--image", "a.png", "--prompt", "a"]) == 2
    assert "give a folder that tokcompile.llm.export or tokcompile.vlm.export wrote" in capsys.readouterr().err


@pytest.mark.matrix
def test_deepstack_patches_and_positions_of_three_axes(tmp_path, picture):
    """Qwen3-VL: patches in, DeepStack features gathered, positions that go on after the image's grid."""
    parts, prefill = reduced("qwen3_vl", 6, 9)
    how = Preprocess((64, 48), fit="aspect", patches=Patches(8, 2, 2))
    export(parts, prefill, tmp_path / "folder", max_new_tokens=6, preprocess=how)
    folder = load(tmp_path / "folder", threads=1)
    with pytest.raises(InputError, match="images shaped like 48 x 64"):
        folder.pixels([picture])
    pixels = folder.pixels([picture], stretch=True)
    ids, mask = folder.lay_out([[1, 2, 3], [4, 5, 6, 7]])
    got = folder(pixels, ids, mask, eos=(), keep_logits=True)
    want = Generator(parts, prefill, max_new_tokens=6)(pixels, ids, mask, eos=(), keep_logits=True)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert error(got.logits, want.logits) < 1e-4
    assert parts.prompt.positions(mask)[1].tolist() == [[3 + 4 + 4]]
    check_vision_alone(parts, tmp_path)


def check_vision_alone(parts, folder):
    """A file of the vision part that says where features stand: what `parts.after` computes, less where the image begins."""
    export_vision(parts, folder / "vision.onnx", verify=False)
    got = Session(str(folder / "vision.onnx"), 1)({"pixel_values": parts.vision.args[0]})
    seen, data = parts.see(*parts.vision.args), json.loads((folder / "vision.json").read_text())
    assert torch.equal(got["kept"], seen["kept"])
    assert error([got[f"deepstack_{i}"] for i in range(2)], seen["deepstack"]) < 1e-4
    assert (data["axes"], data["deepstack_after"]) == (3, [1, 2])
    assert data["images"] == [{"placeholders": 12, "left": 6, "step": 4}]
    prompt = parts.language_inputs(parts.embeddings.kwargs["input_ids"], seen, parts.prompt.mask)
    begin = int(parts.prompt.mask[0, : parts.prompt.full[0][0]].sum())
    assert torch.equal(prompt["position_ids"][..., slice(*parts.spans[0])], got["positions"] + begin)
    for one, options, message in (
        (parts_of("qwen3_vl"), {}, "all features"),
        (parts, {"dynamic_batch": True}, "dynamic_batch"),
    ):
        with pytest.raises(InputError, match=message):
            export_vision(one, folder / "other.onnx", **options)


@pytest.mark.matrix
def test_half_precision(tmp_path):
    """In fp16: the tokens of fp16 in PyTorch, and logits within 2 % of the largest."""
    model, inputs = vlm("llava")
    model = shared(copy.deepcopy(model).half())
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].half()}
    parts = split(model, inputs)
    parts = parts.after(tokcompile.optimize(*parts.vision, method="divprune", budget=0.5, where=[2], outputs="reduced"))
    prefill = tokcompile.optimize(*parts.language, method="dart", budget=Tokens(4), spans=parts.spans, outputs="reduced")
    report = export(parts, prefill, tmp_path / "folder", max_new_tokens=8)
    assert 1e-4 < report.error < 2e-2  # it was computed in half precision
    given = inputs["pixel_values"], inputs["input_ids"]
    got = load(tmp_path / "folder", threads=1)(*given, eos=(), keep_logits=True)
    want = Generator(parts, prefill, max_new_tokens=8)(*given, eos=(), keep_logits=True)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert error([one.float() for one in got.logits], [one.float() for one in want.logits]) < 2e-2


def test_a_model_that_was_optimized_as_a_whole(tmp_path, monkeypatch):
    """The folder holds the reductions of both places, with room for more text, and gives what the whole model gives."""
    model, inputs = vlm("llava")
    tower = tokcompile.optimize(model, kwargs=inputs, method="divprune", budget=0.5, where=[2], outputs="reduced")
    both = tokcompile.optimize(
        tower, method="dart", budget=Tokens(4), where=[layer(tower, 2)], outputs="reduced", text_pivots=2, drop_layer=3
    )
    report = both.export_onnx(tmp_path / "folder", max_new_tokens=8, room=(6, 10), template="{image} {prompt}")
    assert [(s["first"], s["length"], s["capacity"]) for s in report.stages] == [(0, 41, 49), (2, 20, 28), (3, 16, 24)]
    assert json.loads((tmp_path / "folder" / "generate.json").read_text())["images"]["template"] == "{image} {prompt}"
    parts, prefill = reduced("llava", 6, 10)
    with pytest.raises(ExportError, match=r"give other logits than the whole one, off by .*\n  what to do: .*vlm.split"):
        check_same(tower, parts, prefill, parts.see(*parts.vision.args, **parts.vision.kwargs))
    with pytest.raises(InputError, match=r"room=\[1, 1\], and the example has"):
        both.export_onnx(tmp_path / "other", room=(1, 1))
    anew = tokcompile.optimize(tower, method="sparsevlm", budget=Tokens(9), where=[layer(tower, 2)], outputs="reduced")
    with pytest.raises(ExportError, match=r"(?s)'sparsevlm' numbers tokens anew.*have gaps.*what to do: .*renumber=False"):
        anew.export_onnx(tmp_path / "other")
    monkeypatch.setattr("tokcompile.vlm.whole.split", None)  # text is looked at before the model is taken apart
    for kind, match, option in (
        (ExportError, "there is no file", dict(tokenizer=tmp_path / "none.json")),
        (InputError, "has to hold {prompt} once, and {image} 1 time", dict(template="{prompt}")),
    ):
        with pytest.raises(kind, match=match):
            both.export_onnx(tmp_path / "other", **option)
    assert os.listdir(tmp_path) == ["folder"]


def test_spans_are_found_again_where_a_tower_left_fewer_tokens():
    """Two images of 4 and 6 tokens with text of 2, 1 and 3 around them, and room for 5, 2 and 4; 2 and 3 are left."""
    prompt = SimpleNamespace(images=[4, 6], full=[(5, 9), (11, 17)], length=16)
    seen = {"kept": torch.tensor([[3, 1, 4, 6, 9]])}
    given = [Reduction(0, 2, 1, prefix=a, suffix=b) for a, b in ((2, 10), (7, 3), (10, 3))]
    made = placed(given, SimpleNamespace(prompt=prompt), seen, [(2, 6), (7, 13)], 16)
    assert [(r.prefix, r.suffix) for r in made] == [(5, 9), (9, 4), (11, 4)]


@pytest.mark.matrix
def test_two_images_reduced_in_the_tower_and_behind_it(monkeypatch):
    model, inputs = vlm("llava_two")
    tower = tokcompile.optimize(model, kwargs=inputs, method="divprune", budget=Tokens(20), where=[2], outputs="reduced")
    both = tokcompile.optimize(tower, method="random", budget=Tokens(8), where=[layer(tower, 2)], outputs="reduced")
    monkeypatch.setattr("tokcompile.vlm.whole.export", lambda parts, prefill, *_, **__: prefill)  # parts were compared before
    made = both.export_onnx("folder", room=(7, 4, 6))
    assert [(r.prefix, r.n, r.k, r.suffix) for r in made.plan.reductions] == [(7, 20, 4, 30), (31, 20, 4, 6)]


@pytest.mark.matrix
def test_nothing_is_left_behind_where_it_fails(tmp_path):
    parts, prefill = reduced("llava", 6, 10)
    for kind, match, options in (
        (ExportError, "verification failed", dict(tolerance=0.0)),
        (ExportError, "there is no file", dict(tokenizer=tmp_path / "none.json")),
        (InputError, "has to hold {prompt} once, and {image} 1 time", dict(template="{prompt}")),
    ):
        with pytest.raises(kind, match=match):
            export(parts, prefill, tmp_path / "folder", max_new_tokens=8, **options)
    assert os.listdir(tmp_path) == []


def test_broken_folders(written, tmp_path):
    shutil.copytree(written[3], tmp_path / "folder")
    spec = tmp_path / "folder" / "generate.json"
    data = json.loads(spec.read_text())
    (tmp_path / "folder" / "vision.onnx").unlink()
    with pytest.raises(ExportError, match=r"vision\.onnx is missing"):
        load(tmp_path / "folder")
    del data["images"]["prompt"]["spans"]
    spec.write_text(json.dumps(data))
    with pytest.raises(ExportError, match="damaged, or of a language model alone: 'spans' is missing"):
        load(tmp_path / "folder")


@pytest.mark.matrix
@pytest.mark.skipif(tensorrt_rtx.version() is None, reason=f"TensorRT-RTX is not here: {tensorrt_rtx.INSTALL}")
def test_engines_of_all_three(tmp_path):
    """Vision part, prefill and decode step build for TensorRT-RTX, each with its planned counts."""
    parts, prefill = reduced("qwen3_vl", 6, 9)
    made = Generator(parts, prefill, max_new_tokens=6)
    for name, graph in (("vision", parts.optimized), ("prefill", prefill), ("decode", made.text.decode)):
        path = tmp_path / f"{name}.engine"
        report = graph.build_engine(path, backend="tensorrt_rtx", plugins=False)
        assert report.bytes == os.path.getsize(path) > 0
        assert [(t["n"], t["k"]) for t in report.tokens] == [(r.n, r.k) for r in graph.plan.reductions]
        names = {v["name"] for v in report.outputs}
        assert {"vision": {"features", "s0_index"}, "prefill": {"logits"}, "decode": {"logits"}}[name] <= names
