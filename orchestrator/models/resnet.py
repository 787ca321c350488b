"""Residual networks (He et al. 2016) with the names and the initialization of torchvision's, on torch alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from orchestrator.models.base import MODELS, check_size

Stem = Literal["auto", "small", "standard"]
SMALL_IMAGE = 64  # below it, `auto` takes the stem for small images


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        result: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return result


class ResNet(nn.Module):
    """Stem, four stages of 64 to 512 channels, mean pooling and one linear layer."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        channels: int,
        num_classes: int,
        small: bool,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(channels, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for place in range(depth):
                width, stride = 64 * 2**stage, 2 if stage and not place else 1
                outputs = width * block.expansion
                changes = stride != 1 or inputs != outputs
                downsample = None
                if changes:  # made only where it is used: it draws from the generator
                    downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
                blocks.append(block(inputs, width, stride, downsample))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if small:
            # only now, as released with DEL: this convolution keeps torch's own initialization (kaiming uniform)
            self.conv1, self.maxpool = _conv(channels, 64, 3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _small(image_shape: tuple[int, int, int], stem: Stem) -> bool:
    return stem == "small" or (stem == "auto" and min(image_shape[1:]) < SMALL_IMAGE)


@MODELS(version=2)
def resnet18(image_shape: tuple[int, int, int], num_classes: int, *, stem: Stem = "auto") -> nn.Module:
    """ResNet-18 (He et al. 2016), equal to torchvision's (11,173,962 parameters on CIFAR-10 with the small stem).

    `stem`: `small` as DEL has it for CIFAR-10 (3x3 convolution without stride, which draws its weights as torch and
    not as torchvision does; no max pooling), `standard` as for ImageNet, `auto`: small below 64 pixels.
    """
    small = _small(image_shape, stem)
    check_size("resnet18", image_shape, 8 if small else 32)
    return ResNet(BasicBlock, (2, 2, 2, 2), image_shape[0], num_classes, small)


@MODELS(version=2)
def resnet50(image_shape: tuple[int, int, int], num_classes: int, *, stem: Stem = "auto") -> nn.Module:
    """ResNet-50 (He et al. 2016), equal to torchvision's; `stem` as in resnet18."""
    small = _small(image_shape, stem)
    check_size("resnet50", image_shape, 8 if small else 32)
    return ResNet(Bottleneck, (3, 4, 6, 3), image_shape[0], num_classes, small)
