"""Compares our methods with the authors' code on random inputs: indices exactly, values by the largest difference.

The authors' code is not part of this repository (some of it is licensed for non-commercial use only). Clone what you
may use into one folder and name that folder; what is missing is skipped:

    git clone https://github.com/facebookresearch/ToMe          repos/ToMe
    git clone https://github.com/hchautran/PiToMe               repos/PiToMe
    git clone https://github.com/vbdi/divprune                  repos/divprune
    git clone https://github.com/youweiliang/evit               repos/evit
    git clone https://github.com/ZichenWen1/DART                repos/DART
    git clone https://github.com/JoakimHaurum/TokenReduction    repos/TokenReduction
    python benchmarks/official.py --repos repos

official_vlm.py does the same for the methods of vision-language models.
Only the functions named below are read and executed, so their other requirements need not be installed.
"""

from __future__ import annotations
import __future__

import argparse
import ast
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokcompile
from tokcompile.primitives import apply
from tokcompile.recipe import Keep, Mix, Site, Tokens, get_method


class Row(NamedTuple):
    """One line of the table: `differ` of `of` selections are not the official ones; `error`: largest difference."""

    method: str
    case: str
    differ: int
    of: int
    error: float


class Missing(Exception):
    """A file of the official code is not there."""


def official(file: Path, *names: str, **namespace: Any) -> dict[str, Any]:
    """Executes only the named functions, classes and "Class.method"s of a file."""
    if not file.exists():
        raise Missing(f"{file} is missing")
    top = {getattr(node, "name", ""): node for node in ast.parse(file.read_text()).body}
    body = []
    for name in names:
        outer, _, inner = name.partition(".")
        found = top.get(outer)
        if inner and found is not None:
            found = next((node for node in found.body if getattr(node, "name", "") == inner), None)
        if found is None:
            raise Missing(f"{file} has no {name}")
        body.append(found)
    code = compile(ast.Module(body, []), str(file), "exec", __future__.annotations.compiler_flag, dont_inherit=True)
    scope = {"torch": torch, "nn": nn, "F": nn.functional, "math": math, **namespace}
    exec(code, scope)
    return scope


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(
    name: str, tokens: Tokens, k: int, prefix: int = 0, where: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Tensor, Tensor | None]:
    """Our plan, the new tokens and sizes; `where` says more of the site."""
    recipe = get_method(name)
    site = Site(n=tokens.x.shape[1], k=k, prefix=prefix, options=recipe.with_options(options), **(where or {}))
    plan = recipe.plan(tokens, site)
    return plan, *apply(plan, tokens.x, tokens.size)


def groups(plan: Any, n: int) -> Tensor:
    """Which of the n tokens each new one holds: (B, k, n) of 0 and 1."""
    assert not isinstance(plan, (Keep, Mix))
    one = torch.eye(n)
    return one[plan.index].scatter_add(1, plan.slots[..., None].expand(-1, -1, n), one[plan.sources])


def tome(repos: Path) -> Iterator[Row]:
    """bipartite_soft_matching and merge_wavg; [A0, B0, A1.., B1..] for the distillation token, as they return it."""
    code = official(repos / "ToMe/tome/merge.py", "do_nothing", "bipartite_soft_matching", "merge_wavg")
    for length in (63, 196, 197, 198, 577):
        for prefix in (0, 1, 2):
            differ, error = 0, 0.0
            for seed in range(5):
                keys, x = randn(2, 3, length, 16, seed=seed), randn(2, length, 32, seed=seed + 100)
                size = torch.randint(1, 6, (2, length, 1), generator=torch.Generator().manual_seed(seed)).float()
                r = length // (4 if seed % 2 else 9)
                merge, _ = code["bipartite_soft_matching"](keys.mean(1), r, prefix > 0, prefix > 1)
                rows, sizes = code["merge_wavg"](merge, x, size)
                members = merge(torch.eye(length).expand(2, -1, -1), mode="sum")
                body = Tokens(x=x[:, prefix:], size=size[:, prefix:, 0], k=keys[:, :, prefix:])
                plan, ours, our_sizes = run("tome", body, length - prefix - r, prefix)
                differ += not torch.equal(groups(plan, length - prefix), members[:, prefix:, prefix:])
                differ += not torch.equal(our_sizes, sizes[:, prefix:, 0])
                error = max(error, float((ours - rows[:, prefix:]).abs().max()))
            yield Row("tome", f"N={length} protected={prefix}", differ, 10, error)


class StableTorch(types.ModuleType):
    """torch, but argsort keeps the lower index first among equals: equal energies do happen in float32."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def argsort(x: Tensor, **given: Any) -> Tensor:
        return torch.argsort(x, stable=True, **given)


def pitome(repos: Path) -> Iterator[Row]:
    """pitome_vision in both variants, its merge applied by merge_wavg; with a stable argsort, and as released."""
    yield from pitome_with(repos, StableTorch("torch"), "stable argsort")
    yield from pitome_with(repos, torch, "as released")


def pitome_with(repos: Path, module: Any, label: str) -> Iterator[Row]:
    names = ("do_nothing", "pitome", "pitome_bsm", "pitome_vision", "merge_wavg")
    code = official(repos / "PiToMe/algo/pitome/merge.py", *names, torch=module)
    for length in (63, 196, 197, 577):
        for which in ("P", "B"):
            differ, error = 0, 0.0
            for seed in range(5):
                prefix, ratio, margin = seed % 2, (0.9, 0.75)[seed % 2], (0.4, 0.75, 0.9)[seed % 3]
                keys, x = randn(2, 3, length, 16, seed=seed), randn(2, length, 32, seed=seed + 100)
                size = torch.randint(1, 6, (2, length, 1), generator=torch.Generator().manual_seed(seed)).float()
                given = dict(class_token=prefix == 1, use_bsm_pitome=which == "B")
                merge = code["pitome_vision"](keys.mean(1), ratio, margin, **given)
                rows, sizes = code["merge_wavg"](merge, x, size)
                members = merge(torch.eye(length).expand(2, -1, -1), mode="sum")
                n = length - prefix
                body = Tokens(x=x[:, prefix:], size=size[:, prefix:, 0], k=keys[:, :, prefix:])
                k = get_method("pitome").steps.rate(n, n, ratio, 0)
                plan, ours, our_sizes = run("pitome", body, k, prefix, margin=margin, variant=which)
                differ += not torch.equal(groups(plan, n), members[:, prefix:, prefix:])
                differ += not torch.equal(our_sizes, sizes[:, prefix:, 0])
                error = max(error, float((ours - rows[:, prefix:]).abs().max()))
            yield Row("pitome", f"N={length} variant {which}, {label}", differ, 10, error)


def divprune(repos: Path) -> Iterator[Row]:
    """LlavaMetaForCausalLM.DivPrune, which takes one sample."""
    owner = "LlavaMetaForCausalLM"
    file = repos / "divprune/LLaVA/llava/model/llava_arch.py"
    code = official(file, f"{owner}.DivPrune", f"{owner}.pairwise_cosine_similarity")
    self = types.SimpleNamespace(pairwise_cosine_similarity=lambda x: code["pairwise_cosine_similarity"](None, x))
    for n in (63, 196, 576):
        for ratio in (0.098, 0.5):
            differ, error = 0, 0.0
            for seed in range(5):
                x = randn(3, n, 64, seed=seed)
                picked = [code["DivPrune"](self, row, n, None, threshold_ratio=ratio)[0].sort().values for row in x]
                plan, ours, _ = run("divprune", Tokens(x=x), len(picked[0]))
                differ += sum(not torch.equal(a, b) for a, b in zip(plan.index, picked, strict=True))
                expected = torch.stack([x[b, index] for b, index in enumerate(picked)])
                error = max(error, float((ours - expected).abs().max()))
            yield Row("divprune", f"N={n} k={len(picked[0])}", differ, 15, error)


class Ordered:
    """A set that iterates in the order of insertion: DART loops over a Python set, whose order means nothing."""

    def __init__(self, items: Any):
        self.items = dict.fromkeys(items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __sub__(self, other: Ordered) -> Ordered:
        return Ordered(i for i in self.items if i not in other.items)

    def update(self, items: Any) -> None:
        self.items.update(dict.fromkeys(items))

    def difference_update(self, items: Any) -> None:
        self.items = {i: None for i in self.items if i not in set(items)}


def dart(repos: Path) -> Iterator[Row]:
    """get_retained_image_token with and without text pivots, with its set in our pivot order and as it is."""
    file = repos / "DART/llava/model/language_model/modeling_llama_self.py"
    owner = next((c for c in ("DART", "LlamaModel", "DART_K_norm") if has(file, c, "get_retained_image_token")), "DART")
    for label, kind in (("pivots by norm", Ordered), ("pivots in set order (right: share of other tokens)", set)):
        code = official(file, f"{owner}.get_retained_image_token", set=kind)
        for n, ratio, pivots, of_text in ((196, 0.5, 4, 0), (576, 0.778, 4, 0), (576, 0.778, 4, 4), (576, 0.889, 8, 4)):
            differ, error = 0, 0.0
            for seed in range(5):
                start, text = 5, 30
                hidden, keys = randn(1, start + n + text, 64, seed=seed), randn(1, 4, start + n + text, 16, seed=seed)
                keys = keys * (1 + randn(1, 1, start + n + text, 1, seed=seed + 7).abs())
                given = dict(K=2, image_token_start_index=start, image_token_length=n, max_num_trunction=None)
                given |= dict(reduction_ratio=ratio, pivot_image_token=pivots, pivot_text_token=of_text)
                config = types.SimpleNamespace(DART_config=given, text_length=None)
                kept = code["get_retained_image_token"](None, config, hidden, keys).sort().values - start
                image = slice(start, start + n)
                whole = Tokens(x=hidden, normed=hidden, rotated_k=keys)
                body = Tokens(x=hidden[:, image], normed=hidden[:, image], rotated_k=keys[:, :, image], whole=whole)
                where = {"start": start, "text": ((0, start), (start + n, start + n + text))}
                options = {"pivots": pivots, "text_pivots": of_text}
                plan, ours, _ = run("dart", body, len(kept), where=where, **options)
                same = torch.equal(plan.index[0], kept)
                differ += not same
                if same:
                    error = max(error, float((ours[0] - hidden[0, image][kept]).abs().max()))
                else:
                    error = max(error, 1 - len(set(kept.tolist()) & set(plan.index[0].tolist())) / len(kept))
            yield Row("dart", f"N={n} k={len(kept)}, {pivots} + {of_text} pivots, {label}", differ, 5, error)


def has(file: Path, *names: str) -> bool:
    try:
        official(file, ".".join(names))
    except Missing:
        return False
    return True


def class_attention(attention: nn.Module, x: Tensor) -> Tensor:
    """The softmax row of the first token, by the module's own weights: (B, H, N)."""
    b, n, _ = x.shape
    q, k, _ = attention.qkv(x).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return (q[:, :, :1] @ k.transpose(-2, -1) * attention.scale).softmax(-1)[:, :, 0]


def by_attention(name: str, file: Path, parts: tuple[str, str], given: dict[str, Any], **scope: Any) -> Iterator[Row]:
    """A whole block of EViT or Top-K against ours at the same place, then the block's own MLP."""
    code = official(file, *parts, **scope)
    for rate in (0.7, 0.5, 0.25):
        differ, error = 0, 0.0
        for seed in range(5):
            torch.manual_seed(seed)
            block = code[parts[1]](48, 4, qkv_bias=True, keep_rate=rate, **given).eval()
            for p in block.parameters():
                p.data += 0.2 * torch.randn_like(p)
            x = randn(3, 197, 48, seed=seed)
            expected, _, index = block(x, get_idx=True) if name == "evit" else block(x)
            kept = index.shape[1]
            body = Tokens(
                x=(x + block.attn(block.norm1(x))[0])[:, 1:],
                cls_attention=class_attention(block.attn, block.norm1(x))[:, :, 1:],
            )
            options = {"fuse": given["fuse_token"]} if given else {}
            plan, ours, _ = run(name, body, expected.shape[1] - 1, 1, **options)
            ours = ours + block.mlp(block.norm2(ours))
            order = index.argsort(1)  # ours ascend, theirs descend by attention
            theirs = expected[:, 1 : 1 + kept].gather(1, order[..., None].expand(-1, -1, 48))
            theirs = torch.cat([theirs, expected[:, 1 + kept :]], 1)
            differ += sum(not torch.equal(*two) for two in zip(plan.index[:, :kept], index.gather(1, order), strict=True))
            error = max(error, float((ours - theirs).abs().max()))
        label = " ".join(f"{key}={value}" for key, value in given.items())
        yield Row(name, f"block, n=196 rate={rate} {label}".strip(), differ, 15, error)


def evit(repos: Path) -> Iterator[Row]:
    """The Block of evit.py with and without fusion."""
    scope = official(repos / "evit/helpers.py", "complement_idx")
    scope |= official(repos / "evit/evit.py", "Mlp")
    for fuse in (True, False):
        yield from by_attention("evit", repos / "evit/evit.py", ("Attention", "Block"), {"fuse_token": fuse}, **scope)


def topk(repos: Path) -> Iterator[Row]:
    """The Block_TopK of TokenReduction; its Mlp is timm's."""
    from timm.layers import Mlp

    yield from by_attention("topk", repos / "TokenReduction/models/topk.py", ("Attention_TopK", "Block_TopK"), {}, Mlp=Mlp)


def whole_model(repos: Path) -> Iterator[Row]:
    """The authors' patch of a timm ViT with random weights against the compiled model: logits."""
    import copy

    import timm

    folder = repos / "ToMe/tome"
    if not folder.exists():
        raise Missing(f"{folder} is missing")
    package = types.ModuleType("tome")  # the package imports plotting libraries; its parts do not
    package.__path__ = [str(folder)]
    sys.modules["tome"] = package
    patch = types.ModuleType("tome_patch_timm")
    sys.modules["tqdm"] = sys.modules.get("tqdm") or types.SimpleNamespace(tqdm=None)
    exec(compile((folder / "patch/timm.py").read_text(), "timm.py", "exec"), patch.__dict__)
    options = {"class token": {}, "no class token": dict(class_token=False, global_pool="avg")}
    for label, build in options.items():
        for r in (8, 16):
            torch.manual_seed(r)
            sizes = dict(embed_dim=96, num_heads=3, depth=12, num_classes=100)
            model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes, **build).eval()
            for p in model.parameters():
                p.data += 0.05 * torch.randn_like(p)
            x = randn(2, 3, 224, 224, seed=r)
            theirs = copy.deepcopy(model)
            patch.apply_patch(theirs)
            theirs.r = r
            # the authors' patch leaves the model's mean over tokens plain
            given = dict(budget=tokcompile.Remove(r), size_weighted_mean=False)
            ours = tokcompile.optimize(model, (x,), method="tome", **given)
            expected, got, full = theirs(x), ours(x), model(x)
            effect = float((full - expected).abs().max())
            scale = float(expected.abs().max())
            case = f"ViT, 12 blocks, {label}, r={r}; logits {scale:.1f}, moved by {effect:.2f}"
            yield Row("tome", case, 0, 0, float((got - expected).abs().max()))


COMPARISONS = (tome, pitome, divprune, dart, evit, topk, whole_model)


def compare_all(comparisons: Sequence[Callable[[Path], Iterator[Row]]], description: str) -> int:
    """Prints one table of all comparisons, or of those that the command line names."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--repos", type=Path, required=True, help="folder that holds your clones")
    parser.add_argument("--only", choices=[c.__name__ for c in comparisons], nargs="*", help="some comparisons")
    given = parser.parse_args()
    print(f"| {'method':<11} | {'case':<70} | {'selections that differ':<22} | {'largest difference':<18} |")
    print(f"|{'-' * 13}|{'-' * 72}|{'-' * 24}|{'-' * 20}|")
    skipped = []
    for compare in comparisons:
        if given.only and compare.__name__ not in given.only:
            continue
        try:
            rows = torch.no_grad()(compare)(given.repos)  # a generator too keeps gradients off while it runs
            for row in rows:
                count = f"{row.differ} of {row.of}" if row.of else "-"
                print(f"| {row.method:<11} | {row.case:<70} | {count:<22} | {row.error:<18.1e} |", flush=True)
        except (Missing, ImportError) as reason:
            skipped.append(f"{compare.__name__}: skipped, {reason}")
    print("\n".join(skipped))
    return 0


if __name__ == "__main__":
    sys.exit(compare_all(COMPARISONS, __doc__ or ""))
