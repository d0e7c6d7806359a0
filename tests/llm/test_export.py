"""The folder of files: what generates from it in ONNX Runtime, what is in it, and what happens to a broken one."""

import copy
import json
import os

import numpy as np
import onnx
import pytest
import torch

import tokcompile
from tests.conftest import error
from tests.exports.models import DYNAMIC, all_nodes
from tests.shared import shared
from tokcompile import ExportError, InputError
from tokcompile.cli import main
from tokcompile.llm import Generator, Prefill, export, load, short_text
from tokcompile.llm.layout import layout
from tokcompile.llm.modules import Decode

COUNT = 32


@pytest.fixture(scope="module")
def written(tmp_path_factory, generator):
    """(model, inputs, generator, folder, report): a sliding window, so that kept indices go from graph to graph; in the last
    layer no visual token is left."""
    model, inputs, made = generator("hf/mistral", schedule=((2, 11), (3, 0)))
    folder = tmp_path_factory.mktemp("llm") / "folder"
    return model, inputs, made, folder, export(made.prefill, model, folder, max_new_tokens=COUNT)


def test_generates_what_torch_generates(written):
    _, inputs, made, folder, report = written
    want = made(**inputs, eos=(), keep_logits=True)
    got = load(folder, threads=1)(**inputs, eos=(), keep_logits=True)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert error(got.logits, want.logits) < 1e-4
    assert report.steps == 4
    assert 0 < report.error < 1e-4
    assert {name: off < 1e-4 for name, off in report.errors.items()} == {"prefill": True, "decode": True}


def test_files_and_their_wiring(written):
    _, _, _, folder, report = written
    assert sorted(os.listdir(folder)) == ["decode.onnx", "embeddings.npy", "generate.json", "prefill.onnx"]
    assert report.bytes == sum(os.path.getsize(folder / name) for name in os.listdir(folder))
    data = json.loads((folder / "generate.json").read_text())
    graphs = {name: onnx.load(folder / data[name]).graph for name in ("prefill", "decode")}
    names = {name: ({v.name for v in g.input}, {v.name for v in g.output}) for name, g in graphs.items()}
    for wire in data["caches"]:
        assert wire["from"] in names["prefill"][1]
        assert wire["into"] in names["decode"][0]
        assert wire["out"] in names["decode"][1]
    assert data["kept"] == [{"from": "s0_index", "into": "kept_s0_index"}]
    assert data["next_position"] == 40
    assert data["spans"] == [[5, 30]]
    stages = [(s["first"], s["last"], s["length"], s["capacity"]) for s in data["stages"]]
    assert stages == [(0, 1, 40, 72), (2, 2, 26, 58), (3, 3, 15, 47)]
    assert [[cut["index"] for cut in s["cuts"]] for s in data["stages"]] == [[], ["s0_index"], [None]]
    values = (v.type.tensor_type.shape.dim for g in graphs.values() for v in [*g.input, *g.output, *g.value_info])
    assert all(d.dim_value for dims in values for d in dims)
    assert data["eos"] == [63]
    assert data["plan"]["reductions"][0]["k"] == 11


def test_the_decode_graph_is_static_and_scatters_without_reduction(written):
    model = onnx.load(written[3] / "decode.onnx")
    assert not {node.op_type for node in all_nodes(model)} & DYNAMIC
    for value in [*model.graph.input, *model.graph.output]:
        assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    scatters = [node for node in all_nodes(model) if node.op_type.startswith("Scatter")]
    assert len(scatters) == 8
    assert all(a.s in (b"", b"none") for node in scatters for a in node.attribute if a.name == "reduction")


@pytest.mark.parametrize("name", ["hf/gemma", "hf/llama"])
def test_the_embedding_table_is_what_the_decoder_sees(name, generator, tmp_path):
    """Gemma scales inside of its embedding module."""
    from tokcompile.llm.export import write_embeddings

    model = generator(name)[0]
    write_embeddings(model, str(tmp_path / "e.npy"))
    table = torch.from_numpy(np.load(tmp_path / "e.npy"))
    with torch.no_grad():
        assert torch.equal(table, model.get_input_embeddings()(torch.arange(64)))


def test_command_line(written, tmp_path, capsys):
    model, inputs, made, folder, _ = written
    np.save(tmp_path / "prompt.npy", inputs["inputs_embeds"][0].numpy())
    given = ["generate", str(folder), "--ignore-eos", "--json", "--max-new-tokens", "6"]
    assert main([*given, "--prompt-embeds", str(tmp_path / "prompt.npy")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tokens"] == made(**inputs, eos=(), max_new_tokens=6).tokens.tolist()
    assert data["time_to_first_token_ms"] > 0
    assert data["tokens_per_second"] > 0
    assert data["cached_tokens"] == {"0-1": 40, "2-2": 26, "3-3": 15}
    ids = [(7 * i) % 60 for i in range(40)]
    assert main([*given, "--ids", ",".join(map(str, ids))]) == 0
    data = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
    assert data["tokens"] == made(inputs_embeds=embeds, eos=(), max_new_tokens=6).tokens.tolist()
    assert main(["generate", str(folder), "--ids", ",".join(map(str, ids))]) == 0
    assert "time to first token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "1,2,3"], "the prompt has 3 tokens, and "),
        (["--ids", "1,x"], "not a list of token ids"),
        (["--ids", ",".join(["99"] * 40)], "the id 99 is not among the 64 of the vocabulary"),
        (["--ids", ",".join(["1"] * 40), "--max-new-tokens", "33"], "take 1 to 32 tokens"),
        (["--prompt-embeds", "missing.npy"], "cannot read the embeddings"),
    ],
)
def test_command_line_refuses(arguments, message, written, capsys):
    assert main(["generate", str(written[3]), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_left_behind_where_it_fails(generator, tmp_path):
    model, _, made = generator("hf/mistral")
    with pytest.raises(ExportError, match="verification failed"):
        export(made.prefill, model, tmp_path / "folder", max_new_tokens=COUNT, tolerance=0.0)
    assert os.listdir(tmp_path) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="is there already"):
        export(made.prefill, model, tmp_path / "folder", max_new_tokens=COUNT)


def test_broken_folders(written, tmp_path):
    with pytest.raises(ExportError, match=r"give a folder that tokcompile\.llm\.export or tokcompile\.vlm\.export wrote"):
        load(tmp_path)
    spec = (written[3] / "generate.json").read_text()
    (tmp_path / "generate.json").write_text(spec[:200])
    with pytest.raises(ExportError, match="is damaged"):
        load(tmp_path)
    (tmp_path / "generate.json").write_text(json.dumps({**json.loads(spec), "format": 7}))
    with pytest.raises(ExportError, match="format 7"):
        load(tmp_path)
    (tmp_path / "generate.json").write_text(spec)
    with pytest.raises(ExportError, match=r"prefill\.onnx is missing"):
        load(tmp_path)
    (tmp_path / "prefill.onnx").write_bytes(b"no graph")
    for name in ("decode.onnx", "embeddings.npy"):
        (tmp_path / name).write_bytes((written[3] / name).read_bytes())
    with pytest.raises(ExportError, match="onnxruntime does not load"):
        load(tmp_path)


def test_prompts_by_number_are_looked_up(written):
    folder = load(written[3])
    assert folder.prompt([3] * 40)["inputs_embeds"].shape == (1, 40, 48)
    with pytest.raises(InputError, match="vocabulary"):
        folder.prompt([-1])


def test_text_through_the_tokenizer_of_the_folder(generator, tmp_path, capsys):
    """Shorter texts are padded on the left, as the example is: the model's own generation from the text alone."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(64)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])
    made.save(str(tmp_path / "t.json"))
    model, inputs, _ = generator("hf/llama")
    inputs = {**inputs, "attention_mask": (torch.arange(40)[None] > 2).long()}
    prefill = tokcompile.optimize(Prefill(model), kwargs=inputs, method="random", budget=1.0, spans=[(5, 30)])
    folder = tmp_path / "folder"
    export(prefill, model, folder, max_new_tokens=6, tokenizer=tmp_path / "t.json")
    ids = [3, 14, 15, 9, 2]
    text = " ".join(f"w{i}" for i in ids)
    assert main(["generate", str(folder), "--prompt", text, "--ignore-eos", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        want = model.generate(torch.tensor([[1, *ids]]), max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert data["tokens"] == want[:, 6:].tolist()
    assert data["text"] == [" ".join(f"w{i}" for i in data["tokens"][0])]
    assert main(["generate", str(folder), "--prompt", " ".join(["w2"] * 40)]) == 2
    assert "the prompt has 41 tokens, and " in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompt", "w2", "--image", "a.png"]) == 2
    assert "takes no images: leave --image out" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert main(["generate", str(folder), "--prompt", text]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    with pytest.raises(ExportError, match="tokenizer is the path of the model's"):
        export(prefill, model, tmp_path / "other", max_new_tokens=6, tokenizer=tmp_path / "none.json")


def half(generator, dtype):
    model, inputs, _ = generator("hf/llama")
    model, inputs = shared(copy.deepcopy(model).to(dtype)), {"inputs_embeds": inputs["inputs_embeds"].to(dtype)}
    reduced = dict(method="dart", budget=tokcompile.Tokens(11), spans=[(5, 30)], outputs="reduced")
    return model, inputs, tokcompile.optimize(Prefill(model), kwargs=inputs, **reduced)


@pytest.mark.matrix
def test_half_precision(generator, tmp_path):
    """In fp16 the files give the tokens of fp16 and of fp32 in PyTorch, and logits within 2 % of the largest."""
    model, inputs, prefill = half(generator, torch.float16)
    report = export(prefill, model, tmp_path / "folder", max_new_tokens=16)
    assert 1e-4 < report.error < 2e-2  # it was computed in half precision
    got = load(tmp_path / "folder", threads=1)(**inputs, eos=(), keep_logits=True)
    _, full, made = generator("hf/llama")
    for want in (
        Generator(prefill, model, max_new_tokens=16)(**inputs, eos=(), keep_logits=True),
        made(**full, eos=(), max_new_tokens=16, keep_logits=True),
    ):
        assert got.tokens.tolist() == want.tokens.tolist()
        assert error([one.float() for one in got.logits], [one.float() for one in want.logits]) < 2e-2


@pytest.mark.matrix
def test_bfloat16_is_refused_unless_nothing_is_to_run(generator, tmp_path, monkeypatch):
    model, _, prefill = half(generator, torch.bfloat16)
    with pytest.raises(ExportError, match=r"model.half\(\) or model.float\(\) before it is optimized; or verify_tokens=0"):
        export(prefill, model, tmp_path / "folder", max_new_tokens=4)
    assert not (tmp_path / "folder").exists()
    report = export(prefill, model, tmp_path / "folder", max_new_tokens=4, verify_tokens=0)
    assert "not verified" in str(report)
    for off in (1, 4):  # of five texts that are decoded as a check, so many give other logits: one may do so by rounding
        close = iter([True, False] * off)
        monkeypatch.setattr(short_text, "close", lambda *args, close=close: next(close, True))
        assert short_text.decodes(Decode, model, layout(prefill, 4)) is (off == 1)
