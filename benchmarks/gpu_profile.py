"""Where the time of a reduction goes on a GPU: each of its kernels, and what token sizes cost as a mask of attention."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.gpu_kernels import L2, headline_cases
from benchmarks.gpu_session import Run, Session, alternate, captured

SHAPES = ((8, 16, 577), (8, 16, 565), (8, 16, 432), (64, 16, 577), (64, 12, 197), (1, 12, 197))  # batch, heads, tokens
HEAD = 64


def profile(session: Session) -> None:
    """Microseconds of every kernel in one reduction, from a CUDA graph over inputs that do not stay in the cache."""
    for case in headline_cases(session)[: 2 if session.dry else None]:
        if session.left() <= 0:
            session.part("profile")["errors"].append({"error": f"{case}: the time was up"})
            continue
        module, copies = case.module(), 1 if session.dry else max(1, min(16, int(L2 / case.bytes(2)) + 1))
        sets = [case.inputs(torch.float16, session.device, seed) for seed in range(copies)]
        run = captured(session.device, lambda module=module, sets=sets: [module(*given) for given in sets])
        found = {name: f"{us / copies:.1f}" for name, us in kernels(session, run).items()}
        about = {"method": case.method, "text": case.text, "B": case.batch, "N": case.length, "D": case.dim, "k": case.k}
        session.add("profile", {**about, "us": ", ".join(f"{name} {us}" for name, us in found.items())})


def kernels(session: Session, run: Run, times: int = 5) -> dict[str, float]:
    """Microseconds of one call by kernel, the longest first; on the CPU by op."""
    gpu = session.device == "cuda"
    run()
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, "CUDA" if gpu else "CPU")]) as found:
        for _ in range(times):
            run()
        if gpu:
            torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    for event in found.events():
        spent[short(event.name)] += (event.device_time if gpu else event.cpu_time) / times
    return dict(spent.most_common(8))


def short(name: str) -> str:
    """The body of one of our kernels, without what it was made for."""
    ours = re.search(r"tc::run<tc::(\w+)", name)
    return ours[1] if ours else name[:40]


def attention(session: Session) -> None:
    """Fused attention with log sizes as a mask, as proportional attention has them: over attention without, in several
    layouts of the mask, since a fused kernel may want rows that begin at multiples of some bytes."""
    dtype = torch.float32 if session.dry else torch.float16
    for batch, heads, tokens in [(1, 2, 5)] if session.dry else SHAPES:
        q, k, v = (torch.randn(batch, tokens, heads, HEAD, device=session.device, dtype=dtype).transpose(1, 2) for _ in "qkv")
        sizes = torch.randint(1, 5, (batch, tokens), device=session.device).float()
        forms = {name: (captured(session.device, run), 1) for name, run in attention_forms(q, k, v, sizes).items()}
        found = alternate(session, forms)
        row = {f"{name}, us": seconds * 1e6 for name, seconds in found.items()}
        session.add("attention", {"B": batch, "heads": heads, "N": tokens, **row})


def attention_forms(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> dict[str, Run]:
    """q, k, v: (B, H, N, d); sizes: (B, N). All but the first give the same values."""
    b, n = sizes.shape
    more = -n % 8

    def mask(value: Tensor) -> Tensor:
        return value.log().to(q.dtype).reshape(b, 1, 1, -1)

    def filled_up() -> Tensor:  # by tokens of size 0, which weigh nothing
        keys, values = pad(k, (0, 0, 0, more)), pad(v, (0, 0, 0, more))
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask(pad(sizes, (0, more))))

    return {
        "no sizes": lambda: scaled_dot_product_attention(q, k, v),
        "mask": lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask(sizes)),
        "rows of 8": lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask(pad(sizes, (0, more), value=1.0))[..., :n]),
        "keys filled up to 8": filled_up,
    }
