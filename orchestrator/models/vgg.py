"""VGG-16 in the form that is customary on small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orchestrator.models.base import MODELS, check_size
from orchestrator.registry import Count

STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels of each convolution, in multiples of the width


class VGG(nn.Module):
    """Five stages of 3x3 convolutions with batch norm, each followed by pooling; mean pooling and one linear layer."""

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in STAGES:
            for multiple in stage:
                outputs = multiple * width
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


@MODELS
def vgg16(image_shape: tuple[int, int, int], num_classes: int, *, width: Count = 64) -> nn.Module:
    """VGG-16 with batch norm (Simonyan and Zisserman 2015); one linear layer after mean pooling, as usual on CIFAR."""
    check_size("vgg16", image_shape, 32)
    return VGG(image_shape[0], num_classes, width)
