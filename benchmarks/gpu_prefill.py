"""Prefill of 7B-class language models with random weights on a GPU: DART at layer 2 beside what the FLOPs promise."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import tokcompile
from benchmarks.gpu_models import pair, running, times
from benchmarks.gpu_session import Session
from tokcompile import bench
from tokcompile.passes.trace import trace

BEFORE, AFTER = 35, 64  # text around the visual tokens: LLaVA-1.5's prompt, and a question
LAYER, REMOVED = 2, 0.889  # DART as published
ANSWERS = (1, 16, 128)  # tokens


@dataclass(frozen=True)
class Size:
    width: int
    hidden: int
    depth: int
    heads: int
    kv_heads: int
    vocabulary: int
    bias: bool = False  # of q, k and v


MODELS = {
    "llama-7b": Size(4096, 11008, 32, 32, 32, 32000),
    "qwen2-7b": Size(3584, 18944, 28, 28, 4, 152064, bias=True),
    "tiny": Size(64, 96, 4, 4, 2, 50),
}


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Layer(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        head = size.width // size.heads
        self.heads, self.kv_heads, self.head = size.heads, size.kv_heads, head
        self.norm1, self.norm2 = Norm(size.width), Norm(size.width)
        self.q = nn.Linear(size.width, size.heads * head, size.bias)
        self.k, self.v = (nn.Linear(size.width, size.kv_heads * head, size.bias) for _ in range(2))
        self.out = nn.Linear(size.heads * head, size.width, False)
        self.gate, self.up = (nn.Linear(size.width, size.hidden, False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.after(x, self.attention(*self.before(x, cos, sin), is_causal=True))

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (B, heads, n, head)."""
        b, n, _ = x.shape
        y = self.norm1(x)
        q = rotate(self.q(y).view(b, n, self.heads, self.head).transpose(1, 2), cos, sin)
        k = rotate(self.k(y).view(b, n, self.kv_heads, self.head).transpose(1, 2), cos, sin)
        return q, k, self.v(y).view(b, n, self.kv_heads, self.head).transpose(1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=self.heads != self.kv_heads)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head))
        y = self.norm2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Decoder(nn.Module):
    """A Llama from embeddings on, with fused causal attention: the logits of the last token."""

    def __init__(self, size: Size, length: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.depth))
        self.norm, self.head = Norm(size.width), nn.Linear(size.width, size.vocabulary, False)
        half = size.width // size.heads // 2
        angle = torch.arange(length).float()[:, None] * 10000.0 ** (-torch.arange(half).float() / half)
        both = torch.cat([angle, angle], -1)[None, None]
        self.register_buffer("cos", both.cos().to(self.head.weight.dtype))
        self.register_buffer("sin", both.sin().to(self.head.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x)[:, -1:])


class Step(nn.Module):
    """One token decoded over caches of random values, of `lengths` tokens in each layer: its logits."""

    def __init__(self, decoder: Decoder, lengths: Sequence[int]):
        super().__init__()
        self.decoder, self.position = decoder, decoder.cos.shape[2] - 1
        like = decoder.cos
        self.caches = [
            tuple(torch.randn(1, layer.kv_heads, n + 1, layer.head, device=like.device, dtype=like.dtype) for _ in "kv")
            for layer, n in zip(decoder.layers, lengths, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        at = slice(self.position, self.position + 1)
        cos, sin = self.decoder.cos[:, :, at], self.decoder.sin[:, :, at]
        for layer, (keys, values) in zip(self.decoder.layers, self.caches):
            q, k, v = layer.before(x, cos, sin)
            keys[:, :, -1:], values[:, :, -1:] = k, v
            x = layer.after(x, layer.attention(q, keys, values))
        return self.decoder.head(self.decoder.norm(x))


def made_on(device: str, dtype: torch.dtype, size: Size, length: int) -> Decoder:
    """The model with random weights, which never are in the host's memory where the device is a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Decoder(size, length).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def setups(session: Session) -> list[tuple[str, int, str]]:
    """(model, visual tokens, runtime): graph (eager ops in a CUDA graph) or compiled (inductor's code in one)."""
    if session.dry:
        return [("tiny", 40, "graph")]
    counts = (2880,) if session.args.quick else (576, 2880, 8192)
    found = [(name, n, "graph") for n in counts for name in MODELS if name != "tiny"]
    return found if session.args.quick else [*found, ("llama-7b", 2880, "compiled")]


def prefill(session: Session) -> None:
    """Every model and count of visual tokens."""
    for name, visual, runtime in setups(session):
        if session.left() <= 0:
            session.part("prefill")["errors"].append({"error": f"{name}, {visual} visual tokens: the time was up"})
            continue
        try:
            time_prefill(session, name, visual, runtime)
        except Exception as error:
            session.fail("prefill", f"{name}, {visual} visual tokens", error)
        torch._dynamo.reset()
        if session.device == "cuda":
            torch.cuda.empty_cache()


def time_prefill(session: Session, name: str, visual: int, runtime: str) -> None:
    """The unreduced model against itself, then with DART, and with random selection at the same place.

    by layers: the ratio that the layers by themselves would give: those before the reduction as the whole prompt takes
    them, the others as a prompt takes them that was that short from the start.
    """
    size, length = MODELS[name], BEFORE + visual + AFTER
    dtype = torch.float32 if session.dry else torch.bfloat16
    x = torch.randn(1, length, size.width, device=session.device, dtype=dtype)
    model = made_on(session.device, dtype, size, length)
    source: Any = trace(model, (x,), None).program
    place: Any = {"spans": [(BEFORE, BEFORE + visual)], "where": [LAYER]}
    plain = tokcompile.optimize(source, (x,), method="dart", budget=1.0, **place)
    run = functools.partial(running, session, runtime)
    unreduced = run(plain.graph_module, x)
    about = {"model": name, "visual": visual, "text": BEFORE + AFTER, "layer": LAYER, "runtime": runtime}
    same = pair(session, unreduced, unreduced)
    session.add(
        "prefill", {**about, "method": "A/A", "kept": visual, "flops": 1.0, **times(same), "over flops": same.median - 1}
    )
    kept = tokcompile.Tokens(max(1, round((1 - REMOVED) * visual)))
    made = tokcompile.optimize(source, (x,), method="dart", budget=kept, **place)
    left = made.plan.reductions[-1].k
    short = x[:, : length - visual + left].contiguous()
    brief = pair(session, unreduced, run(made_on(session.device, dtype, size, short.shape[1]), short)).median
    by_layers = (LAYER + (size.depth - LAYER) * brief) / size.depth
    shorter = [length if layer < LAYER else short.shape[1] for layer in range(size.depth)]
    decoding = pair(session, *(run(Step(model, n), x[:, :1].contiguous()) for n in ([length] * size.depth, shorter)))
    at_random = tokcompile.optimize(source, (x,), plan=made.plan.replace(method="random", options={}), spans=place["spans"])
    for method, reduced in (("dart", made), ("random", at_random)):
        ratio = pair(session, unreduced, run(reduced.graph_module, x))
        flops = reduced.report.flops_ratio
        row = {"method": method, "kept": left, "flops": flops, **times(ratio), "over flops": ratio.median / flops - 1}
        row |= {"by layers": by_layers, "over layers": ratio.median / by_layers - 1, "decode": decoding.median}
        session.add("prefill", {**about, **row, "decode ms": decoding.a * 1e3, **totals(ratio, decoding)})


def totals(prefill: bench.Ratio, step: bench.Ratio) -> dict[str, float]:
    """Time of the prompt and of the tokens after its first, over the unreduced model's, for answers of some lengths."""
    found = {}
    for tokens in ANSWERS:
        full, reduced = (a + (tokens - 1) * b for a, b in ((prefill.a, step.a), (prefill.b, step.b)))
        found[f"total, {tokens} tokens"] = reduced / full
    return found
