"""The kernels against the reference, and under compute-sanitizer."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kernels import METHODS, Case
from benchmarks.gpu_session import Session, captured
from tokcompile.passes.reduction import ReductionModule
from tokcompile.plugins import torch_ops
from tokcompile.primitives import top_k
from tokcompile.primitives.combine import apply
from tokcompile.recipe import Merge

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
JITTER = 1e-5  # relative: a reference that chooses otherwise for this was a near tie
SCRIPT = Path(__file__).with_name("gpu.py")


def check(session: Session) -> None:
    """Every kernel against the reference on the same device; those of the parts as well."""
    shapes = [("vit", 2, 64, 64, 0.6), ("vit", 3, 197, 256, 0.5), ("vlm", 1, 130, 65, 0.55)]
    if not session.dry:
        shapes += [
            ("vit", 8, 577, 1024, 0.5),
            ("vlm", 2, 1025, 768, 0.5),
            ("vlm", 1, 2880, 4096, 0.5),
            ("vit", 1, 8192, 100, 0.7),
        ]
    for kind, batch, length, dim, share in shapes:
        cases = [Case(kind, method, batch, length, dim, share) for method in METHODS]
        cases += [Case(kind, "pitome", batch, length, dim, share, "B"), Case("llm", "dart", batch, length, dim, share)]
        for case in cases:
            for dtype in TOLERANCE:
                if session.left() <= 0:
                    session.part("check")["errors"].append({"error": f"{case} {dtype}: the time was up"})
                    continue
                try:
                    check_case(session, case, dtype)
                except Exception as error:
                    session.fail("check", f"{case} {dtype}", error)
    lib = torch_ops.library(session.device)
    for check_part in (check_select, check_gather, check_merge) if lib is not None else ():
        try:
            session.add("check", {"method": check_part.__name__[6:], **check_part(session, lib)})
        except Exception as error:
            session.fail("check", check_part.__name__, error)


def check_case(session: Session, case: Case, dtype: torch.dtype) -> None:
    """Random values and ties; in eager mode and in a CUDA graph that is replayed on other values."""
    module = case.module()
    module.needs_assign = True
    for ties in (False, True):
        if ties and not (power_of_4(case.dim) and power_of_4(case.head_dim)):
            continue  # only where norms are exact are ties exact
        given = case.inputs(dtype, session.device, 1, ties)
        buffers = [None if t is None else t.clone() for t in case.inputs(dtype, session.device, 2)]
        out: list[Any] = []
        replay = captured(session.device, lambda b=buffers, o=out: o.append(module(*b)))
        for buffer, value in zip(buffers, given):
            if buffer is not None:
                buffer.copy_(value)
        replay()
        got = module(*given)
        row = compare(got, module, given)
        row["graph"] = all(g is None or same(case, g, o) for g, o in zip(got, out[-1]))
        row["ok"] = row["ok"] and row["graph"]
        about = {"method": case.method, "text": case.text, "dtype": str(dtype)[6:]}
        about |= {"B": case.batch, "N": case.length, "D": case.dim, "k": case.k}
        session.add("check", {**about, "data": "ties" if ties else "random", **row})


def same(case: Case, a: Tensor, b: Tensor) -> bool:
    """Bit by bit from a kernel. Plain PyTorch, which runs where more than every second token is merged away, adds rows in
    another order each time."""
    if case.method in ("tome", "pitome") and case.n - case.k > case.n // 2 and a.is_floating_point():
        return bool((a - b).abs().max() <= TOLERANCE[a.dtype] * b.abs().max())
    return torch.equal(a, b)


def power_of_4(value: int) -> bool:
    return value.bit_count() == 1 and value.bit_length() % 2 == 1


def compare(got: Sequence[Any], module: ReductionModule, given: Sequence[Any]) -> dict[str, Any]:
    """Indices and sizes exactly; tokens against the reference's in float32, which rounds less than in halves."""
    x, size, *taps = given
    want = module.reference(x.float(), size, *taps)
    if not torch.equal(got[1], want[1]):
        shared = min(len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in zip(got[1], want[1]))
        near = shared >= 0.98 and changes(module, given, want[1])
        return {"index": f"{'near tie' if near else 'wrong'}, {shared:.4f} of the set", "ok": near}
    error = ((got[0].float() - want[0]).abs().max() / want[0].abs().max()).item()
    sizes = got[2] is None or torch.equal(got[2], want[2])
    assigned = 1.0 if got[3] is None else (got[3] == want[3]).float().mean().item()
    ok = error <= TOLERANCE[x.dtype] and sizes and assigned >= 0.999
    return {"index": "exact", "error": error, "sizes": sizes, "assign": assigned, "ok": ok}


def changes(module: ReductionModule, given: Sequence[Any], index: Tensor) -> bool:
    """Whether the reference chooses otherwise when its inputs are moved a little."""
    x, size, *taps = given

    def moved(t: Tensor) -> Tensor:
        return t.float() * (1 + JITTER * torch.randn_like(t, dtype=torch.float32))

    return any(not torch.equal(module.reference(moved(x), size, *map(moved, taps))[1], index) for _ in range(8))


def check_select(session: Session, lib: ctypes.CDLL) -> dict[str, Any]:
    """More than TensorRT's 3840, with ties and NaN."""
    b, n, k = 2, 64 if session.dry else 20000, 40 if session.dry else 5000
    scores = torch.randint(0, 1000, (b, n), device=session.device).float()
    scores[:, 3] = float("nan")
    index = torch.empty(b, k, dtype=torch.int64, device=session.device)
    lib.tc_select_workspace.restype = ctypes.c_size_t
    space = torch.empty(lib.tc_select_workspace(b, n, k) + torch_ops.ALIGN, dtype=torch.uint8, device=session.device)
    aligned = -(-space.data_ptr() // torch_ops.ALIGN) * torch_ops.ALIGN
    code = lib.tc_select(b, n, k, 0, *addresses(session, scores, index, aligned))
    return {"code": code, "N": n, "k": k, "ok": code == 0 and torch.equal(index, top_k(scores, k))}


def check_gather(session: Session, lib: ctypes.CDLL) -> dict[str, Any]:
    given, index = several(session, 33), torch.randint(0, 33, (2, 20), device=session.device)
    out = [torch.empty(2, 20, t.shape[2], dtype=t.dtype, device=t.device) for t in given]
    arrays = layout(given, out)
    code = lib.tc_gather(len(given), 2, 33, 20, *arrays[:3], *addresses(session, index), arrays[3], stream(session))
    same = all(torch.equal(o, t.gather(1, index[..., None].expand(-1, -1, t.shape[2]))) for t, o in zip(given, out))
    return {"code": code, "ok": code == 0 and same}


def check_merge(session: Session, lib: ctypes.CDLL) -> dict[str, Any]:
    n, k = 33, 20
    given = several(session, n)
    order = torch.stack([torch.randperm(n, device=session.device) for _ in range(2)])
    slots = torch.randint(0, k, (2, n - k), device=session.device)
    plan = Merge(order[:, :k].contiguous(), order[:, k:].contiguous(), slots)
    size, new_size = torch.randint(1, 5, (2, n), device=session.device).float(), torch.empty(2, k, device=session.device)
    out = [torch.empty(2, k, t.shape[2], dtype=t.dtype, device=t.device) for t in given]
    arrays = layout(given, out)
    pointers = addresses(session, size, plan.index, plan.sources, plan.slots, end=False)
    last = addresses(session, new_size)
    code = lib.tc_merge(len(given), 2, n, k, *arrays[:3], *pointers, arrays[3], *last, stream(session))
    wanted = [apply(plan, t.float(), size) for t in given]
    errors = [((o.float() - w[0]).abs().max() / w[0].abs().max() / TOLERANCE[o.dtype]).item() for o, w in zip(out, wanted)]
    return {
        "code": code,
        "of tolerance": max(errors),
        "ok": code == 0 and max(errors) <= 1 and torch.equal(new_size, wanted[0][1]),
    }


def several(session: Session, n: int) -> list[Tensor]:
    return [
        torch.randn(2, n, w, device=session.device).to(d)
        for w, d in ((64, torch.float16), (1, torch.float32), (7, torch.bfloat16))
    ]


def layout(given: Sequence[Tensor], out: Sequence[Tensor]) -> tuple[Any, Any, Any, Any]:
    """Host arrays: dtypes, widths, pointers in, pointers out."""
    count = len(given)
    return (
        (ctypes.c_int32 * count)(*(torch_ops.DTYPES[t.dtype] for t in given)),
        (ctypes.c_int32 * count)(*(t.shape[2] for t in given)),
        (ctypes.c_void_p * count)(*(t.data_ptr() for t in given)),
        (ctypes.c_void_p * count)(*(t.data_ptr() for t in out)),
    )


def stream(session: Session) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if session.device == "cuda" else None)


def addresses(session: Session, *values: Any, end: bool = False) -> list[ctypes.c_void_p]:
    found = [ctypes.c_void_p(v.data_ptr() if isinstance(v, Tensor) else v) for v in values]
    return [*found, stream(session)] if end or isinstance(values[-1], int) else found


# -- compute-sanitizer ----------------------------------------------------------------------------------------------------


def sanitize(session: Session) -> None:
    """memcheck, racecheck and synccheck over small calls of every kernel, in a process of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if session.dry:
        session.add("sanitize", {"tool": "none", "ok": sanitized("cpu") == 0})
        return
    if tool is None:
        session.part("sanitize")["errors"].append({"error": "compute-sanitizer was not found"})
        return
    script = [sys.executable, str(SCRIPT.resolve()), "--sanitize-child"]
    for name in ("memcheck", "racecheck", "synccheck"):
        limit = min(120.0, session.left())
        if limit < 20:
            session.part("sanitize")["errors"].append({"error": f"{name}: the time was up"})
            continue
        # every allocation its own, so that memcheck sees where it ends
        where = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [tool, "--tool", name, "--error-exitcode", "9", *script]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=where)
        except subprocess.TimeoutExpired:
            session.part("sanitize")["errors"].append({"error": f"{name}: not done in {limit:.0f} s"})
            continue
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", done.stdout + done.stderr)
        row: dict[str, Any] = {
            "tool": name,
            "code": done.returncode,
            "summary": (summary or ["none"])[-1],
            "ok": not done.returncode,
        }
        if done.returncode:
            row["output"] = (done.stdout + done.stderr)[-3000:]
        session.add("sanitize", row)


def sanitized(device: str) -> int:
    """The child: kernels on the device, the reference on the CPU, so that only our kernels run under the tool."""
    if device == "cuda" and torch_ops.library(device) is None:
        print("there are no kernels to look at", file=sys.stderr)
        return 3
    wrong = 0
    for method in METHODS:
        for dtype in TOLERANCE:
            for kind, length, dim in (("vit", 40, 64), ("vlm", 67, 33), *[("llm", 50, 64)] * (method == "dart")):
                case = Case(kind, method, 2, length, dim, 0.6)
                module = case.module()
                module.needs_assign = True
                given = case.inputs(dtype, "cpu")
                with torch.no_grad():
                    got = module(*(None if t is None else t.to(device) for t in given))
                    row = compare([None if t is None else t.cpu() for t in got], module, given)
                if not row["ok"]:
                    print(case, dtype, row, file=sys.stderr)
                    wrong += 1
    return int(wrong > 0)
