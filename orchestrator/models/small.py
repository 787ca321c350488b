"""Classifiers small enough to train hundreds of on a CPU."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from orchestrator.models.base import MODELS, check_size
from orchestrator.registry import Count


def _block(name: str, inputs: int, outputs: int) -> dict[str, nn.Module]:
    return {
        f"conv{name}": nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        f"norm{name}": nn.BatchNorm2d(outputs),
        f"relu{name}": nn.ReLU(inplace=True),
    }


def _head(pool: nn.Module, inputs: int, num_classes: int) -> dict[str, nn.Module]:
    return {"global_pool": pool, "flatten": nn.Flatten(), "head": nn.Linear(inputs, num_classes)}


@MODELS
def small_cnn(image_shape: tuple[int, int, int], num_classes: int, *, width: Count = 16) -> nn.Module:
    """Three 3x3 convolutions with batch norm and one pooling, for images of about 8x8 (14,458 parameters on digits)."""
    check_size("small_cnn", image_shape, 2)
    layers = {
        **_block("1", image_shape[0], width),
        **_block("2", width, 2 * width),
        "pool": nn.MaxPool2d(2),
        **_block("3", 2 * width, 2 * width),
        **_head(nn.AdaptiveAvgPool2d(1), 2 * width, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict({**_block("1", width, width), **_block("2", width, width)}))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


@MODELS
def resnet9(image_shape: tuple[int, int, int], num_classes: int, *, width: Count = 64) -> nn.Module:
    """ResNet-9 (Page 2018): eight convolutions in two residual stages, max pooling, one linear layer.

    `width` channels in the stem, 2, 4 and 8 times as many after it; images of at least 8x8.
    """
    check_size("resnet9", image_shape, 8)
    layers = {
        **_block("1", image_shape[0], width),
        **_block("2", width, 2 * width),
        "pool2": nn.MaxPool2d(2),
        "residual2": _Residual(2 * width),
        **_block("3", 2 * width, 4 * width),
        "pool3": nn.MaxPool2d(2),
        **_block("4", 4 * width, 8 * width),
        "pool4": nn.MaxPool2d(2),
        "residual4": _Residual(8 * width),
        **_head(nn.AdaptiveMaxPool2d(1), 8 * width, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))
