"""What is traced computes what the model computes."""

import pytest
import torch
from torch import nn

import tokcompile
from tokcompile import TraceError, UnsupportedGraph, compiler
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.graph import propagate_shapes

LENGTH, WIDTH = 12, 16


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=True)
        self.tower = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.tower(self.seen(x))

    def seen(self, x):
        return x


class Otherwise(Tower):
    """As some do that choose a mask by whether they are traced; no comparison with the traced form could see it."""

    def seen(self, x):
        return x.flip(-1) if torch.compiler.is_exporting() else x


class Drawn(Tower):
    """Gives something else at every call."""

    def seen(self, x):
        return x + torch.rand_like(x)


class Leaving(Tower):
    """Leaves a tensor on itself, as rotary tables that grow do."""

    def seen(self, x):
        self.last = x + 1
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_way_while_exported_is_refused(dtype):
    x = torch.randn(1, LENGTH, WIDTH, dtype=dtype)
    for call in (tokcompile.optimize, tokcompile.check):
        with pytest.raises(TraceError, match=r"off by \S+ of the largest entry(.|\n)*while it is exported(.|\n)*what to do"):
            call(Otherwise().eval().to(dtype), (x,))
    tokcompile.optimize(Tower().eval().to(dtype), (x,))


def test_a_form_that_gives_something_else_is_refused(monkeypatch):
    def wrongly(gm, inputs):
        """The passes of today, and one that loses the order of the tokens."""
        gm = canonicalise(gm, inputs)
        x = next(iter(gm.graph.nodes))
        with gm.graph.inserting_after(x):
            turned = gm.graph.call_function(torch.ops.aten.flip.default, (x, [1]))
        x.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
        gm.recompile()
        propagate_shapes(gm, inputs)
        return gm

    monkeypatch.setattr(compiler, "canonicalise", wrongly)
    x = torch.randn(1, LENGTH, WIDTH)
    for model, given in ((Tower().eval(), (x,)), (torch.export.export(Tower().eval(), (x,)), None)):
        with pytest.raises(UnsupportedGraph, match=r"off by \S+ of the largest entry(.|\n)*what to do: report it"):
            tokcompile.optimize(model, given, method="random")


def test_what_cannot_be_compared():
    x = torch.randn(1, LENGTH, WIDTH)
    with pytest.raises(UnsupportedGraph, match="draws random numbers"):
        tokcompile.optimize(Drawn().eval(), (x,), method="random")
    with torch.device("meta"):
        far = Otherwise().eval()
    tokcompile.optimize(far, (torch.empty(1, LENGTH, WIDTH, device="meta"),), method="random")
    program = torch.export.export(Otherwise().eval(), (x,))  # the traced form is what is asked for
    tokcompile.optimize(program, method="random")


def test_the_model_is_as_it_was():
    model, x = Leaving().eval(), torch.randn(1, LENGTH, WIDTH)
    given = x.clone()
    tokcompile.optimize(model, (x,), method="random")
    assert not hasattr(model, "last")
    assert torch.equal(x, given)


class Two(Tower):
    def forward(self, x, y):
        return super().forward(x - 2 * y)


def test_keywords_in_any_order():
    x, y = torch.randn(2, 1, LENGTH, WIDTH)
    model = Two().eval()
    fast = tokcompile.optimize(model, kwargs={"y": y, "x": x}, method="random", budget=1.0)
    assert torch.equal(fast(x=x, y=y), model(x, y))
