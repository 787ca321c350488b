"""A network for the fastest trainings on 32x32 images, after Keller Jordan's airbench94."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.base import MODELS, check_size
from orchestrator.registry import Count

LOGIT_SCALE = 1 / 9
BATCH_NORM_MOMENTUM = 0.4


def cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine basis of a length, one function per row: float [size, size]."""
    places = torch.arange(size) + 0.5
    basis = torch.cos(math.pi / size * torch.arange(size)[:, None] * places)
    return functional.normalize(basis, dim=1)


def patch_basis(channels: int) -> Tensor:
    """An orthonormal basis of 2x2 patches, float [4 * channels, channels, 2, 2].

    Cosines over rows, columns and colours: of three colours the sum, red less blue, and green less the others.
    """
    colours, sides = cosines(channels), cosines(2)
    return torch.einsum("kc,ly,mx->klmcyx", colours, sides, sides).reshape(4 * channels, channels, 2, 2)


class ShiftedNorm(nn.BatchNorm2d):
    """Batch norm that learns a shift and no scale."""

    def __init__(self, width: int) -> None:
        super().__init__(width, momentum=BATCH_NORM_MOMENTUM)
        del self.weight
        self.register_buffer("weight", torch.ones(width))


class Whitening(nn.Module):
    """2x2 patches in a fixed basis, scaled to unit variance by batch norm, each beside its negative.

    airbench takes the eigenvectors of 5,000 training images; cosines are nearly those of natural images (their
    statistics hardly change when shifted), and the variances come from the model's own batches. So nothing of an
    image that a model was not trained on can be in it.
    """

    basis: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("basis", patch_basis(channels))
        self.norm = ShiftedNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(functional.conv2d(x, self.basis))
        return functional.gelu(torch.cat([x, -x], dim=1))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution whose first channels begin as the identity."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])
    return conv


def _group(inputs: int, outputs: int) -> nn.Module:
    layers = {
        "conv1": _conv(inputs, outputs),
        "pool": nn.MaxPool2d(2),
        "norm1": ShiftedNorm(outputs),
        "gelu1": nn.GELU(),
        "conv2": _conv(outputs, outputs),
        "norm2": ShiftedNorm(outputs),
        "gelu2": nn.GELU(),
    }
    return nn.Sequential(OrderedDict(layers))


class Airbench(nn.Module):
    """Whitened patches, three groups of two convolutions, max pooling, a linear layer without bias, scaled down."""

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.whitening = Whitening(channels)
        self.group1 = _group(8 * channels, width)
        self.group2 = _group(width, 4 * width)
        self.group3 = _group(4 * width, 4 * width)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(4 * width, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group3(self.group2(self.group1(self.whitening(x))))
        logits: Tensor = self.head(torch.flatten(self.pool(x), 1)) * LOGIT_SCALE
        return logits


@MODELS
def airbench(image_shape: tuple[int, int, int], num_classes: int, *, width: Count = 64) -> nn.Module:
    """The network of airbench94 (Jordan 2024, arXiv 2404.00498), on a fixed patch basis in place of eigenvectors.

    `width` channels in the first group, four times as many in the others; images of at least 9x9.
    """
    check_size("airbench", image_shape, 9)
    return Airbench(image_shape[0], num_classes, width)
