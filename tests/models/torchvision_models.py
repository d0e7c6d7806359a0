"""Small torchvision models, and plain PyTorch ones that belong to no library."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from .family import Family, noise, seeded


def _torchvision(module: str, cls: str, size: int, options: dict, batch: int) -> tuple[nn.Module, tuple, dict]:
    """A class of `torchvision.models`."""
    import torchvision

    with seeded():
        model = getattr(getattr(torchvision.models, module), cls)(**options)
    return model.eval(), (noise(batch, 3, size, size),), {}


class PlainEncoder(nn.Module):
    """Patches, a learned position table, `nn.TransformerEncoder` and a mean, as in many tutorials."""

    def __init__(self, batch_first: bool, norm_first: bool):
        super().__init__()
        self.batch_first = batch_first
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.positions = nn.Parameter(torch.zeros(1, 49, 48))
        block = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        if self.batch_first:
            return self.head(self.encoder(x).mean(1))
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


class EinsumBlock(nn.Module):
    """A pre-norm block whose attention is written with einsum and a bias per pair of tokens."""

    def __init__(self, width: int, heads: int, length: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, length, length))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).unbind(2)
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * (c // self.heads) ** -0.5 + self.bias).softmax(-1)
        x = x + self.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class EinsumViT(nn.Module):
    """A hand-written ViT: patches cut by reshape, CLS in front, attention by einsum."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * 8 * 8, 48)
        self.cls = nn.Parameter(torch.zeros(1, 1, 48))
        self.positions = nn.Parameter(torch.zeros(1, 50, 48))
        self.blocks = nn.ModuleList(EinsumBlock(48, 4, 50) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        b, c, h, w = image.shape
        patches = image.reshape(b, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 64)
        x = torch.cat([self.cls.expand(b, -1, -1), self.embed(patches)], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def _plain(cls: type, options: dict, batch: int) -> tuple[nn.Module, tuple, dict]:
    """One of the classes above."""
    with seeded():
        model = cls(**options)
    return model.eval(), (noise(batch, 3, 56, 56),), {}


def _encoder(name: str, note: str = "", **options) -> Family:
    """A `PlainEncoder` row."""
    return Family(f"torch/{name}", partial(_plain, PlainEncoder, options), "torch", 4, note)


_VIT = dict(image_size=56, patch_size=8, num_layers=4, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=10)
_SWIN = dict(patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[7, 7], num_classes=10)

TORCHVISION_FAMILIES: tuple[Family, ...] = (
    Family(
        "torchvision/vit",
        partial(_torchvision, "vision_transformer", "VisionTransformer", 56, _VIT),
        "torchvision",
        4,
        "nn.MultiheadAttention",
    ),
    Family("torchvision/swin", partial(_torchvision, "swin_transformer", "SwinTransformer", 56, _SWIN), "torchvision", 4),
    _encoder("encoder_batch_first", batch_first=True, norm_first=True),
    _encoder("encoder_sequence_first", "tokens are axis 0", batch_first=False, norm_first=True),
    _encoder("encoder_post_norm", batch_first=True, norm_first=False),
    Family("torch/einsum_vit", partial(_plain, EinsumViT, {}), "torch", 4, "attention by einsum, pairwise bias"),
)
