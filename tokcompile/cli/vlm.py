"""`tokcompile vlm`: a vision-language model as a folder of ONNX files, reduced in its vision or language part, or both."""

from __future__ import annotations

import argparse
import json
from typing import Any

import tokcompile
from tokcompile.cli import hf, values
from tokcompile.cli.show import Result, Table
from tokcompile.errors import InputError
from tokcompile.models import load_model

EXAMPLES = """\
examples:
  tokcompile vlm hf:smolvlm --image photograph.jpg --prompt "What is this?" --method dart --budget 0.25 --out folder
  tokcompile vlm mypackage.models:build --method dart --budget tokens:64 --out folder
  tokcompile vlm mypackage.models:build --vision-method divprune --vision-budget 0.5 --out folder \\
      --room 16,64 --tokenizer tokenizer.json --template "USER: {image} {prompt} ASSISTANT:" \\
      --preprocessor preprocessor_config.json

hf:FOLDER is a local transformers folder: config.json, weights, processor and tokenizer.json. Its own processor makes the
example call of --image and --prompt: the number of images, and their shape where a model takes any, are those of every
later call. The text around the images comes from the folder's chat template, or from --template.

A function returns (model, (), inputs): a model of transformers, and an example call with pixel_values, input_ids and what
belongs to them, as the model's processor gives it. Then: tokcompile generate folder --image FILE --prompt TEXT."""

ROOM = 64  # tokens of text


def add_vlm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hf:FOLDER or package.module:function")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of that name")
    group = parser.add_argument_group("reduction in the language part", f"a budget is one of\n{values.BUDGETS}")
    group.add_argument("--method", metavar="NAME", help="see `tokcompile methods` (default: none)")
    group.add_argument("--budget", metavar="BUDGET", help="how many of the image's tokens are left (default 0.5)")
    group.add_argument("--where", metavar="B,B,...", help="layers; 0 is between the projector and the first one")
    group.add_argument("-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    vision = parser.add_argument_group("reduction in the vision part")
    vision.add_argument("--vision-method", metavar="NAME", help="(default: none)")
    vision.add_argument("--vision-budget", metavar="BUDGET", help="(default 0.5)")
    vision.add_argument("--vision-where", metavar="B,B,...", help="blocks, the method's own by default")
    vision.add_argument("--vision-option", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    vision.add_argument("--renumber", action="store_true", help="the tokens left by it get positions without gaps")
    example = parser.add_argument_group("example call, for hf:FOLDER")
    example.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; repeat for several")
    example.add_argument("--prompt", metavar="TEXT", help="the words of a user, or a whole text with {image} in it")
    example.add_argument("--dtype", choices=list(hf.DTYPES), help="of the weights (default float32)")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--room", metavar="N,N,...",
        help="most tokens of text before, between and after the images, or `exact` for those of the example alone (default: "
        f"exact; for hf:FOLDER {ROOM} more than in the example after the last image, if its layers can take padding)",
    )  # fmt: skip
    prompt.add_argument("--tokenizer", metavar="FILE", help="the model's tokenizer.json (default: that of hf:FOLDER)")
    prompt.add_argument("--template", metavar="TEXT", help="the whole text of a prompt, with {image} and {prompt} in it")
    prompt.add_argument("--preprocessor", metavar="FILE", help="the model's preprocessor_config.json")
    prompt.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens there is room for (default 128)")
    prompt.add_argument("--target", metavar="NAME", help="runtime that the files are for, such as onnxruntime")


def vlm(args: argparse.Namespace) -> Result:
    """Splits, reduces, exports, and shows what was done."""
    values.check_folder(args.out, args.overwrite)
    if args.renumber and not args.vision_method:
        raise InputError(
            "--renumber is about tokens that --vision-method leaves, and there is none\n  what to do: -o renumber=true for a "
            "method in the language part"
        )
    example = folder_of(args)
    model, inputs = (example.model, example.inputs) if example else function_of(args)
    room = None if args.room in (None, "exact") else numbers(args.room)
    parts = tokcompile.vlm.split(model, inputs, room=room)
    files = written_beside(args, parts, example)  # what is wrong with them is said before any work is done
    if example and args.room is None and not parts.prompt.in_order:  # else padding would be mixed into the text
        parts = tokcompile.vlm.split(model, inputs, room=[*parts.prompt.room[:-1], parts.prompt.room[-1] + ROOM])
    plans = {}
    if args.vision_method:
        asked = values.reduction(args.vision_method, args.vision_budget, args.vision_where, args.vision_option)
        vision = tokcompile.optimize(*parts.vision, outputs="reduced", **asked)
        parts, plans["vision"] = parts.after(vision, renumber=args.renumber), vision.plan
    asked = (
        values.reduction(args.method, args.budget, args.where, args.option)
        if args.method
        else {"method": "random", "budget": 1.0}
    )
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", **asked)
    plans["language"] = prefill.plan
    options: dict[str, Any] = {"target": args.target} if args.target else {}
    report = tokcompile.vlm.export(
        parts, prefill, args.out, max_new_tokens=args.max_new_tokens, overwrite=args.overwrite, **files, **options,
    )  # fmt: skip
    data = {"model": args.model, "plans": {k: json.loads(p.json()) for k, p in plans.items()}, **json.loads(report.json())}
    prompt = parts.prompt
    found = [("images", str(list(prompt.full))), ("room for text", str(prompt.room)), ("prefill", str(prompt.length))]
    shown = [f"{name}: {plan}" for name, plan in plans.items() if plan.reductions]
    if example and args.room is None and prompt.in_order:
        shown.append(
            "note: layers of this model mix tokens along the sequence and would read padding: texts have exactly the length of "
            "the example's"
        )
    if example and not files["preprocess"]:
        shown.append(
            f"note: how the {type(example.processor.image_processor).__name__} of {args.model} preprocesses images is not "
            "known here: `tokcompile generate` needs ready pixel values (--pixels) instead of --image"
        )
    elif example and not args.preprocessor and (off := example.distance(files["preprocess"])) > hf.SAME:
        shown.append(
            f"note: `tokcompile generate --image` resamples images otherwise than the processor of {args.model}: on the "
            f"example normalised pixel values differ by {off:.3f} in the mean; --pixels takes the processor's own"
        )
    return Result(data, [Table(("prompt", "tokens"), found), *shown, report])


def folder_of(args: argparse.Namespace) -> hf.Example | None:
    """Model and example call of hf:FOLDER. Raises: InputError."""
    if args.model.startswith("hf:"):
        return hf.load(args.model[3:], args.image, args.prompt, args.template, args.dtype or "float32")
    given = [name for name in ("image", "prompt", "dtype") if getattr(args, name)]
    if given:
        raise InputError(
            f"--{given[0]} goes with hf:FOLDER, and {args.model} makes its own example call: let the function return other "
            "inputs, or another model"
        )
    return None


def function_of(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Model and example call of package.module:function. Raises: InputError."""
    made = load_model(args.model)
    if made.args or not made.kwargs:
        raise InputError(f"{args.model} has to return (model, (), inputs), with pixel_values and input_ids among the inputs")
    return made.model, made.kwargs


def written_beside(args: argparse.Namespace, parts: tokcompile.vlm.Parts, example: hf.Example | None) -> dict[str, Any]:
    """The arguments of `tokcompile.vlm.export` that are no graphs. Raises: InputError."""
    files: dict[str, Any] = {
        "tokenizer": args.tokenizer,
        "template": args.template,
        "preprocess": json_file(args.preprocessor) if args.preprocessor else None,
    }
    if example is None:
        return files
    if args.tokenizer is None:
        files |= {"tokenizer": example.tokenizer, "template": example.template(parts)}
    return files if args.preprocessor else files | {"preprocess": example.preprocess(parts)}


def numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(p.strip().isdecimal() for p in parts):
        raise InputError(f"--room {text!r} is not a list of numbers of tokens such as 16,64")
    return [int(p) for p in parts]


def json_file(path: str) -> dict[str, Any]:
    """Raises: InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path!r}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path!r} holds no preprocessing")
    return data
