"""An optimized model saved, loaded, exported, copied and used like any other module."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import assert_equal, run
from tests.models import FAMILIES
from tests.tiny import WIDTH, tiny
from tokcompile import Recipe, Tokens
from tokcompile.recipe import methods as known_methods

RECIPES = known_methods()
METHODS = sorted(RECIPES)
PATCHES = 49
DATA_DEPENDENT = ("nonzero", "_local_scalar", "aten.item", "masked_select", "unique", "_assert_scalar", "_assert_async")


# -- saving, copying, exporting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("tome", {"outputs": "reduced"}), ("random", {"seed": 3}),
                                                 ("evit", {"fuse": False}), ("tome", {"size_weighted_mean": False})],
                         ids=["reduced", "seed", "fuse", "mean"])  # fmt: skip
def test_save_and_load(method, options, family, program, tmp_path):
    args = family("timm/vit_gap").args
    optimized = tokcompile.optimize(program("timm/vit_gap"), method=method, budget=0.6, **options)
    optimized.save(tmp_path / "model.pt2")
    loaded = tokcompile.load(tmp_path / "model.pt2")
    assert loaded.plan == optimized.plan
    assert_equal(run(loaded, *args), run(optimized, *args))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_what_torch_cannot_write(program, tmp_path, monkeypatch):
    def save(program, path, **options):
        Path(path).write_bytes(b"half")
        raise RuntimeError("unsupported node")

    monkeypatch.setattr(torch.export, "save", save)
    with pytest.raises(tokcompile.ExportError, match=r"unsupported node\n  what to do: try a newer torch"):
        tokcompile.optimize(program("timm/vit"), method="random").save(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_load_needs_the_registered_recipe(family, program, tmp_path):
    loud = Recipe(
        "loudest",
        lambda tokens, site: tokcompile.Keep(tokcompile.primitives.top_k(tokens.x.norm(dim=-1), site.k), ordered=False),
        steps=tokcompile.steps.once(0.5),
    )
    optimized = tokcompile.optimize(program("timm/vit"), method=loud)
    optimized.save(tmp_path / "loud.pt2")
    with pytest.raises(tokcompile.MethodError, match=r"uses the method 'loudest'.*register it before loading"):
        tokcompile.load(tmp_path / "loud.pt2")
    tokcompile.register_method(loud)
    try:
        args = family("timm/vit").args
        assert_equal(run(tokcompile.load(tmp_path / "loud.pt2"), *args), run(optimized, *args))
    finally:
        tokcompile.recipe._REGISTRY.pop("loudest")


@pytest.mark.every(3)
@pytest.mark.parametrize(("name", "method"), [("timm/vit", "tome"), ("timm/vit", "divprune"), ("timm/vit", "dart"),
                                              ("timm/vit", "evit"), ("hf/vit", "pitome"), ("timm/beit", "topk"),
                                              ("torchvision/vit", "random")])  # fmt: skip
def test_the_exported_program_equals_the_model(name, method, family, program):
    _, args, kwargs = family(name, 3)
    optimized = tokcompile.optimize(program(name, 3), method=method, budget=Tokens(30))
    exported = optimized.exported_program
    assert_equal(run(exported.module(), *args, **kwargs), run(optimized, *args, **kwargs))
    ops = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert not [op for op in ops if any(word in op for word in DATA_DEPENDENT)]
    assert all(isinstance(size, int) for n in exported.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)
               for size in v.shape)  # fmt: skip
    assert exported is optimized.exported_program


def test_a_copy_is_independent(family, program):
    args = family("timm/vit").args
    optimized = tokcompile.optimize(program("timm/vit"), budget=0.6)
    want = run(optimized, *args)
    other = copy.deepcopy(optimized)
    assert_equal(run(other, *args), want)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in optimized.parameters()}
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_equal(run(optimized, *args), want)


def test_a_pickle_is_the_same_model(family, program):
    args = family("timm/vit").args
    optimized = tokcompile.optimize(program("timm/vit"), budget=0.6)
    other = pickle.loads(pickle.dumps(optimized))
    assert other.plan == optimized.plan
    assert_equal(run(other, *args), run(optimized, *args))


@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_weights_are_shared_with_the_model(budget):
    model, args, _ = FAMILIES["timm/vit"].build(1)
    optimized = tokcompile.optimize(model, args, budget=budget)
    mine = {p.data_ptr() for p in optimized.graph_module.parameters()}
    assert mine <= {p.data_ptr() for p in model.parameters()}
    before = run(optimized, *args)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    torch.testing.assert_close(run(optimized, *args), before + 1.0, rtol=0, atol=1e-6)


class Scale(nn.Module):
    """As in Gemma's norms: 1 + weight is folded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return x * (1.0 + self.weight)


def test_weights_that_constants_were_computed_from_may_not_change(tmp_path):
    model, args = tiny(Scale())
    optimized, whole = (tokcompile.optimize(model, args, method="random", budget=budget) for budget in (0.5, 1.0))
    copied = copy.deepcopy(optimized)
    run(optimized, *args)
    model.blocks[1].between.weight.data[0] = 1.0  # of which no version tells
    with pytest.raises(tokcompile.InputError, match=r"blocks.1.between.weight changed after the model was optimized"):
        run(optimized, *args)
    model.blocks[1].between.weight.data[0] = 0.0
    run(optimized, *args)
    model.load_state_dict({name: weight + 1 for name, weight in model.state_dict().items()})
    for call in (lambda: run(optimized, *args), lambda: run(copy.deepcopy(optimized), *args),
                 lambda: optimized.exported_program, lambda: optimized.export_onnx(tmp_path / "m.onnx"),
                 lambda: tokcompile.optimize(optimized)):  # fmt: skip
        with pytest.raises(tokcompile.InputError, match=r"blocks.1.between.weight changed after the model was optimized"):
            call()
    assert torch.equal(run(whole, *args), run(model, *args))
    run(copied, *args)  # has weights of its own


def test_the_given_model_and_program_are_not_changed(family):
    args = family("timm/vit").args
    model = copy.deepcopy(family("timm/vit").model)  # traced by itself
    program = torch.export.export(model, args, strict=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    code = str(program.graph)
    for given, inputs in ((model, args), (program, None)):
        tokcompile.optimize(given, inputs, budget=0.6)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    assert str(program.graph) == code


@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_it_stays_in_eval_mode(budget, program, family):
    optimized = tokcompile.optimize(program("timm/vit"), budget=budget)
    assert not optimized.training
    assert optimized.eval() is optimized
    assert not any(m.training for m in optimized.modules())
    with pytest.raises(tokcompile.InputError, match="train the original and optimize it again"):
        optimized.train()
    assert not run(optimized, *family("timm/vit").args).requires_grad


def test_it_fits_into_a_larger_module(family, program):
    args = family("timm/vit").args
    optimized = tokcompile.optimize(program("timm/vit"), budget=0.6)
    whole = nn.Sequential(optimized, nn.Softmax(-1))
    assert torch.equal(run(whole, *args), run(optimized, *args).softmax(-1))
