"""Single reductions on a GPU: the kernels beside the papers' eager code, the compiled reference and the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, elu, normalize

from benchmarks.gpu_session import Run, Session, alternate, captured, copy_bandwidth
from tokcompile.passes.reduction import ReductionModule
from tokcompile.plugins import torch_ops
from tokcompile.recipe import Site, get_method

METHODS = ("dart", "tome", "pitome", "topk", "evit", "divprune")
TEXT = 64  # tokens of a question after the image
L2 = 120e6  # bytes that inputs should exceed together: twice the cache of an H100


@dataclass(frozen=True)
class Case:
    """One reduction. length: all tokens, of which a vision transformer's first is the class token; in a language model text
    stands after them."""

    kind: str  # vit, vlm or llm
    method: str
    batch: int
    length: int
    dim: int
    share: float
    variant: str = "P"  # of pitome

    @property
    def prefix(self) -> int:
        return int(self.kind == "vit")

    @property
    def n(self) -> int:
        return self.length - self.prefix

    @property
    def text(self) -> int:
        """Tokens after the image, from which DART takes pivots too."""
        return TEXT if self.kind == "llm" else 0

    @property
    def k(self) -> int:
        return max(1, round(self.n * self.share))

    @property
    def head_dim(self) -> int:
        return min(self.dim, 64 if self.kind == "vit" else 128)

    def module(self) -> ReductionModule:
        recipe = get_method(self.method)
        options = recipe.with_options({"variant": self.variant} if self.method == "pitome" else {})
        text = ((self.length, self.length + self.text),) if self.text else ()
        where = {"prefix": self.prefix, "suffix": self.text, "start": self.prefix, "text": text}
        site = Site(n=self.n, k=self.k, block=2, depth=24, options=options, **where)
        return ReductionModule(recipe, site, 1, recipe.taps_read())

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0, ties: bool = False) -> tuple[Tensor | None, ...]:
        """(x, size, *taps). Keys share a direction, each more or less: with none in common PiToMe's energies lie closer than
        float32 tells apart. ties: few different rows of equal norm, whose products are exact and often equal."""
        b, heads, length = self.batch, self.dim // self.head_dim, self.length + self.text
        g = torch.Generator(device).manual_seed(seed)

        def rows(*shape: int) -> Tensor:
            if not ties:
                return torch.randn(shape, generator=g, device=device, dtype=torch.float32).to(dtype)
            choices = torch.randint(0, 2, (6, shape[-1]), generator=g, device=device) * 2 - 1
            return choices.to(dtype)[torch.randint(0, 6, (b, length), generator=g, device=device)]

        x = rows(b, length, self.dim)
        keys = rows(b, heads, length, self.head_dim)
        if not ties:
            share = torch.rand(b, 1, length, 1, generator=g, device=device)
            common = torch.randn(b, heads, 1, self.head_dim, generator=g, device=device)
            keys = (share * common + (1 - share**2).sqrt() * keys).to(dtype)
        score = torch.rand(b, heads, length, generator=g, device=device)
        if ties:
            keys = keys[:, None].expand(b, heads, length, self.head_dim).contiguous()
            score = (score[:, :1] * 8).round().expand(b, heads, length).contiguous() / 64
        taps = {"normed": x.flip(1).contiguous(), "keys": keys, "attention": score.to(dtype)}
        module = self.module()
        size = torch.randint(1, 5, (b, self.n), generator=g, device=device).float() if module.recipe.track_size else None
        return (x, size, *(taps[tap_kind(name)] for name in module.names))

    def bytes(self, element: int) -> int:
        """What must be read and written at least: scores or keys once, all rows where they are merged, else the kept ones."""
        b, n, k, row = self.batch, self.n, self.k, self.dim * element
        heads = self.dim // self.head_dim
        whole = {
            "dart": 2 * (n + self.text) * row + 2 * k * row,  # normed, keys, kept rows in and out
            "topk": n * heads * element + 2 * k * row,
            "evit": n * heads * element + (n + k) * row,
            "tome": n * row + (n + k) * row + 4 * (n + k),
            "pitome": n * row + (n + k) * row + 4 * (n + k),
            "divprune": (n + k) * row,
        }[self.method]
        return b * (whole + 8 * k)


def tap_kind(name: str) -> str:
    return name if name == "normed" else "attention" if name.endswith("attention") else "keys"


def eager(case: Case, given: tuple[Tensor | None, ...]) -> Run:
    """The papers' form over the same n tokens."""
    x, size, *taps = given
    assert x is not None
    all_of_it = case.length + case.text
    cut = [
        t[:, case.prefix :] if t.ndim == 3 and t.shape[1] == all_of_it else t[:, :, case.prefix :]
        for t in taps
        if t is not None
    ]
    sizes = [] if size is None else [size]
    if case.text:
        return lambda: eager_dart(x, *cut, case.k, text=case.text)
    return lambda: EAGER[case.method](x[:, case.prefix :], *sizes, *cut, case.k)


def headline_cases(session: Session) -> list[Case]:
    if session.dry:
        more = [Case("vit", "tome", 2, 33, 64, 0.5), Case("llm", "dart", 1, 40, 64, 0.3)]
        return [Case("vlm", m, 1, 40, 64, 0.5) for m in METHODS] + more
    dart = [Case("vlm", "dart", 1, 2880, 4096, share) for share in (0.11, 0.25, 0.5)]
    dart += [Case("llm", "dart", 1, n, 4096, 0.11) for n in (2880, 576)]
    merge = [
        Case("vit", m, b, n, d, 0.5) for m in ("tome", "pitome") for b, n, d in ((8, 577, 1024), (1, 197, 768), (64, 197, 768))
    ]
    other = [Case("vlm", "divprune", 1, n, 4096, 0.11) for n in (576, 2880)] + [Case("vlm", "topk", 1, 2880, 4096, 0.25)]
    return [*dart, *merge, *other, Case("vit", "evit", 8, 577, 1024, 0.5)]


def all_cases(session: Session) -> list[Case]:
    """The whole grid: no reduction that a method cannot do in one step, and first what is asked for most."""
    if session.short:
        return []
    shapes = [("vlm", b, n, d) for n in (576, 2880, 8192) for b in (1, 8) for d in (4096, 3584)]
    shapes += [("vit", b, n, d) for n in (577, 197, 1025) for b in (8, 1, 64) for d in (1024, 768)]
    cases = [
        Case(kind, method, b, n, d, share)
        for share in (0.25, 0.5, 0.11)
        for kind, b, n, d in shapes
        for method in (("dart", "topk", "divprune") if kind == "vlm" else METHODS)
        if share == 0.5 or method not in ("tome", "pitome")
    ]
    done = set(headline_cases(session))
    return [case for case in cases if case not in done]


def headline(session: Session) -> None:
    """The cases that the targets are about, torch.compile of the reference among the variants."""
    time_cases(session, "headline", headline_cases(session), compiled=True)


def grid(session: Session) -> None:
    """All other shapes."""
    time_cases(session, "grid", all_cases(session), compiled=False)


def time_cases(session: Session, part: str, cases: Sequence[Case], compiled: bool) -> None:
    for done, case in enumerate(cases):
        if session.left() <= 0:
            session.part(part)["errors"].append(
                {"error": f"{len(cases) - done} of {len(cases)} cases not timed: the time was up"}
            )
            return
        try:
            session.add(part, time_case(session, case, compiled))
        except Exception as error:
            session.fail(part, str(case), error)
        if session.device == "cuda":
            torch.cuda.empty_cache()


def time_case(session: Session, case: Case, compiled: bool) -> dict[str, Any]:
    """Microseconds of the kernel, of the papers' eager code, of the compiled reference, and of moving the bytes."""
    dtype, module = torch.float16, case.module()
    copies = 2 if session.dry else max(1, min(16, int(L2 / case.bytes(2)) + 1))
    sets = [case.inputs(dtype, session.device, seed) for seed in range(copies)]
    runs: dict[str, tuple[Run, int]] = {
        "graph": (captured(session.device, lambda: [module(*given) for given in sets]), copies),
        "call": (lambda: [module(*given) for given in sets], copies),
    }
    slow = [eager(case, given) for given in sets]
    runs["eager"] = (slow[0], 1) if case.method in ("dart", "divprune") else (lambda: [run() for run in slow], copies)
    note = ""
    if compiled and not (case.method == "divprune" and case.k > 64):  # its steps are unrolled
        try:
            torch._dynamo.reset()
            reference = torch.compile(module.reference, fullgraph=True, dynamic=False, backend=session.compiler)
            runs["compiled"] = (captured(session.device, lambda: [reference(*given) for given in sets]), copies)
        except Exception as error:
            note = f"reference not compiled: {type(error).__name__}"
    found = alternate(session, runs)
    session.bandwidth = session.bandwidth or copy_bandwidth(session)
    floor = case.bytes(2) / session.bandwidth
    row = {
        "method": case.method, "text": case.text, "B": case.batch, "N": case.length, "D": case.dim, "k": case.k,
        "kernel": torch_ops.library(session.device) is not None,
        **{f"{name} us": seconds * 1e6 for name, seconds in found.items()}, "floor us": floor * 1e6,
        "over floor": found["graph"] / floor, "eager over kernel": found["eager"] / found["call"],
    }  # fmt: skip
    if "compiled" in found:
        row["compiled over kernel"] = found["compiled"] / found["graph"]
    return {**row, **({"note": note} if note else {})}


# -- the papers' forms ----------------------------------------------------------------------------------------------------
# x: (B, n, D), size: (B, n), keys: (B, H, n, d), attention: (B, H, n); all of the n reducible tokens


def eager_dart(x: Tensor, normed: Tensor, keys: Tensor, k: int, pivots: int = 4, text: int = 0) -> Tensor:
    """One image at a time; the tokens still free are a Python set. The last `text` tokens are text: as many of them are
    pivots too, and all of them stay."""
    n, kept = x.shape[1] - text, []
    for b in range(x.shape[0]):
        norm = keys[b].permute(1, 0, 2).flatten(1).abs().sum(1)
        first = torch.topk(norm[:n], min(pivots, k)).indices.tolist()
        turns = first + ([n + i for i in torch.topk(norm[n:], pivots).indices.tolist()] if text else [])
        chosen, free = set(first), sorted(set(range(n)) - set(first))
        left = k - len(first)
        for turn, pivot in enumerate(turns):
            take = -(-left // (len(turns) - turn))
            rest = torch.tensor(free, device=x.device)
            likeness = cosine_similarity(normed[b, pivot][None], normed[b, rest], dim=-1)
            chosen |= set(rest[torch.topk(-likeness, take).indices].tolist())
            free, left = sorted(set(free) - chosen), left - take
        kept.append(torch.tensor([*sorted(chosen), *range(n, n + text)], device=x.device))
    return torch.stack([x[b, index] for b, index in enumerate(kept)])


def eager_topk(x: Tensor, attention: Tensor, k: int) -> Tensor:
    index = torch.topk(attention.mean(1), k).indices.sort(1).values
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def eager_evit(x: Tensor, attention: Tensor, k: int) -> Tensor:
    """The kept tokens, then the weighted sum of the others, gathered by the complement of the index."""
    b, n, width = x.shape
    score = attention.mean(1)
    index = torch.topk(score, k - 1).indices
    others = torch.ones(b, n, dtype=torch.bool, device=x.device).scatter(1, index, False)
    rest = torch.arange(n, device=x.device).expand(b, n)[others].view(b, n - k + 1)
    dropped = x.gather(1, rest[..., None].expand(-1, -1, width))
    extra = (dropped * score.gather(1, rest)[..., None]).sum(1, keepdim=True)
    return torch.cat([x.gather(1, index[..., None].expand(-1, -1, width)), extra.to(x.dtype)], 1)


def join(x: Tensor, size: Tensor, kept: Tensor, into: Tensor, sources: Tensor, slots: Tensor) -> Tensor:
    """[x[kept], x[into] after each source has joined its slot of `into`], weighted by size."""

    def rows(value: Tensor, index: Tensor) -> Tensor:
        return value.gather(1, index[..., None].expand(-1, -1, value.shape[2]))

    size = size[..., None].to(x.dtype)
    out = []
    for value in (x * size, size):
        to = slots[..., None].expand(-1, -1, value.shape[2])
        joined = rows(value, into).scatter_reduce(1, to, rows(value, sources), reduce="sum")
        out.append(torch.cat([rows(value, kept), joined], 1))
    return out[0] / out[1]


def eager_tome(x: Tensor, size: Tensor, keys: Tensor, k: int) -> Tensor:
    """Even against odd tokens: the whole similarity map, its row maxima, a full argsort, scatter_reduce."""
    b, n, _ = x.shape
    metric = keys.mean(1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True)
    sources, kept = order[:, : n - k], order[:, n - k :].sort(1).values
    odd = torch.arange(1, n, 2, device=x.device).expand(b, -1)
    return join(x, size, 2 * kept, odd, 2 * sources, partner.gather(1, sources))


def eager_pitome(x: Tensor, size: Tensor, keys: Tensor, k: int, margin: float = 0.75) -> Tensor:
    """Energies from the whole map, a full argsort, then pairs among the 2 (n - k) of highest energy."""
    removed = x.shape[1] - k
    metric = normalize(keys.mean(1), dim=-1)
    energy = elu(metric @ metric.transpose(1, 2) - margin).mean(-1)
    order = energy.argsort(dim=-1, descending=True)
    a, b, kept = order[:, 0 : 2 * removed : 2], order[:, 1 : 2 * removed : 2], order[:, 2 * removed :]
    left, right = (metric.gather(1, i[..., None].expand(-1, -1, metric.shape[2])) for i in (a, b))
    return join(x, size, kept, b, a, (left @ right.transpose(1, 2)).argmax(-1))


def eager_divprune(x: Tensor, k: int) -> Tensor:
    """One image at a time; every step reduces over the rows of all tokens chosen so far."""
    out = []
    for one in x:
        unit = one / one.norm(dim=-1, keepdim=True)
        distance = 1 - unit @ unit.T
        chosen = torch.empty(k, dtype=torch.long, device=x.device)
        for step in range(k):
            if step == 0:
                score = torch.topk(distance, 2, dim=0, largest=False).values[1]
            else:
                score = distance.index_select(0, chosen[:step]).min(0).values
            chosen[step] = score.argmax()
        out.append(one[chosen.sort().values])
    return torch.stack(out)


EAGER: dict[str, Callable[..., Tensor]] = {
    "dart": eager_dart,
    "topk": eager_topk,
    "evit": eager_evit,
    "tome": eager_tome,
    "pitome": eager_pitome,
    "divprune": eager_divprune,
}
