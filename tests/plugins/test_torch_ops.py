"""The PyTorch ops: what they pass to the kernels, what they give back, and where they are used at all.

Every test runs over a stand-in for the library, and over the kernels' own build for the CPU where it can be made.
"""

import logging
from dataclasses import replace

import pytest
import torch

import tokcompile
from tests.conftest import assert_equal
from tests.methods.inputs import sequence
from tests.plugins.host import host_library
from tests.plugins.stand_in import StandIn
from tests.tiny import optimize, tiny
from tokcompile.passes.reduction import ReductionModule
from tokcompile.plugins import torch_ops
from tokcompile.recipe import Keep, Site, get_method

METHODS = ("dart", "topk", "fastv", "fastervlm", "fopru", "pyramiddrop", "evit", "tome", "pitome", "divprune")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
names = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(params=["stand-in", "host"])
def lib(request, monkeypatch):
    """The library that serves CPU tensors."""
    found = StandIn() if request.param == "stand-in" else torch_ops.load(host_library())
    return use(monkeypatch, found)


@pytest.fixture
def stand_in(monkeypatch):
    return use(monkeypatch, StandIn())


def use(monkeypatch, found):
    torch._dynamo.reset()  # compiled functions hold what was available when they were compiled
    monkeypatch.setattr(torch_ops, "library", lambda device: found)
    return found


def reduction(method, n, k, *, prefix=1, unit=1, start=None, tap_start=None, assign=True, block=2, **options):
    recipe = method if isinstance(method, tokcompile.Recipe) else get_method(method)
    site = Site(n, k, prefix, block=block, depth=12, options=recipe.with_options(options))
    module = ReductionModule(recipe, site, unit, recipe.taps_read(), start, tap_start)
    module.needs_assign = assign
    return module


def inputs(module, length, *, batch=2, tap_length=None, seed=0, kind="normal", dtype=torch.float32, d=16):
    """(x, size, *taps) for a reduction: x of `length` rows, taps of as many or `tap_length`."""
    taps = sequence(batch, tap_length or length, seed=seed, kind=kind, dtype=dtype, d=d)
    taps["rotated_k"] = taps["k"]
    x = sequence(batch, length, seed=seed, kind=kind, dtype=dtype, d=d)["x"]
    size = taps["size"][:, : module.site.n] if module.recipe.track_size else None
    return (x, size, *(taps[name] for name in module.names))


def compare(module, given, *, tolerance=None):
    """Runs the op and the reference: indices, sizes and assignments exactly, tokens to the dtype's rounding."""
    got, want = module(*given), module.reference(*given)
    assert torch.equal(got[1], want[1])
    assert [g is None for g in got] == [w is None for w in want]
    assert [(g.shape, g.dtype) for g in got if g is not None] == [(w.shape, w.dtype) for w in want if w is not None]
    for g, w in zip(got[2:], want[2:]):
        assert g is None or torch.equal(g, w)
    error = (got[0].float() - want[0].float()).abs().max() / want[0].float().abs().max()
    assert error <= (tolerance or TOLERANCE[given[0].dtype])
    return got


@names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(12, 7), (63, 32), (130, 66)])
def test_every_kernel_gives_what_the_reference_gives(lib, method, dtype, n, k):
    for kind in ("normal", "ties"):
        module = reduction(method, n, k)
        compare(module, inputs(module, n + 1, dtype=dtype, kind=kind))


@names
def test_the_library_is_what_ran(stand_in, method):
    module = reduction(method, 20, 12)
    module(*inputs(module, 21))
    assert stand_in.calls == [method if method in torch_ops.KERNELS else "topk"]


@names
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tokens_around_the_reduced_ones_are_copied(lib, method, prefix):
    module = reduction(method, 21, 13, prefix=prefix)
    given = inputs(module, prefix + 21 + 3)
    got = compare(module, given)[0]
    assert torch.equal(got[:, :prefix], given[0][:, :prefix])
    assert torch.equal(got[:, -3:], given[0][:, -3:])


@names
def test_groups_of_rows_go_together(lib, method):
    module = reduction(method, 12, 7, unit=4)
    compare(module, inputs(module, 4 * 13))


@names
def test_taps_may_be_longer_than_x(lib, method):
    """Where another span of the same block was reduced before."""
    module = reduction(method, 20, 12, prefix=11, start=5, tap_start=11)
    compare(module, inputs(module, 27, tap_length=33))


def test_tome_counts_even_and_odd_as_the_reference_or_not_at_all(lib):
    module = reduction("tome", 20, 12, prefix=3, start=6, tap_start=11)
    compare(module, inputs(module, 28, tap_length=33))
    assert reduction("tome", 20, 12, prefix=2, start=2, tap_start=11).kernel is None
    assert reduction("tome", 20, 12, prefix=2, start=0, tap_start=0).kernel is None


@names
def test_inputs_need_not_be_contiguous(lib, method):
    module = reduction(method, 33, 20)
    x, size, *taps = inputs(module, 34)
    strided = [torch.stack([t, t * 0 + 7], -1)[..., 0] for t in (x, *taps)]
    assert not any(t.is_contiguous() for t in strided)
    compare(module, (strided[0], size, *strided[1:]))
    compare(module, (x.transpose(0, 1).contiguous().transpose(0, 1), size, *taps))
    odd = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, *taps)]  # four bytes off
    compare(module, (odd[0], size, *odd[1:]))


def test_float32_with_half_taps_is_converted(lib):
    module = reduction("dart", 33, 20)
    x, size, normed, k = inputs(module, 34)
    compare(module, (x, size, normed.half(), k.half()))


def test_sizes_are_optional_for_merging(lib):
    for method in ("tome", "pitome"):
        module = reduction(method, 32, 20)
        x, _, k = inputs(module, 33)
        compare(module, (x, None, k))


def test_assignment_is_given_only_where_needed(lib):
    for method in METHODS:
        module = reduction(method, 32, 20, assign=False)
        assert module(*inputs(module, 33))[3] is None


def test_options_reach_the_kernel(lib):
    for pivots in (1, 3, 40):
        module = reduction("dart", 60, 30, pivots=pivots)
        compare(module, inputs(module, 61))
    for block in (0, 11):
        for variant in ("deit", "mae", "P", "B"):
            module = reduction("pitome", 60, 40, block=block, variant=variant, margin=0.5, alpha=0.3)
            compare(module, inputs(module, 61))
    module = reduction("evit", 60, 30, fuse=False)
    compare(module, inputs(module, 61))


# -- where the ops are used ------------------------------------------------------------------------------------------------


def never(*args):
    raise AssertionError("the library was called")


def with_text(text, unit=1, **options):
    module = reduction("dart", 20, 12, unit=unit, **options)
    site = replace(module.site, start=1, text=text)
    made = ReductionModule(module.recipe, site, unit, module.names)
    made.needs_assign = True
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_pivots_reach_the_kernel(lib, dtype):
    for text_pivots, want in ((4, (4, 21, 25, 26, 30)), (9, (8, 21, 25, 26, 30)), (0, ())):
        module = with_text(((0, 1), (21, 25), (26, 30)), text_pivots=text_pivots)
        assert module.kernel.text == want
        for kind in ("normal", "ties"):
            compare(module, inputs(module, 31, dtype=dtype, kind=kind))


def test_text_before_the_image_lends_no_pivots(lib):
    module = with_text(((0, 1),))
    assert module.kernel.text == ()
    compare(module, inputs(module, 21))


def test_text_that_no_kernel_takes_runs_in_plain_pytorch():
    runs = tuple((21 + 2 * i, 22 + 2 * i) for i in range(torch_ops.SPANS + 1))
    assert with_text(runs[:-1]).kernel is not None
    assert with_text(runs).kernel is None
    assert with_text(runs, text_pivots=0).kernel is not None
    assert with_text(runs[:1], unit=2).kernel is None


def test_fopru_keeps_whole_rows_in_plain_pytorch():
    assert reduction("fopru", 20, 12, strategy="row").kernel is None


def test_other_recipes_run_in_plain_pytorch():
    first = lambda tokens, site: Keep(torch.arange(site.k).expand(tokens.x.shape[0], -1))  # noqa: E731
    assert reduction(replace(get_method("dart"), plan=first), 20, 12).kernel is None
    assert reduction("random", 20, 12).kernel is None
    assert reduction(replace(get_method("dart"), track_size=True), 20, 12).kernel is None
    assert reduction(replace(get_method("dart"), name="mine"), 20, 12).kernel is not None


def test_nothing_to_remove_and_senseless_options_run_in_plain_pytorch():
    assert reduction("tome", 20, 20).kernel is None
    assert reduction("dart", 20, 12, pivots=0).kernel is None
    module = reduction("pitome", 20, 12, variant="none")
    with pytest.raises(tokcompile.MethodError, match="variant"):
        module(*inputs(module, 21))


def test_float64_gradients_and_no_library_run_in_plain_pytorch(stand_in, monkeypatch):
    module = reduction("tome", 20, 12)
    x, size, k = inputs(module, 21)
    module(x.double(), size, k.double())
    new = module(x.requires_grad_(), size, k)[0]
    new.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        monkeypatch.setattr(torch_ops, "library", lambda device: None)
        module(x, size, k)
    assert stand_in.calls == []


def test_a_refused_call_runs_in_plain_pytorch_and_says_so_once(monkeypatch, caplog):
    refusing = use(monkeypatch, StandIn(code=torch_ops.REFUSED))
    torch_ops.note.cache_clear()
    module = reduction("tome", 20, 12)
    with caplog.at_level(logging.WARNING, "tokcompile"):
        for _ in range(2):
            compare(module, inputs(module, 21))
    assert len(refusing.calls) == 2
    assert len(caplog.records) == 1


def test_a_failure_on_the_device_is_an_error(monkeypatch):
    use(monkeypatch, StandIn(code=700))
    module = reduction("tome", 20, 12)
    with pytest.raises(RuntimeError, match=r"tome failed with CUDA error 700 for x \(2, 21, 16\)"):
        module(*inputs(module, 21))


def test_exported_programs_hold_plain_ops_only(stand_in, tmp_path):
    opt = optimize(tiny(), method="tome", budget=0.6)
    assert not stand_in.calls
    with torch.no_grad():
        opt(*opt.example_inputs)
    assert stand_in.calls
    assert "tokcompile" not in str(opt.exported_program.graph)
    torch.export.save(opt.exported_program, tmp_path / "program.pt2")
    assert b"tokcompile::" not in (tmp_path / "program.pt2").read_bytes()


def test_an_optimized_model_says_the_same_with_kernels_as_without(lib, monkeypatch):
    model, args = tiny()
    for method in ("tome", "dart", "divprune", "pitome"):
        opt = optimize((model, args), method=method, budget=0.6)
        with torch.no_grad():
            got = opt(*args)
            with monkeypatch.context() as without:
                without.setattr(torch_ops, "library", lambda device: None)
                want = opt(*args)
        assert torch.allclose(got, want, atol=1e-5)


def test_the_full_budget_stays_bit_exact(stand_in):
    model, args = tiny()
    with torch.no_grad():
        assert_equal(optimize((model, args), method="tome", budget=1.0)(*args), model(*args))
    assert stand_in.calls == []


# -- the ops under torch's own machinery -----------------------------------------------------------------------------------


@names
def test_fake_results_have_the_real_shapes(method):
    for assign in (True, False):
        module = reduction(method, 20, 12, unit=2, assign=assign)
        given = inputs(module, 46)
        use = module.kernel
        op = getattr(torch.ops.tokcompile, use.name)
        real = op(given[0], given[1], list(given[2:]), use.place, use.numbers, use.text, assign)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [None if t is None else mode.from_tensor(t) for t in given]
            shaped = op(fake[0], fake[1], fake[2:], use.place, use.numbers, use.text, assign)
        about = [[(t.shape, t.dtype, t.stride()) for t in some] for some in (real, shaped)]
        assert about[0] == about[1]


@names
def test_opcheck(lib, method):
    module = reduction(method, 20, 12)
    x, size, *taps = inputs(module, 21)
    use = module.kernel
    op = getattr(torch.ops.tokcompile, use.name)
    torch.library.opcheck(op, (x, size, taps, use.place, use.numbers, use.text, True))
    torch.library.opcheck(op, (x, size, taps, use.place, use.numbers, use.text, False))


@names
def test_the_op_is_one_node_of_a_compiled_graph(stand_in, method):
    module = reduction(method, 20, 12)
    given = inputs(module, 21)
    graphs = []
    compiled = torch.compile(module, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True, dynamic=False)
    got = compiled(*given)
    targets = [str(n.target) for n in graphs[0].graph.nodes if "tokcompile" in str(n.target)]
    assert targets == [f"tokcompile.{module.kernel.name}.default"]
    assert_equal([g for g in got if g is not None], [w for w in module.reference(*given) if w is not None])


@pytest.mark.slow
def test_inductor_compiles_an_optimized_model_around_the_op(stand_in):
    opt = optimize(tiny(), method="tome", budget=0.6)
    with torch.no_grad():
        want = opt(*opt.example_inputs)
        stand_in.calls.clear()
        got = torch.compile(opt.graph_module, fullgraph=True, dynamic=False)(*opt.example_inputs)[0]
    assert stand_in.calls
    assert torch.allclose(got, want, atol=1e-5)


def test_inference_mode(stand_in):
    module = reduction("tome", 20, 12)
    with torch.inference_mode():
        compare(module, inputs(module, 21))
    assert stand_in.calls == ["tome"]
