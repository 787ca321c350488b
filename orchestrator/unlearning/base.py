"""The registry of unlearning methods: a model and what the method declares go in, a new model comes out.

A method names in its signature what it is given, and gets nothing else: `model` (the original), `mask` (None: all
parameters), `forget`, `retain`, `validation` (Examples), `fresh` (generator -> new model), `initial` (the
original as it was before its training), `generator`, `training` (how originals are trained), `report` (told after each
epoch), `memorization` (float64, one value per forget example), `stages` (see Stage). What remains, after `*`, are its
options. A method that does not take `model` has no original; one that does not take `mask` has no localization.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from orchestrator.data import Examples
from orchestrator.registry import Registry

Stage = Callable[[nn.Module, Examples, Examples], nn.Module]
"""A registered method with its options, and a mask of its own where it has one, of model, forget and retain part."""

METHODS: Registry[Callable[..., nn.Module]] = Registry(
    "method",
    frozenset(
        {
            *("model", "mask", "forget", "retain", "validation", "fresh", "initial"),
            *("generator", "training", "report", "num_classes", "memorization", "stages"),
        }
    ),
)
