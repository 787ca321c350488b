"""The registry of image classifiers, how they are made, and which parameters are their head."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from orchestrator.registry import Entry, InputError, Registry, Value

Factory = Callable[[torch.Generator], nn.Module]
"""Makes a newly initialized model of one architecture (what methods call `fresh`)."""


@dataclass(frozen=True)
class RowMeans:
    """Marks models whose channel scores are plain means, as DEL's authors have it for transformers."""


Transformer = Annotated[nn.Module, RowMeans()]
"""What a function returns that makes a transformer."""

MODELS: Registry[Callable[..., nn.Module]] = Registry("model", frozenset({"image_shape", "num_classes"}))


def is_transformer(entry: Entry[Any]) -> bool:
    """Whether a model says that it is a Transformer."""
    hint = typing.get_type_hints(entry.function, include_extras=True).get("return")
    return any(isinstance(mark, RowMeans) for mark in getattr(hint, "__metadata__", ()))


def factory(name: str, options: Mapping[str, Value], image_shape: tuple[int, int, int], num_classes: int) -> Factory:
    """A function from a generator to a new model in channels_last layout; the same stream gives the same weights.

    `image_shape` is channels, height, width.
    """
    entry = MODELS[name]
    resolved = entry.resolve(options)

    def fresh(generator: torch.Generator) -> nn.Module:
        seed = int(torch.randint(2**62, (1,), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model: nn.Module = entry({"image_shape": image_shape, "num_classes": num_classes}, resolved)
        return model.to(memory_format=torch.channels_last)

    return fresh


def check_size(name: str, image_shape: tuple[int, int, int], smallest: int) -> None:
    """Raise InputError where images are too small for a model."""
    if min(image_shape[1:]) < smallest:
        raise InputError(
            f"model {name}: images are {image_shape[1]}x{image_shape[2]}; allowed: {smallest} pixels a side or more"
        )


def head_names(model: nn.Module) -> frozenset[str]:
    """The parameters of the classifier: what the model names `head_prefix`, else its last linear layer as defined."""
    declared = getattr(model, "head_prefix", None)
    if declared is not None:
        return frozenset(name for name, _ in model.named_parameters() if name.startswith(f"{declared}."))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    prefix = f"{linear[-1]}." if linear and linear[-1] else ""
    return frozenset(name for name, _ in model.named_parameters() if linear and name.startswith(prefix))
