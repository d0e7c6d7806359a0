"""The parser: every command, option and help text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import tokcompile
from tokcompile.bench import RUNTIMES
from tokcompile.cli import commands, generate, values, vlm
from tokcompile.models import FORMS

DESCRIPTION = "Compiles static visual-token reduction into a vision transformer, and says what it did."
EXAMPLES = """\
examples:
  tokcompile inspect timm:vit_base_patch16_224
  tokcompile check mypackage.models:build
  tokcompile optimize timm:vit_base_patch16_224 --method tome --budget flops:0.7 --onnx vit.onnx
  tokcompile bench timm:vit_small_patch16_224 --method tome,topk --budget 0.5 --runtime onnxruntime
  tokcompile COMMAND --help

exit codes: 0 done; 1 a check failed, or an unexpected error with its traceback; 2 wrong usage, or
a model that cannot be reduced as asked (with the reason)"""

OPTIMIZE = """\
examples:
  tokcompile optimize timm:deit_small_patch16_224 --budget tokens:98 --save deit.pt2
  tokcompile optimize mypackage.models:build --method evit --where 3,6,9 -o fuse=false
  tokcompile optimize decoder.pt2 --method dart --span 5:30 --onnx decoder.onnx --inline
  tokcompile optimize timm:vit_base_patch16_224 --save-plan plan.json     # edit the plan, then
  tokcompile optimize timm:vit_base_patch16_224 --plan plan.json"""

BUILD = """\
examples:
  tokcompile build timm:vit_base_patch16_224 --backend tensorrt_rtx --precision fp16 --engine vit.engine
  tokcompile build mypackage.models:build --plan plan.json --plugins --engine model.plan     # on the machine with the GPU"""

BUNDLE = """\
examples:
  tokcompile bundle timm:vit_base_patch16_224 --target jetson-orin --precision fp16 --out vit-orin
  tokcompile bundle mypackage.models:build --plan plan.json --target x86 --out vit-x86

It writes a folder and an archive; on the device its README.md says how to go on: ./build.sh, ./verify.py, ./run.py."""

INSPECT = """\
examples:
  tokcompile inspect timm:vit_base_patch16_224
  tokcompile inspect mypackage.models:build --input 1x3x384x384 --json"""

CHECK = """\
examples:
  tokcompile check timm:vit_base_patch16_224 --batch 2
  tokcompile check decoder.pt2 --span 5:30 --blocks 0,6

Three oracles need no reference code.
  permutation  all tokens are kept, in random order; every output stays what it was
  masked keys  half the tokens are dropped; the others are what the original gives when nobody attends to those
  copies       half the tokens become copies of the others; merging each with its copies changes no output"""

BENCH = """\
examples:
  tokcompile bench timm:vit_small_patch16_224 --method tome,evit --budget 0.5 --budget flops:0.7
  tokcompile bench mypackage.models:build --batch 8 --threads 4 --runtime eager,onnxruntime --pairs 31

columns:
  FLOPs      FLOPs over those of the original, without choosing and merging
  ratio      CPU time over that of the original in the same runtime: median and quartiles over alternating pairs
  overhead   ratio - FLOPs: what the FLOPs do not explain
  random     ratio of random selection at the same blocks and token counts
  selection  ratio - random: what choosing and merging the tokens costs
  ms, of     CPU milliseconds of one call, and of one call of the original
The A/A line times the original against itself: differences smaller than its spread say nothing."""

DEMO = """\
examples:
  tokcompile demo
  tokcompile demo --quick --out demo-out --image photograph.jpg"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; `run` in them is the command's function. Exits with 2 on wrong usage."""
    parser = make_parser()
    args = parser.parse_args(argv)
    problem = conflict(args)
    if problem:
        parser.error(f"{args.command}: {problem}")
    return args


def conflict(args: argparse.Namespace) -> str | None:
    """Which options do not go together."""
    if args.command not in ("optimize", "build", "bundle"):
        return None
    if args.plan:
        given = {"--method": args.method, "--budget": args.budget, "--where": args.where, "--span": args.span}
        given |= {"-o": args.option, "--outputs": args.outputs, "--recover": args.recover}
        both = [name for name, value in given.items() if value]
        if both:
            return f"--plan says all that {', '.join(both)} would say: edit the plan file instead"
    if args.command == "optimize" and not args.onnx and (args.target or args.inline):
        return f"{'--target' if args.target else '--inline'} goes with --onnx FILE"
    return None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tokcompile", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"tokcompile {tokcompile.__version__}")
    made = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_optimize(command(made, "optimize", commands.optimize, "insert token reduction and save the result", OPTIMIZE))
    add_build(command(made, "build", commands.build, "build a TensorRT or TensorRT-RTX engine", BUILD))
    add_bundle(command(made, "bundle", commands.bundle, "write a folder to deploy on a Jetson or a server", BUNDLE))
    model_arguments(command(made, "inspect", commands.inspect, "show the blocks and tokens found in a model", INSPECT))
    add_check(command(made, "check", commands.check, "check that the pass understands a model", CHECK))
    command(made, "methods", commands.methods, "list the reduction methods", None)
    add_bench(command(made, "bench", commands.bench, "time the original against optimized models", BENCH))
    text = "write a vision-language model as a folder of ONNX files"
    vlm.add_vlm(command(made, "vlm", vlm.vlm, text, vlm.EXAMPLES))
    text = "generate text from a folder of ONNX files"
    generate.add_generate(command(made, "generate", generate.generate, text, generate.EXAMPLES))
    add_demo(command(made, "demo", commands.demo, "run everything on a trained model and a photograph", DEMO))
    return parser


def command(made: Any, name: str, run: Any, text: str, epilog: str | None) -> argparse.ArgumentParser:
    """One subcommand, with --json."""
    sub: argparse.ArgumentParser = made.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sub.set_defaults(run=run, captures=name != "demo")  # the demo prints its tables as it goes
    sub.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    return sub


def model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", FORMS)
    group.add_argument("model", metavar="MODEL", help="see above; it is put in eval mode")
    group.add_argument(
        "--input", action="append", default=[], metavar="SHAPE[:DTYPE]",
        help="example input such as 1x3x224x224 or 1x77:int64, instead of the model's own; repeat for several",
    )  # fmt: skip
    group.add_argument("--batch", type=int, metavar="N", help="batch size of the example inputs")
    group.add_argument("--weights", metavar="FILE", help="weight file for timm:NAME")


def reduction_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("reduction", f"a budget is one of\n{values.BUDGETS}")
    group.add_argument("--where", metavar="B,B,...", help="blocks to reduce at, by number or module path")
    span_argument(group)
    group.add_argument(
        "-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="option of the method; repeat for more"
    )
    group.add_argument("--outputs", choices=("keep", "reduced"), help="outputs as the original has them (default keep)")
    group.add_argument(
        "--recover", choices=("end", "anywhere", "never"), help="where dropped tokens may be given back (default end)"
    )
    group.add_argument("--plain-mean", action="store_true", help="mean pooling ignores the size of merged tokens")
    return group


def span_argument(parser: Any) -> None:
    parser.add_argument(
        "--span", action="append", default=[], metavar="START:STOP",
        help="where the visual tokens lie, if the graph does not say (language models)",
    )  # fmt: skip


def method_arguments(parser: argparse.ArgumentParser) -> None:
    """All that `commands.optimize_as_asked` reads."""
    model_arguments(parser)
    group = reduction_arguments(parser)
    group.add_argument("--method", metavar="NAME", help="see `tokcompile methods` (default tome)")
    group.add_argument("--budget", metavar="BUDGET", help="how many tokens are left (default 0.5)")
    group.add_argument("--plan", metavar="FILE", help="carry out this plan instead")


def add_build(parser: argparse.ArgumentParser) -> None:
    method_arguments(parser)
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", required=True, metavar="FILE", help="the engine to write")
    group.add_argument(
        "--backend", default="tensorrt", choices=("tensorrt", "tensorrt_rtx"),
        help="tensorrt builds for the GPU of this machine (default); tensorrt_rtx needs none",
    )  # fmt: skip
    group.add_argument("--target", metavar="NAME", help="what the engine is for, such as jetpack6 (default: the backend)")
    group.add_argument("--precision", metavar="NAME", help="fp16 or bf16 converts the model (default: as it is)")
    group.add_argument(
        "--plugins", action=argparse.BooleanOptionalAction, help="one plugin layer per reduction (default: with a library)"
    )
    group.add_argument("--plugin-library", metavar="FILE.so", help="the plugin library (default: built for this machine)")
    group.add_argument("--compute-capability", action="append", metavar="SM..", help="for tensorrt_rtx; repeat for several")
    group.add_argument("--profile", metavar="MIN:BEST:MAX", help="batch sizes that the engine takes (default: one, as given)")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    method_arguments(parser)
    group = parser.add_argument_group("bundle")
    group.add_argument("--out", required=True, metavar="DIR", help="the folder to write; DIR.tar.gz goes beside it")
    group.add_argument("--target", required=True, metavar="NAME", help="jetson-orin, jetson-thor or x86")
    group.add_argument("--precision", metavar="NAME", help="fp16 or bf16 converts the model (default: as it is)")
    group.add_argument("--form", metavar="NAME", help="plugin or plain writes one ONNX file only (default: both)")
    group.add_argument("--name", metavar="NAME", help="of the model in Triton (default: that of the folder)")
    group.add_argument("--plugin-library", metavar="FILE.so", help="add this library, which was built for the target")
    group.add_argument("--no-archive", action="store_true", help="write no DIR.tar.gz")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier bundle of that name")


def add_optimize(parser: argparse.ArgumentParser) -> None:
    method_arguments(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--save", metavar="FILE.pt2", help="save the optimized model, for tokcompile.load")
    files.add_argument("--save-plan", metavar="FILE.json", help="save the plan, which --plan reads")
    files.add_argument("--onnx", metavar="FILE.onnx", help="export the optimized model to ONNX and verify it")
    files.add_argument("--target", metavar="NAME", help="runtime that the ONNX file is for, such as onnxruntime")
    files.add_argument("--inline", action="store_true", help="write ONNX without local functions")


def add_check(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    span_argument(parser)
    parser.add_argument("--blocks", metavar="B,B,...", help="blocks to check (default: first, middle and last)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the shaken parameters (default 0)")


def add_bench(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    group = reduction_arguments(parser)
    group.add_argument("--method", action="append", metavar="NAME,...", help="methods beside random (default tome)")
    group.add_argument("--budget", action="append", metavar="BUDGET", help="repeat for several (default 0.5)")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--pairs", type=int, default=15, metavar="N", help="measurements of each (default 15)")
    timing.add_argument("--threads", type=int, default=1, metavar="N", help="of torch and onnxruntime (default 1)")
    timing.add_argument("--runtime", action="append", metavar="NAME,...", help=f"among {', '.join(RUNTIMES)} (default eager)")


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="folder for the results (default demo-out)")
    parser.add_argument("--image", metavar="PATH", help="your own photograph")
    parser.add_argument("--quick", action="store_true", help="fewer methods and shorter timing")
