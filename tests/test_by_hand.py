"""Optimized models against the same reduction written out by hand, and recipes of one's own."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import counts, error, run
from tokcompile import Keep, Merge, Recipe, Remove, Schedule
from tokcompile.methods.random import RANDOM
from tokcompile.recipe import methods as known_methods

RECIPES = known_methods()
METHODS = sorted(RECIPES)
PATCHES = 49
DATA_DEPENDENT = ("nonzero", "_local_scalar", "aten.item", "masked_select", "unique", "_assert_scalar", "_assert_async")


# -- recipes of one's own ----------------------------------------------------------------------------------------------


def test_a_recipe_of_ones_own(family, program):
    seen = []

    def first(tokens, site):
        seen.append(site)
        return tokcompile.Keep(torch.arange(site.k).expand(tokens.x.shape[0], -1))

    recipe = Recipe("first", first, steps=tokcompile.steps.every_block(), options={"shade": 1})
    optimized = tokcompile.optimize(program("timm/vit_features"), method=recipe, budget=0.5, outputs="reduced", shade=2)
    _, kept = run(optimized, *family("timm/vit_features").args)
    assert kept["s3_index"].tolist() == [list(range(25))]
    sites = {site.block: site for site in seen}
    assert [(s.n, s.k, s.step, s.grid) for s in sites.values()] == [
        (49, 43, 0, (7, 7)), (43, 37, 1, None), (37, 31, 2, None), (31, 25, 3, None)]  # fmt: skip
    assert {(s.prefix, s.suffix, s.steps, s.depth, s.options["shade"]) for s in sites.values()} == {(1, 0, 4, 4, 2)}


def test_pruning_equals_pruning_by_hand(family):
    """The model written out with the dropped tokens really dropped gives the same numbers."""
    model, (image,), _ = family("timm/vit", 2)
    optimized = tokcompile.optimize(model, (image,), method="random", where=[1], outputs="reduced")
    got, kept = run(optimized, image)

    def by_hand(image):
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
        for i, block in enumerate(model.blocks):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            if i == 1:
                rows = torch.cat([torch.zeros(2, 1, dtype=torch.int64), kept["s0_index"] + 1], 1)
                x = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))

    assert error(got, run(by_hand, image)) < 1e-6


def tome_by_hand(model, image, removed):
    """timm's ViT with ToMe written out as in the paper: sizes, proportional attention, merging by similar keys."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
    size = torch.ones(*x.shape[:2], 1)
    for block, r in zip(model.blocks, removed):
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        scores = q * attn.scale @ k.mT + size.log()[:, None, None, :, 0]
        x = x + block.ls1(attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        metric = torch.nn.functional.normalize(k.mean(1), dim=-1)
        similar = metric[:, ::2] @ metric[:, 1::2].mT
        similar[:, 0] = float("-inf")  # the class token is never merged
        best, partner = similar.max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        merged, kept = order[:, :r], order[:, r:].sort(-1).values
        partner = partner.gather(1, merged)[..., None]

        def join(value, merged=merged, kept=kept, partner=partner):
            width = value.shape[-1]
            even, odd = value[:, ::2], value[:, 1::2]
            source = even.gather(1, merged[..., None].expand(-1, -1, width))
            odd = odd.scatter_add(1, partner.expand(-1, -1, width), source)
            return torch.cat([even.gather(1, kept[..., None].expand(-1, -1, width)), odd], 1)

        x, size = join(x * size), join(size)
        x = x / size
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("r", [3, 8])
def test_tome_equals_tome_by_hand(r, batch, family, program):
    model, (image,), _ = family("timm/vit", batch)
    optimized = tokcompile.optimize(program("timm/vit", batch), method="tome", budget=Remove(r))
    assert [n - k for _, n, k in counts(optimized)] == [r] * 4
    assert error(run(optimized, image), run(tome_by_hand, model, image, [r] * 4)) < 1e-5


def by_keys(q, k):
    return (k @ q.mT).softmax(-2).mT


SAME_ATTENTION = {
    "keys-by-queries": by_keys,
    "einsum": lambda q, k: torch.einsum("bhke,bhqe->bhqk", k, q).softmax(-1),
    "einsum-by-keys": lambda q, k: torch.einsum("bhqe,bhke->bhkq", q, k).softmax(2).mT,
}


class Tower(nn.Module):
    """Two blocks over a class token and patches; heads of 8 channels attend to each other as is given."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.patch, self.token = attend, nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.qkv, self.up = (nn.ModuleList(nn.Linear(16, n) for _ in range(2)) for n in (48, 16))

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for qkv, up in zip(self.qkv, self.up):
            q, k, v = qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            x = x + self.attend(q, k, v).transpose(1, 2).flatten(2)
            x = x + up(x).tanh()
        return x


ANGLE = torch.arange(17.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])


def turned(a, b):
    return a * ANGLE.cos() - b * ANGLE.sin(), b * ANGLE.cos() + a * ANGLE.sin()


ROTARY = {
    "halves": lambda x: torch.cat(turned(x[..., :4], x[..., 4:]), -1),
    "chunks": lambda x: torch.cat(turned(*x.chunk(2, -1)), -1),
    "neighbours": lambda x: torch.stack(turned(x[..., 0::2], x[..., 1::2]), -1).flatten(-2),
    "pairs": lambda x: torch.stack(turned(*x.unflatten(-1, (4, 2)).unbind(-1)), -1).flatten(-2),
}


def same_tokens(method, *attends):
    """Towers that attend to the same reduce the same tokens, however it is written."""
    image = torch.randn(2, 3, 16, 16)
    usual, other = (
        tokcompile.optimize(Tower(attend).eval(), (image,), method=method, where=[0], outputs="reduced") for attend in attends
    )
    want, got = run(usual, image), run(other, image)
    assert torch.equal(got.kept["s0_index"], want.kept["s0_index"])
    assert error(got.output, want.output) < 1e-6


@pytest.mark.parametrize("method", ["topk", "tome"])
@pytest.mark.parametrize("form", SAME_ATTENTION)
def test_queries_and_keys_are_told_apart(form, method):
    """Attention written with its keys first."""
    same_tokens(method, lambda q, k, v: (q @ k.mT).softmax(-1) @ v, lambda q, k, v: SAME_ATTENTION[form](q, k) @ v)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", ROTARY)
def test_keys_are_read_before_they_are_rotated(form, fused):
    """However positions are rotated into them, and in attention that is written out too."""
    seen, image, rotated = [], torch.randn(2, 3, 16, 16), ROTARY[form]

    def attend(q, k, v):
        if fused:
            return nn.functional.scaled_dot_product_attention(rotated(q), rotated(k), v)
        return (rotated(q) @ rotated(k).transpose(-1, -2)).softmax(-1) @ v

    def plan(tokens, site):
        seen.append(tokens.k)
        return Keep(torch.arange(site.k).expand(2, -1))

    model, recipe = Tower(attend).eval(), Recipe("read", plan, taps=("k",), steps=tokcompile.steps.every_block())
    run(tokcompile.optimize(model, (image,), method=recipe, where=[0]), image)
    x = run(model.patch, image).flatten(2).transpose(1, 2)
    keys = run(model.qkv[0], x).unflatten(-1, (3, 2, 8))[:, :, 1].transpose(1, 2)
    assert error(seen[-1], keys) < 1e-6


class Windows(nn.Module):
    """Two blocks over the windows of an image, which lie along the batch; the second attends to all of them at once."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out, self.up = (nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(2))

    def attend(self, block, x, sizes=None):
        q, k, v = self.qkv[block](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if sizes is None else sizes.log()[None, None, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out[block](y.transpose(1, 2).flatten(2)), k

    def forward(self, x):  # (4 windows, 9 tokens, width)
        x = x + self.attend(0, x)[0]
        x = x + self.up[0](x).tanh()
        x = x + self.attend(1, x.reshape(1, -1, x.shape[-1]))[0].reshape(x.shape)
        return x + self.up[1](x).tanh()


def test_merged_tokens_weigh_in_attention_over_all_windows():
    """Keys of such an attention are read window by window, and every window's sizes weigh."""
    torch.manual_seed(0)
    model, x, seen = Windows().eval(), torch.randn(4, 9, 16), []

    def pairs(tokens, site):  # neighbours join, the same in each window
        seen.append(tokens.k)
        removed, rows = site.n - site.k, tokens.x.shape[0]
        index = [i for i in range(site.n) if i % 2 == 0 or i >= 2 * removed]
        sources = torch.arange(removed) * 2 + 1
        return Merge(*(torch.as_tensor(v).expand(rows, -1) for v in (index, sources, torch.arange(removed))))

    recipe = Recipe("pairs", pairs, taps=("x", "k"), steps=tokcompile.steps.every_block(), track_size=True, proportional=True)
    optimized = tokcompile.optimize(model, (x,), method=recipe, budget=Schedule({0: 6, 1: 5}), outputs="reduced")
    got = run(optimized, x)[0]

    def join(x, size, removed):
        weighed = torch.cat([x * size[..., None], size[..., None]], -1)
        both = weighed[:, : 2 * removed].unflatten(1, (removed, 2)).sum(2)
        weighed = torch.cat([both, weighed[:, 2 * removed :]], 1)
        return weighed[..., :-1] / weighed[..., -1:], weighed[..., -1]

    with torch.no_grad():
        y, size = join(x + model.attend(0, x)[0], torch.ones(4, 9), 3)
        y = y + model.up[0](y).tanh()
        flat, keys = model.attend(1, y.reshape(1, -1, 16), size.reshape(-1))
        y, size = join(y + flat.reshape(y.shape), size, 1)
        y = y + model.up[1](y).tanh()
    assert size.unique().tolist() == [1, 2, 4]
    assert error(seen[-1], keys.reshape(2, 4, 6, 8).transpose(0, 1)) < 1e-5
    assert error(got, y) < 1e-5


def test_the_seed_of_random_matters(family, program):
    args = family("timm/vit").args
    a, b, c = (run(tokcompile.optimize(program("timm/vit"), method="random", seed=seed), *args) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert RANDOM.options == {"seed": 0}
