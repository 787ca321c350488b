"""Vision transformers: the one for small data sets of the DEL paper, and torchvision's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.base import MODELS, Transformer
from orchestrator.registry import Count, InputError, ShareBelowOne

Shifts = Literal["pixel", "half_patch"]
Pooling = Literal["class_token", "mean"]


def patches(x: Tensor, size: int) -> Tensor:
    """Cut images [n, channels, height, width] into squares: [n, patches, size * size * channels]."""
    n, channels, height, width = x.shape
    cut = x.reshape(n, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // size) * (width // size), size * size * channels)


def moves(shifts: Shifts, patch_size: int) -> list[tuple[int, int]]:
    """The four shifts, each as rows down and columns right."""
    if shifts == "pixel":
        return [(0, 1), (0, -1), (1, 0), (-1, 0)]
    half = patch_size // 2
    return [(half, half), (-half, half), (half, -half), (-half, -half)]


def shifted(x: Tensor, by: list[tuple[int, int]]) -> Tensor:
    """The image and its shifts, zeros moving in, beside each other as channels."""
    # a negative pad cuts: what moves in on one side leaves on the other
    return torch.cat([x, *(functional.pad(x, (dx, -dx, dy, -dy)) for dy, dx in by)], dim=1)


class ShiftedPatches(nn.Module):
    """Shifted patch tokenization: patches of the image and of its four shifts, normalized and projected."""

    def __init__(self, channels: int, patch_size: int, dim: int, shifts: Shifts) -> None:
        super().__init__()
        self.moves = moves(shifts, patch_size)
        self.patch_size = patch_size
        length = 5 * channels * patch_size**2
        self.norm = nn.LayerNorm(length)
        self.project = nn.Linear(length, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.project(self.norm(patches(shifted(x, self.moves), self.patch_size)))
        return tokens


class LocalAttention(nn.Module):
    """Locality self-attention: no token attends to itself, and the temperature is learned."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.tensor(dim_head**0.5).log())
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.to_qkv(self.norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / self.temperature.exp()
        itself = torch.eye(length, dtype=torch.bool, device=x.device)
        weights = self.dropout(scores.masked_fill(itself, -torch.inf).softmax(dim=-1))
        out: Tensor = self.to_out((weights @ v).transpose(1, 2).reshape(n, length, -1))
        return out


class FeedForward(nn.Sequential):
    """Layer norm and two linear layers."""

    def __init__(self, dim: int, mlp: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, mlp),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp, dim),
            nn.Dropout(dropout),
        )


class SmallDataViT(nn.Module):
    """Shifted patches, a class token, learned positions, blocks of local attention and feed-forward layers."""

    head_prefix = "mlp_head"  # layer norm and linear layer: the released head rule of DEL goes by this name

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        mlp: int,
        dropout: float,
        shifts: Shifts,
        pooling: Pooling,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        num_patches = (image_shape[1] // patch_size) * (image_shape[2] // patch_size)
        self.to_tokens = ShiftedPatches(image_shape[0], patch_size, dim, shifts)
        self.pos_embedding = nn.Parameter(torch.randn(1, num_patches + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.ModuleList([LocalAttention(dim, heads, dim_head, dropout), FeedForward(dim, mlp, dropout)])
            for _ in range(depth)
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.to_tokens(x)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.dropout(tokens + self.pos_embedding)
        for block in self.blocks:
            for layer in block.children():
                tokens = tokens + layer(tokens)
        logits: Tensor = self.mlp_head(tokens.mean(dim=1) if self.pooling == "mean" else tokens[:, 0])
        return logits


def _check_patch(name: str, image_shape: tuple[int, int, int], patch_size: int) -> None:
    _, height, width = image_shape
    if height % patch_size or width % patch_size:
        raise InputError(
            f"model {name}: patch_size is {patch_size}, images are {height}x{width}; allowed: a divisor of both sides"
        )


@MODELS(version=2)
def vit_small_data(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    patch_size: Count = 8,
    dim: Count = 512,
    depth: Count = 4,
    heads: Count = 8,
    dim_head: Count = 64,
    mlp: Count = 1536,
    dropout: ShareBelowOne = 0.0,
    shifts: Shifts = "pixel",
    pooling: Pooling = "class_token",
) -> Transformer:
    """ViT for small data sets: shifted patches and locality self-attention (Lee et al. 2021); sizes as in DEL.

    `shifts`: `pixel`, one pixel right, left, down and up, as released with DEL; `half_patch`, half a patch (rounded
    down) to each corner, as published. `pooling`: the class token alone, or the mean of all tokens, it included.
    """
    _check_patch("vit_small_data", image_shape, patch_size)
    return SmallDataViT(
        image_shape, num_classes, patch_size, dim, depth, heads, dim_head, mlp, dropout, shifts, pooling
    )


@MODELS
def vit(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    patch_size: Count = 4,
    dim: Count = 192,
    depth: Count = 6,
    heads: Count = 3,
    mlp: Count = 768,
) -> Transformer:
    """Plain vision transformer (Dosovitskiy et al. 2021), torchvision's, for square images of three channels."""
    from torchvision.models import VisionTransformer

    _check_patch("vit", image_shape, patch_size)
    channels, height, width = image_shape
    if height != width or channels != 3:
        raise InputError(f"model vit: images are {channels}x{height}x{width}; allowed: three channels, square")
    if dim % heads:
        raise InputError(f"model vit: dim is {dim}, heads is {heads}; allowed: a dim that heads divides")
    made: nn.Module = VisionTransformer(height, patch_size, depth, heads, dim, mlp, num_classes=num_classes)
    return made
