"""Naming a model in one word: a Python function, a timm name, a transformers folder or a `.pt2`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcompile.errors import InputError

FORMS = """\
a MODEL is one of
  package.module:function  a callable that returns a module, (module, args) or (module, args, kwargs)
  timm:NAME                timm.create_model(NAME) with random weights, or those of --weights FILE
  hf:FOLDER                a local transformers folder; with only a config.json, random weights
  FILE.pt2                 an exported program, or a model saved with --save"""

WRITE_ONE = "write a function that returns (model, args, kwargs) and name it as package.module:function"


class Named(NamedTuple):
    """A model and its example inputs, as `tokcompile.optimize` takes them."""

    model: Any
    args: tuple[Any, ...] | None
    kwargs: dict[str, Any] | None


def load_model(
    name: str, inputs: Sequence[str] = (), batch: int | None = None, weights: str | os.PathLike[str] | None = None
) -> Named:
    """The model of that name, in eval mode. inputs: shapes like "1x3x224x224:float32" that replace the default ones.

    Raises: InputError that says what is wrong with the name and what to use instead.
    """
    if batch is not None and batch < 1:
        raise InputError(f"the batch size is a positive number, not {batch}")
    kind, colon, rest = name.partition(":")
    if weights is not None and kind != "timm":
        raise InputError(f"--weights goes with timm:NAME, not with {name!r}")
    examples = tuple(example_input(text, batch, seed) for seed, text in enumerate(inputs)) or None
    if name.endswith(".pt2"):
        return from_file(name, examples, batch)
    if not colon:
        raise InputError(f"{name!r} does not name a model; {FORMS}")
    if kind == "timm":
        return from_timm(rest, examples, batch or 1, weights)
    if kind == "hf":
        return from_folder(rest, examples, batch or 1)
    return from_function(kind, rest, examples, batch)


def example_input(text: str, batch: int | None = None, seed: int = 0) -> Tensor:
    """A seeded tensor for "1x3x224x224" or "1x77:int64": normal noise, integers from 0 to 7, or true throughout."""
    sizes, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    parts = sizes.split("x")
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InputError(f"{text!r} is not an input; write its shape and, if need be, its dtype: 1x3x224x224:float32")
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{kind!r} in the input {text!r} is no dtype; it is float32, float16, bfloat16, int64 or bool")
    shape = [int(p) for p in parts]
    if batch is not None:
        shape[0] = batch
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    return torch.randint(8, shape, generator=generator).to(dtype)


def from_file(name: str, examples: tuple[Tensor, ...] | None, batch: int | None) -> Named:
    """A `.pt2`; its example inputs and its batch size are in the file."""
    if batch is not None and examples is None:
        raise InputError(f"{name} was exported with a fixed batch size: export it again with --batch {batch}")
    if not os.path.isfile(name):
        raise InputError(f"there is no file {name}")
    return Named(name, examples, None)


def from_function(module: str, path: str, examples: tuple[Tensor, ...] | None, batch: int | None) -> Named:
    """What `module:path` returns, or the module that it is."""
    made = find_object(module, path)
    name = f"{module}:{path}"
    if not isinstance(made, torch.nn.Module):
        made, batch = call(made, name, batch)
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], (torch.nn.Module, torch.export.ExportedProgram)):
        raise InputError(
            f"{name} returned {describe(made)}; it has to return a module, (module, args) or (module, args, kwargs)"
        )
    if isinstance(parts[0], torch.nn.Module):
        parts[0].eval()
    args, kwargs = (*parts[1:], None, None)[:2]
    args = tuple(args) if isinstance(args, (list, tuple)) else args if args is None else (args,)
    if examples is not None:
        return Named(parts[0], examples, kwargs)
    if batch is not None:
        raise InputError(f"{name} fixes its own example inputs: give it a parameter `batch`, or pass --input")
    if not args and not kwargs and isinstance(parts[0], torch.nn.Module):
        raise InputError(f"{name} returns no example inputs: pass --input 1x3x224x224, or return (module, args)")
    return Named(parts[0], args, kwargs)


def describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"


def call(function: Any, name: str, batch: int | None) -> tuple[Any, int | None]:
    """What the function returns, and the batch size if it could not be passed to it."""
    if not callable(function):
        raise InputError(f"{name} is {describe(function)}; it has to be a function that returns a module")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return function(), batch
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in free and p.name != "batch"]
    if needed:
        raise InputError(
            f"{name} needs the argument{'s' * (len(needed) > 1)} {', '.join(needed)}, but only `batch` is passed: "
            "wrap it in a function without other parameters"
        )
    if "batch" not in parameters:
        return function(), batch
    default = parameters["batch"].default
    return function(batch=batch or (1 if default is inspect.Parameter.empty else default)), None


def find_object(module: str, path: str) -> Any:
    """Imports `module` (the current folder counts) and returns the attribute `path` of it."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise InputError(f"there is no module {error.name!r} to import {module}:{path} from; {FORMS}") from error
        raise InputError(f"importing {module} failed: {error}") from error
    except (ImportError, SyntaxError) as error:
        raise InputError(f"importing {module} failed: {type(error).__name__}: {error}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{module!r} is not the name of a module; {FORMS}") from error
    for part in path.split("."):
        if not hasattr(value, part):
            known = [n for n in vars(value) if not n.startswith("_")] if hasattr(value, "__dict__") else []
            raise InputError(f"{module} has no {path!r}{nearest(part, known)}")
        value = getattr(value, part)
    return value


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" where something is near."""
    near = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def from_timm(name: str, examples: tuple[Tensor, ...] | None, batch: int, weights: str | os.PathLike[str] | None) -> Named:
    """A timm model; its input size is the one in its configuration. Nothing is downloaded."""
    timm = require("timm", f"timm:{name}")
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise InputError(f"timm has no model {name!r}{hint or '; timm.list_models() lists all'}")
    if weights is not None and not os.path.isfile(weights):
        raise InputError(f"there is no weight file {os.fspath(weights)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False)
    if weights is not None:
        load_weights(timm, model, os.fspath(weights), name)
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if examples is None and not size:
        raise InputError(f"timm does not say what timm:{name} takes: pass --input 1x3x224x224")
    return Named(model.eval(), examples or (example_input("x".join(map(str, [batch, *(size or ())]))),), None)


def load_weights(timm: Any, model: torch.nn.Module, path: str, name: str) -> None:
    try:
        timm.models.load_checkpoint(model, path)
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not hold weights for timm:{name}: {type(error).__name__}: {first}") from error


def from_folder(folder: str, examples: tuple[Tensor, ...] | None, batch: int) -> Named:
    """A transformers model that reads images, from a local folder."""
    transformers = require("transformers", f"hf:{folder}")
    path = folder_of(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
        if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            model = transformers.AutoModel.from_pretrained(str(path), local_files_only=True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    return Named(model.eval(), (), {"pixel_values": pixels(folder, model, config, examples, batch)})


def folder_of(folder: str) -> Path:
    """A local transformers folder. Raises: InputError."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"there is no folder {folder!r}; hf: takes a local folder and downloads nothing")
    if not (path / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json; hf: takes a folder that save_pretrained wrote")
    return path


def pixels(folder: str, model: Any, config: Any, examples: tuple[Tensor, ...] | None, batch: int) -> Tensor:
    """The example image. Raises: InputError for models that read anything else."""
    kind = type(model).__name__
    if model.main_input_name != "pixel_values":
        part = "; for its image part alone, let it return model.vision_model" if hasattr(model, "vision_model") else ""
        raise InputError(f"hf:{folder} is a {kind}, which reads {model.main_input_name}: {WRITE_ONE}{part}")
    if examples is not None:
        if len(examples) != 1:
            raise InputError(f"hf:{folder} takes one --input, its pixel_values; for more, {WRITE_ONE}")
        return examples[0]
    size = getattr(config, "image_size", None)
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if not size:
        raise InputError(f"the config of {folder} has no image_size: pass --input {batch}x3x224x224")
    rows, columns = (size, size) if isinstance(size, int) else size
    return example_input(f"{batch}x{getattr(config, 'num_channels', 3)}x{rows}x{columns}")


def require(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{name} needs {package}: pip install 'tokcompile[{package}]' ({error})") from error
