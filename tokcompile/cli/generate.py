"""`tokcompile generate`: text from a folder that `tokcompile.llm.export` wrote."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tokcompile.cli.show import Result
from tokcompile.errors import InputError

EXAMPLES = """\
examples:
  tokcompile generate folder --prompt-embeds prompt.npy --max-new-tokens 64
  tokcompile generate folder --ids 1,15,7,9 --temperature 0.7 --top-k 40 --seed 0 --json"""


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="what tokcompile.llm.export wrote")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-embeds", metavar="FILE.npy", help="embeddings of the prompt, of shape (batch, length, width)")
    prompt.add_argument("--ids", metavar="ID,ID,...", help="token ids of the prompt")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to generate (default: as many as fit)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after a token that ends a text")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws")
    parser.add_argument("--threads", type=int, metavar="N", help="of onnxruntime")


def generate(args: argparse.Namespace) -> Result:
    """Runs prefill and decode steps in ONNX Runtime on the CPU."""
    from tokcompile.llm import Sampling, load

    folder = load(args.folder, threads=args.threads)
    inputs = embeddings(args.prompt_embeds, folder.wiring) if args.prompt_embeds else folder.prompt(ids(args.ids))
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    made = folder(max_new_tokens=args.max_new_tokens, eos=() if args.ignore_eos else None, sampling=sampling, **inputs)
    rows = made.tokens.tolist()
    speed = made.tokens_per_second
    data = {
        "folder": args.folder,
        "tokens": rows,
        "time_to_first_token_ms": made.first_token_ms,
        "tokens_per_second": speed,
        "method": folder.data["method"],
        "prompt_tokens": folder.wiring.length,
        "cached_tokens": {f"{s.first}-{s.last}": s.length for s in folder.wiring.stages},
    }
    parts = [" ".join(map(str, row)) for row in rows]
    parts.append(
        f"time to first token {made.first_token_ms:.1f} ms"
        + (f", then {speed:.1f} tokens/s" if speed is not None else "")
        + f" ({folder.data['method']}; {folder.wiring.length} prompt tokens, kept per layer: "
        + f"{json.dumps(data['cached_tokens'])[1:-1]})"
    )
    return Result(data, parts)


def ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--ids {text!r} is not a list of token ids such as 1,15,7")
    return [int(part) for part in parts]


def embeddings(path: str, wiring: Any) -> dict[str, Any]:
    """The prompt from a .npy file; one of (length, width) is taken for every row of the batch. Raises: InputError."""
    import numpy as np
    import torch

    if wiring.prompt != "inputs_embeds":
        raise InputError(f"this prefill takes {wiring.prompt}, and no embeddings: pass --ids")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the embeddings {path!r}: {error}") from error
    if array.ndim == 2:
        array = np.broadcast_to(array, (wiring.batch, *array.shape))
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{path} holds {array.dtype}, and embeddings are floats: pass token ids by --ids")
    dtype = getattr(torch, wiring.inputs["inputs_embeds"][1])
    return {"inputs_embeds": torch.from_numpy(np.ascontiguousarray(array)).to(dtype)}
