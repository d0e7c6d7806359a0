"""The files of a reduced prefill and its decode step, run in ONNX Runtime by the loop that runs them in PyTorch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcompile.errors import ExportError, InputError
from tokcompile.exports.session import import_onnxruntime, session_options
from tokcompile.exports.verify import from_ort, to_ort
from tokcompile.llm.generate import Loop, Run, Wiring
from tokcompile.llm.layout import Cut, Stage
from tokcompile.llm.tokenizer import read_tokenizer

FORMAT = 1
SPEC = "generate.json"


def read_spec(folder: str) -> tuple[Wiring, dict[str, Any]]:
    """What `spec_json` wrote. Raises: ExportError."""
    path = os.path.join(folder, SPEC)
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        if data["format"] != FORMAT:
            raise ExportError(f"{path} has format {data['format']!r}; this release reads format {FORMAT}")
        stages = [Stage(**{**s, "cuts": tuple(Cut(**c) for c in s["cuts"])}) for s in data["stages"]]
        same = ("prompt", "length", "batch", "max_new_tokens", "logits", "eos", "padded", "placed")
        wiring = Wiring(
            **{name: data[name] for name in same},
            inputs={name: (tuple(shape), dtype) for name, (shape, dtype) in data["inputs"].items()},
            caches=[(c["layer"], c["from"], c["into"], c["out"]) for c in data["caches"]],
            kept=[(k["from"], k["into"]) for k in data["kept"]],
            stages=stages,
            states=[(s["from"], s["into"], s["out"]) for s in data.get("states", ())],
        )
    except OSError as error:
        raise ExportError(
            f"cannot read {path}: {error.strerror}\n  what to do: give a folder that tokcompile.llm.export or "
            "tokcompile.vlm.export wrote"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return wiring, data


class Session:
    """An ONNX file as a function of named tensors. `aliased`: outputs that are written into the buffers of inputs."""

    def __init__(self, path: str, threads: int | None, aliased: Mapping[str, str] | None = None):
        options, providers = session_options("cpu", threads=threads)
        try:
            self.session = import_onnxruntime().InferenceSession(path, options, providers=providers)
        except Exception as error:
            raise ExportError(f"onnxruntime does not load {path}: {(str(error).splitlines() or [''])[0]}") from error
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.aliased = dict(aliased or {})

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {name: feeds[name].contiguous() for name in self.inputs}
        values = {name: to_ort(value) for name, value in given.items()}
        # torch's memory is lent, not copied, so that only the new entry is written (bfloat16 is copied, and comes back whole)
        shared = {o: i for o, i in self.aliased.items() if values[i].data_ptr() == given[i].data_ptr()}
        binding = self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            if name in shared:
                binding.bind_ortvalue_output(name, values[shared[name]])
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        got = dict(zip(self.outputs, binding.get_outputs()))
        return {name: given[shared[name]] if name in shared else from_ort(value) for name, value in got.items()}


class Folder(Loop):
    """What `tokcompile.llm.export` wrote, ready to generate in ONNX Runtime on the CPU. Called as a Generator is."""

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None):
        self.path = os.fspath(folder)
        self.wiring, self.data = read_spec(self.path)
        places = {name: os.path.join(self.path, self.data[name]) for name in ("prefill", "decode", "embeddings")}
        for place in places.values():
            if not os.path.isfile(place):
                raise ExportError(f"{place} is missing: export the model again")
        self.prefill = Session(places["prefill"], threads)
        self.decode = Session(places["decode"], threads, {out: into for _, _, into, out in self.wiring.caches})
        self.embeddings = np.load(places["embeddings"], mmap_mode="r")

    @cached_property
    def tokenizer(self) -> Any:
        """Of tokenizer.json. Raises: InputError."""
        return read_tokenizer(self.path)

    def text(self, text: str) -> dict[str, Tensor]:
        """The inputs of the prefill for a text, as its tokenizer begins and ends it. Raises: InputError."""
        return self.padded(list(self.tokenizer.encode(text).ids))

    def padded(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """The inputs of the prefill for token ids, padded on the left where it takes padding. Raises: InputError."""
        length, mask = self.wiring.length, self.wiring.inputs.get("attention_mask")
        if len(ids) > length or (len(ids) < length and mask is None):
            most = "at most" if mask is not None else "exactly"
            todo = "pass a shorter prompt" if mask is not None else "export it with an attention_mask, for padding"
            raise InputError(
                f"the prompt has {len(ids)} tokens, and {self.path} takes {most} {length}\n"
                f"  what to do: {todo}; or optimize and export for this length"
            )
        empty = length - len(ids)
        feeds = self.prompt([*[0] * empty, *ids])
        if mask is None:
            return feeds
        real = torch.tensor([[0] * empty + [1] * len(ids)] * self.wiring.batch)
        feeds["attention_mask"] = real.to(getattr(torch, mask[1]))
        if len(self.wiring.inputs.get("position_ids", ((),))[0]) == 2:  # padding has no position
            feeds["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
        return feeds

    def prompt(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """The prefill's prompt input for token ids, the same for each row of the batch. Raises: InputError."""
        wrong = [i for i in ids if not 0 <= i < len(self.embeddings)]
        if wrong:
            raise InputError(f"the id {wrong[0]} is not among the {len(self.embeddings)} of the vocabulary")
        row = torch.tensor([list(ids)] * self.wiring.batch, dtype=torch.int64)
        if self.wiring.prompt == "input_ids":
            return {"input_ids": row}
        dtype = getattr(torch, self.wiring.inputs[self.wiring.prompt][1])
        return {self.wiring.prompt: torch.from_numpy(self.embeddings[row.numpy()]).to(dtype)}

    def halves(self) -> tuple[Run, Run]:
        return self.prefill, self.decode


def load(folder: str | os.PathLike[str], *, threads: int | None = None) -> Folder:
    """Loads what `tokcompile.llm.export` wrote. Raises: ExportError."""
    return Folder(folder, threads)
