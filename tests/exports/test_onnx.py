"""What export_onnx writes: numbers, one node per reduction, static shapes, names, metadata, files."""

import json
import os

import onnx
import pytest
import torch
from torch.utils import _pytree as pytree

import tokcompile
from tests.conftest import build
from tests.exports.models import DYNAMIC, all_nodes, attributes, encoder, reductions, run, same, session, tiny
from tokcompile.exports import host
from tokcompile.plugins.contract import ATTRIBUTES, INPUTS, OUTPUTS, op_type

CASES = [
    ("timm/vit", "tome", 2, [0, 1]),
    ("hf/vit", "evit", 2, None),
    ("hf/dinov2", "pitome", 1, [0, 2]),
    ("hf/siglip_vision", "dart", 1, None),
    ("torch/encoder_sequence_first", "random", 2, None),
    ("timm/vit_features", "topk", 1, None),  # dense: tokens are given back
    ("hf/dpt", "tome", 1, [0, 2]),  # dense, and after merging
]


@pytest.mark.every(3)
@pytest.mark.parametrize(("family", "method", "batch", "where"), CASES)
def test_families(family, method, batch, where, tmp_path):
    model, args, kwargs = build(family, batch)
    opt = tokcompile.optimize(model, args, kwargs, method=method, budget=0.6, where=where)
    path = tmp_path / "model.onnx"
    report = opt.export_onnx(path)
    assert 0 < report.error <= 1e-4
    written = onnx.load(path)
    check_nodes(written, opt)
    check_static(written, opt)
    assert [i.name for i in written.graph.input] == report.inputs == opt.input_names
    torch.manual_seed(1)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: torch.randn_like(t), (args, kwargs))
    values = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    with torch.no_grad():
        want = [v for v in pytree.tree_leaves(opt(*args, **kwargs)) if isinstance(v, torch.Tensor)]
    assert same(run(path, dict(zip(report.inputs, values, strict=True))), want)


def check_nodes(written: onnx.ModelProto, opt: tokcompile.OptimizedModel) -> None:
    """One node a reduction, as the contract has it, each with its function."""
    nodes = reductions(written)
    assert len(nodes) == len(opt.plan.reductions) > 0
    functions = {f.name: f for f in written.functions}
    for node, reduction in zip(nodes, opt.plan.reductions, strict=True):
        given = attributes(node)
        assert node.op_type.split("_")[0] == op_type(opt.plan.method)
        assert {name: type(given[name]) for name in ATTRIBUTES} == dict(ATTRIBUTES)
        assert (given["n"], given["k"], given["unit"]) == (reduction.n, reduction.k, reduction.unit)
        inputs, outputs = given["inputs"].split(","), given["outputs"].split(",")
        assert len(inputs) == len(node.input)
        assert len(outputs) == len(node.output)
        assert set(inputs) <= set(INPUTS)
        assert set(outputs) <= set(OUTPUTS)
        assert set(functions[node.op_type].attribute) == set(given)


def check_static(written: onnx.ModelProto, opt: tokcompile.OptimizedModel) -> None:
    """No control flow, no data-dependent shapes, and numbers for all dimensions."""
    assert not {node.op_type for node in all_nodes(written)} & DYNAMIC
    for value in [*written.graph.input, *written.graph.output]:
        assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    assert written.producer_name == "tokcompile"
    # a weight's shape is said by its data alone: quantize_dynamic transposes weights
    assert not {v.name for v in written.graph.value_info} & {v.name for v in written.graph.initializer}


def test_torch_exports_it_too(tmp_path):
    opt = tiny(where=1)
    torch.onnx.export(opt, tuple(opt.example_inputs), tmp_path / "m.onnx", dynamo=True, verbose=False)
    x = torch.randn_like(opt.example_inputs[0])
    with torch.no_grad():
        assert same(run(tmp_path / "m.onnx", {session(tmp_path / "m.onnx").get_inputs()[0].name: x}), [opt(x)])


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["tome", "dart"])
def test_a_batch_of_one_is_left_out_of_calls_for_onnxruntime(method, tmp_path):
    """Nothing is reshaped before and after a call; several samples, and other runtimes, see the batch."""
    ranks = {}
    for batch, target in ((1, "onnxruntime"), (2, "onnxruntime"), (1, "tensorrt")):
        model, (x,) = encoder(torch.float32)
        opt = tokcompile.optimize(model, (x.repeat(batch, 1, 1),), method=method, budget=0.6, where=[1])
        report = opt.export_onnx(tmp_path / "m.onnx", target=target)
        graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx")).graph
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
        makers = {name: node for node in graph.node for name in node.output}
        called = reductions(onnx.load(tmp_path / "m.onnx"))
        ranks[batch, target] = {len(shapes[node.output[0]]) for node in called}
        assert [row["shape"] for row in report.reductions] == [shapes[node.output[0]] for node in called]
        if target == "onnxruntime" and batch == 1:
            assert all(makers[node.input[0]].op_type == "Add" for node in called)  # the residual add itself
    assert ranks == {(1, "onnxruntime"): {2}, (2, "onnxruntime"): {3}, (1, "tensorrt"): {3}}


@pytest.mark.matrix
def test_two_reductions_may_read_the_same_value(tmp_path):
    """Two images in one sequence: in each block their reductions read the same keys and sizes."""
    model, args, kwargs = build("hf/qwen2_vl_vision", 2)
    opt = tokcompile.optimize(model, args, kwargs, method="tome", budget=0.6, where=[0, 1])
    report = opt.export_onnx(tmp_path / "m.onnx")
    called = reductions(onnx.load(tmp_path / "m.onnx"))
    assert len(called) == len(report.reductions) == 2 * len({row["block"] for row in report.reductions})


def copied_weights(opt, monkeypatch):
    """The model on "the CPU", where what is here counts as elsewhere."""
    monkeypatch.setattr(host, "elsewhere", lambda device: True)
    return host.on_cpu(opt)


def test_a_model_elsewhere_is_copied_and_stays_where_it_is(tmp_path, monkeypatch):
    opt = tiny(method="grid")
    assert host.on_cpu(opt) is opt
    weights, graph = dict(opt.named_parameters()), opt.graph_module
    copied = copied_weights(opt, monkeypatch)
    assert copied is not opt
    assert opt.graph_module is graph
    assert all(weights[name] is value for name, value in opt.named_parameters())
    assert [name for name, _ in copied.named_parameters()] == list(weights)
    assert not {id(value) for value in copied.parameters()} & {id(value) for value in weights.values()}
    assert all(torch.equal(value, weights[name]) for name, value in copied.named_parameters())
    assert torch.equal(copied(*opt.example_inputs), opt(*opt.example_inputs))
    assert opt.export_onnx(tmp_path / "m.onnx").errors


def test_devices_that_nodes_name_become_the_cpu(monkeypatch):
    opt = tiny()
    graph = opt.graph_module.graph
    with graph.inserting_before(graph.output_node()):
        there = graph.call_function(torch.ops.aten.arange.default, (3,), {"device": torch.device("meta")})
    monkeypatch.setattr(host, "elsewhere", lambda device: device.type == "meta")
    copied = host.on_cpu(opt)
    assert [str(device) for device in host.named(copied.graph_module)].count("cpu") >= 1
    assert there.kwargs["device"].type == "meta"
    assert "meta" not in {device.type for device in host.named(copied.graph_module)}


def test_later_nodes_of_a_method_share_one_function_with_constants_as_attributes(tmp_path):
    opt = tiny(method="tome", where=[0, 1], budget=tokcompile.Remove(8))
    report = opt.export_onnx(tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx")
    assert report.nodes == {"Tome": 2}
    assert [f.name for f in written.functions] == ["Tome"]
    first, second = (attributes(node) for node in reductions(written))
    assert (first["n"], first["k"], second["n"], second["k"]) == (50, 42, 42, 34)
    assert any(name.startswith("c") and name[1:].isdigit() for name in first)


def test_bodies_that_differ_in_their_ops_get_a_second_function(tmp_path):
    report = tiny(method="tome", budget=tokcompile.Schedule({0: 40, 1: 20})).export_onnx(tmp_path / "m.onnx")
    assert report.nodes == {"Tome": 1, "Tome_2": 1}
    assert report.error <= 1e-4


def test_inline_writes_plain_ops(tmp_path):
    report = tiny(method="pitome").export_onnx(tmp_path / "m.onnx", inline=True)
    written = onnx.load(tmp_path / "m.onnx")
    assert report.inline
    assert report.error <= 1e-4
    assert not written.functions
    assert {node.domain for node in written.graph.node} == {""}
    assert [o.domain for o in written.opset_import] == [""]


def test_inline_writes_nothing_that_is_not_read(tmp_path):
    """No node reads the constant indices of a reduction in front of a mean."""

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean(1)

    model, (x,) = encoder(torch.float32)
    opt = tokcompile.optimize(torch.nn.Sequential(model, Mean()).eval(), (torch.cat([x, x]),), method="grid", where=[0])
    opt.export_onnx(tmp_path / "m.onnx", inline=True)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert {i.name for i in graph.initializer} <= {name for node in graph.node for name in node.input}


@pytest.mark.parametrize(("method", "opset"), [("tome", 18), ("dart", 22)])
def test_tensorrt_ops(method, opset, tmp_path):
    report = tiny(method=method).export_onnx(tmp_path / "m.onnx", target="tensorrt", opset=opset)
    assert report.opset == opset == onnx.load(tmp_path / "m.onnx").opset_import[0].version
    scatters = [n for n in all_nodes(onnx.load(tmp_path / "m.onnx")) if n.op_type.startswith("Scatter")]
    assert report.error <= 1e-4
    assert all(attributes(n).get("reduction", "none") == "none" for n in scatters)


def test_reduced_outputs_carry_the_kept_tokens(tmp_path):
    opt = tiny(method="tome", outputs="reduced")
    report = opt.export_onnx(tmp_path / "m.onnx")
    assert report.outputs == opt.output_names
    assert report.outputs[1:] == opt.extra_outputs
    with torch.no_grad():
        want = opt(*opt.example_inputs)
    got = run(tmp_path / "m.onnx", dict(zip(report.inputs, opt.example_inputs, strict=True)))
    assert torch.equal(got[1], want.kept[report.outputs[1]])


def test_keys_of_a_model_output_are_its_names(tmp_path):
    model, args, kwargs = build("hf/vit_hidden_states", 1)
    opt = tokcompile.optimize(model, args, kwargs, method="grid", budget=0.5)
    report = opt.export_onnx(tmp_path / "m.onnx")
    hidden = [f"hidden_states_{i}" for i in range(5)]
    assert report.outputs == ["last_hidden_state", "pooler_output", *hidden]
    assert [o.name for o in session(tmp_path / "m.onnx").get_outputs()] == report.outputs


def test_metadata_says_how_to_make_it_again(tmp_path):
    opt = tiny(method="random", budget=0.5)
    opt.export_onnx(tmp_path / "m.onnx")
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert metadata["tokcompile.method"] == "random"
    assert metadata["tokcompile.target"] == "onnxruntime"
    assert tokcompile.Plan.from_json(metadata["tokcompile.plan"]) == opt.plan
    assert json.loads(metadata["tokcompile.budget"]) == {"kind": "Share", "share": 0.5}
    assert metadata["torch.version"] == torch.__version__


def test_weights_beside_the_model(tmp_path, monkeypatch):
    """Where one file would not hold them."""
    monkeypatch.setattr("tokcompile.exports.onnx.LARGEST_FILE", 10_000)
    opt = tiny(method="random")
    report = opt.export_onnx(tmp_path / "m.onnx")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert report.external_data == str(tmp_path / "m.onnx.data")
    assert report.bytes == sum(os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path))
    (tmp_path / "moved").mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    with torch.no_grad():
        want = [opt(*opt.example_inputs)]
    assert same(run(tmp_path / "moved" / "m.onnx", dict(zip(report.inputs, opt.example_inputs, strict=True))), want)


def test_without_reductions(tmp_path):
    report = tiny(budget=1.0).export_onnx(tmp_path / "m.onnx")
    assert report.nodes == {}
    assert report.error <= 1e-4
    assert [o.domain for o in onnx.load(tmp_path / "m.onnx").opset_import] == [""]


def test_half_precision(tmp_path):
    report = tiny(torch.float16, method="tome").export_onnx(tmp_path / "m.onnx")
    assert report.tolerance == 2e-2
    assert report.error <= report.tolerance
    assert session(tmp_path / "m.onnx").get_inputs()[0].type == "tensor(float16)"


def test_bfloat16_is_written_and_the_report_says_that_it_was_not_run(tmp_path):
    report = tiny(torch.bfloat16, method="random").export_onnx(tmp_path / "m.onnx")
    assert report.error is None
    assert "bfloat16" in report.note
    assert (tmp_path / "m.onnx").exists()


def test_bfloat16_inside_is_refused_with_a_way_out(tmp_path):
    """As rotary tables in bfloat16, which the original code of DINOv3 has by default."""

    class Inside(torch.nn.Module):
        def forward(self, x):
            return x + (x.bfloat16() * x.bfloat16()).float()

    model, args = encoder(torch.float32)
    opt = tokcompile.optimize(torch.nn.Sequential(model, Inside()).eval(), args, method="random", budget=0.5)
    with pytest.raises(tokcompile.ExportError, match=r"does not run the exported model.*\n.*verify=False"):
        opt.export_onnx(tmp_path / "m.onnx")
    assert opt.export_onnx(tmp_path / "m.onnx", verify=False).error is None


def test_bfloat16_that_a_newer_opset_takes(tmp_path):
    class Patches(torch.nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).transpose(1, 2))

    model, _ = encoder(torch.bfloat16)
    model, image = Patches(torch.nn.Conv1d(3, 32, 2, 2).bfloat16(), model).eval(), torch.randn(1, 3, 100).bfloat16()
    opt = tokcompile.optimize(model, (image,), method="random", where=[0])
    with pytest.raises(tokcompile.ExportError, match=r"bfloat16[\s\S]*what to do: opset=22"):
        opt.export_onnx(tmp_path / "m.onnx")
    assert "bfloat16" in opt.export_onnx(tmp_path / "m.onnx", opset=22).note


def test_an_addition_at_all_positions_is_an_addition(tmp_path):
    """NaFlexViT adds its position embedding by index_add_, on a view."""
    model, args, kwargs = build("timm/naflexvit_masked", 1)
    opt = tokcompile.optimize(model, args, kwargs, method="random", budget=0.6)
    assert max(opt.export_onnx(tmp_path / "m.onnx").errors.values()) <= 1e-4


def test_what_padding_computes_is_what_it_is_in_torch(tmp_path):
    model, args, kwargs = build("hf/llama_padded", 1)
    opt = tokcompile.optimize(model, args, kwargs, budget=1.0, spans=[(5, 30)])
    assert max(opt.export_onnx(tmp_path / "m.onnx").errors.values()) <= 1e-4


def test_complex_rotary_tables(tmp_path):
    model, args, kwargs = build("hf/llama4_vision", 2)
    opt = tokcompile.optimize(model, args, kwargs, method="tome", budget=0.6, where=[1])
    assert max(opt.export_onnx(tmp_path / "m.onnx").errors.values()) <= 1e-4
