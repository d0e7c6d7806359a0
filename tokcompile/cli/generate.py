"""`tokcompile generate`: text from a folder that `tokcompile.llm.export` or `tokcompile.vlm.export` wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from tokcompile.cli.show import Result
from tokcompile.errors import InputError

EXAMPLES = """\
examples:
  tokcompile generate folder --image photograph.jpg --prompt "What is this?"
  tokcompile generate folder --image before.jpg --image after.jpg --prompt "What has changed?"
  tokcompile generate folder --prompt "Once upon a time"                   # a language model alone, with its tokenizer.json
  tokcompile generate folder --pixels inputs.npz --prompt "What is this?"  # numpy.savez("inputs.npz", **processor(...))
  tokcompile generate folder --pixels pixels.npy --ids 1,15,32000,7,9      # one placeholder id for each image
  tokcompile generate folder --prompt-embeds prompt.npy --max-new-tokens 64
  tokcompile generate folder --ids 1,15,7,9 --temperature 0.7 --top-k 40 --seed 0 --json"""


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="what tokcompile.llm.export or tokcompile.vlm.export wrote")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text of the prompt, where the folder has a tokenizer.json")
    prompt.add_argument("--prompt-embeds", metavar="FILE.npy", help="embeddings of the prompt, of shape (batch, length, width)")
    prompt.add_argument("--ids", metavar="ID,ID,...", help="token ids of the prompt")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image; repeat it for each one that the folder was exported for",
    )
    parser.add_argument("--stretch", action="store_true", help="take an image of another shape than the model was made for")
    parser.add_argument(
        "--pixels",
        metavar="FILE",
        help="instead of --image: pixel values as the vision part takes them (.npy), or all that a processor gives (.npz), of "
        "which the layout of the images is checked",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to generate (default: as many as fit)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after a token that ends a text")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws")
    parser.add_argument("--threads", type=int, metavar="N", help="of onnxruntime")


def generate(args: argparse.Namespace) -> Result:
    """Runs the graphs of a folder in ONNX Runtime on the CPU."""
    from tokcompile.llm import Sampling, load
    from tokcompile.vlm import folder as images

    sampling = Sampling(args.temperature, args.top_k, args.seed)
    options: dict[str, Any] = dict(max_new_tokens=args.max_new_tokens, eos=() if args.ignore_eos else None, sampling=sampling)
    if images.has_images(args.folder):
        seeing = images.load(args.folder, threads=args.threads)
        made = seeing(**with_images(seeing, args), **options)
        text = [seeing.tokenizer.decode(row) for row in made.tokens.tolist()] if args.prompt is not None else None
        return shown(args, seeing.text, made, text, layout_of(seeing, args))
    folder = load(args.folder, threads=args.threads)
    if args.image or args.pixels:
        option = "--image" if args.image else "--pixels"
        raise InputError(f"{args.folder} is a language model that takes no images: leave {option} out")
    if args.prompt is not None:
        made = folder(**{**folder.text(args.prompt), **options})
        return shown(args, folder, made, [folder.tokenizer.decode(row) for row in made.tokens.tolist()])
    inputs = embeddings(args.prompt_embeds, folder.wiring) if args.prompt_embeds else folder.padded(ids(args.ids))
    return shown(args, folder, folder(**inputs, **options), None)


def with_images(folder: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Pixel values, ids and attention mask. Raises: InputError."""
    if args.prompt_embeds:
        raise InputError(f"{args.folder} makes its own embeddings, with an image in them: pass --prompt or --ids")
    if bool(args.image) == bool(args.pixels):
        raise InputError(f"{args.folder} is a vision-language model: pass --image FILE or --pixels FILE.npz")
    texts = folder.texts(args.prompt) if args.prompt is not None else folder.prompt.texts_of(ids(args.ids))
    prompt, mask = folder.lay_out(texts)
    seen = folder.arrays(args.pixels) if args.pixels else {"pixel_values": folder.pixels(args.image, args.stretch)}
    return seen | {"input_ids": prompt, "attention_mask": mask}


def layout_of(folder: Any, args: argparse.Namespace) -> list[str]:
    """What nobody checks where only the pixel values are given."""
    if not args.pixels or args.pixels.endswith(".npz") or (folder.preprocess and not folder.fixed):
        return []
    known = "".join(f", {name} {value.tolist()}" for name, value in folder.fixed.items())
    return [
        f"note: images and tiles have to lie as in the example that {args.folder} was made from{known}; in a .npz file of all "
        "that the processor gives this is checked"
    ]


def shown(args: argparse.Namespace, folder: Any, made: Any, text: list[str] | None, notes: Sequence[str] = ()) -> Result:
    rows = made.tokens.tolist()
    speed = made.tokens_per_second
    method = folder.data["method"] if folder.data["plan"]["reductions"] else None
    data = {
        "folder": args.folder,
        "tokens": rows,
        **({} if text is None else {"text": text}),
        "time_to_first_token_ms": made.first_token_ms,
        "tokens_per_second": speed,
        "method": method,
        "prompt_tokens": folder.wiring.length,
        "cached_tokens": {f"{s.first}-{s.last}": s.length for s in folder.wiring.stages},
    }
    parts = [" ".join(map(str, row)) for row in rows] if text is None else list(text)
    parts.append(
        f"time to first token {made.first_token_ms:.1f} ms"
        + (f", then {speed:.1f} tokens/s" if speed is not None else "")
        + f" ({method or 'no tokens removed'}; {folder.wiring.length} prompt tokens, kept per layer: "
        + f"{json.dumps(data['cached_tokens'])[1:-1]})"
    )
    return Result(data, [*parts, *notes])


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
