"""Time to first token of a 135M language model: its prefill with fewer visual tokens over the whole one.

    python -m benchmarks prefill --tokens 576,2880 --removed 0.667,0.889 --pairs 7

Random weights in the shape of SmolLM2-135M; 35 text tokens before the image and 29 after it. Original and reduced prefill
are exported by the same code, give the last token's logits and the caches, and run alternately in one process on one
thread. A/A is the original against itself, the noise. "before" reduces at the entrance of layer 0, "layer 2" inside.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tokcompile
from benchmarks.common import RESULTS, environment, numbers, save, table
from tokcompile import bench
from tokcompile.passes.trace import trace

BEFORE, AFTER = 35, 29
PLACES = {"before": 0, "layer 2": 2}
METHODS = {"before": ("divprune",), "layer 2": ("dart", "fastv")}
SMOL = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
TITLES = (
    "visual tokens", "place", "removed", "method", "left", "FLOPs ratio", "time ratio [quartiles]", "over FLOPs",
    "random there", "selection", "original ms", "reduced ms",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Times every prompt length, and writes the table after each."""
    args, where = arguments(argv), environment()
    rows: list[dict[str, Any]] = []
    with bench.torch_threads(1):
        for count in args.tokens:
            for found in time_prompt(int(count), args):
                rows.append({"tokens": int(count), **found})
                print(table([], [cells(rows[-1])]).splitlines()[-1], flush=True)
            text = table(TITLES, map(cells, rows))
            save(args.out, "prefill", {"rows": rows, "environment": where}, text)
    print("\n" + text)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks prefill", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=numbers, default=[576, 2880], help="visual tokens in the prompt")
    parser.add_argument("--removed", type=numbers, default=[0.667, 0.889], help="shares of them to remove")
    parser.add_argument("--layers", type=int, default=SMOL["num_hidden_layers"])
    parser.add_argument("--runtime", default="onnxruntime", choices=bench.RUNTIMES)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def make_prefill(count: int, layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The prefill of a model with random weights, and the embeddings of a prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMOL, "num_hidden_layers": layers})).eval().requires_grad_(False)
    return tokcompile.llm.Prefill(model), {"inputs_embeds": torch.randn(1, BEFORE + count + AFTER, SMOL["hidden_size"])}


def time_prompt(count: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A/A, then one row for each place, share and method."""
    prefill, inputs = make_prefill(count, args.layers)
    program = trace(prefill, None, inputs).program

    def build(**options: Any) -> Any:
        return tokcompile.optimize(program, None, inputs, spans=[(BEFORE, BEFORE + count)], outputs="reduced", **options)

    original = bench.runner(build(method="random", budget=1.0), args.runtime)
    same = bench.paired(original, original, args.pairs)
    yield {
        "place": "", "removed": "", "method": "A/A", "flops_ratio": 1.0, "ratio": same.median, "low": same.low,
        "high": same.high, "original_ms": same.a * 1e3, "optimized_ms": same.b * 1e3,
    }  # fmt: skip
    for place, layer in PLACES.items():
        for removed in args.removed:
            left = tokcompile.Tokens(round(count * (1 - removed)))
            twin = bench.paired(
                original, bench.runner(build(method="random", budget=left, where=[layer]), args.runtime), args.pairs
            )
            for method in METHODS[place]:
                made = build(method=method, budget=left, where=[layer])
                ratio = bench.paired(original, bench.runner(made, args.runtime), args.pairs)
                yield {"place": place, "removed": removed, **asdict(bench.row(args.runtime, method, "", made, ratio, twin))}


def cells(row: dict[str, Any]) -> list[str]:
    counted = "counts" in row
    return [
        str(row["tokens"]), row["place"], f"{row['removed']:.1%}" if counted else "", row["method"],
        str(row["counts"][-1]) if counted else "", f"{row['flops_ratio']:.3f}",
        f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        f"{row['ratio'] / row['flops_ratio'] - 1:+.1%}" if counted else "",
        f"{row['random_ratio']:.3f}" if counted else "", f"{row['selection']:+.3f}" if counted else "",
        f"{row['original_ms']:.0f}", f"{row['optimized_ms']:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
