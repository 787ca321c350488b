"""What can be known of a study before anything is trained: that its forget sets and options fit the data and model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.axes import Distribution
from orchestrator.data import Dataset
from orchestrator.localization import num_selected
from orchestrator.models import factory
from orchestrator.registry import File, Fits, InputError
from orchestrator.seeds import generator
from orchestrator.specs import ForgetSet
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.unlearning import METHODS

PINNED = "files/"  # where users' files are kept in a store


def pinned(study: Study, dataset: Dataset, store: Store) -> Study:
    """The study with the files that its forget sets name checked, copied into the store and named by their content."""
    rules = tuple(_pinned_rule(rule, dataset, store) for rule in study.forget_sets)
    changes: dict[str, Any] = {"forget_sets": rules}
    if study.tuning is not None:
        stands = {name: _pinned_rule(rule, dataset, store) for name, rule in study.tuning.forget_sets.items()}
        changes["tuning"] = study.tuning.model_copy(update={"forget_sets": stands})
    return study.model_copy(update=changes)


def _pinned_rule(rule: ForgetSet, dataset: Dataset, store: Store) -> ForgetSet:
    options = dict(rule.options)
    for name, option in rule.entry.options.items():
        if not option.has_mark(File) or options[name].startswith(PINNED):
            continue
        path = Path(options[name])
        if not path.is_file():
            raise InputError(f"forget file {str(path)!r} does not exist; set forget_sets.{rule.name}.{name} to a file")
        check_forget_set(rule, dataset, lambda given: Path(given).read_bytes())  # errors name the user's own path
        content = path.read_bytes()
        options[name] = f"{PINNED}{hashlib.sha256(content).hexdigest()[:32]}{path.suffix}"
        if not store.exists(options[name]):
            store.put(options[name], content)
    return ForgetSet(name=rule.name, options=options)


def check_forget_set(rule: ForgetSet, dataset: Dataset, files: Callable[[str], bytes]) -> int:
    """Draw the set once on stand-in scores, for its size: what it refuses, it refuses before anything is trained."""
    available = {
        "labels": dataset.split_labels("train"),
        "true_labels": dataset.split_true_labels("train"),
        "class_names": dataset.class_names,
        "memorization": np.zeros(len(dataset.splits["train"])),
        "rng": np.random.default_rng(0),
        "files": files,
    }
    return len(rule.entry(available, rule.options))


def check_stages(study: Study, rule: ForgetSet, size: int) -> None:
    """Raise InputError where a method has more stages than a forget set has examples."""
    for name, arm in study.methods.items():
        if len(arm.stages) > size:
            raise InputError(
                f"method {name} has {len(arm.stages)} stages and forget set {rule.name} has {size} examples; "
                "allowed: a stage for each example at most"
            )


def check_model(study: Study, dataset: Dataset) -> None:
    """Make the model once: it must take images of this size, and budgets and options must fit it."""
    make = factory(study.model.name, study.model.options, dataset.image_shape, dataset.num_classes)
    model = make(generator(0, "check"))
    arms = [each for arm in study.methods.values() for each in (arm, *arm.stages)]
    for arm in arms:
        options = METHODS[arm.method].options
        for option in options.values():
            for fits in option.marks(Fits):
                axis = arm.options.get(option.name, (option.default,))
                for value in axis.values if isinstance(axis, Distribution) else axis:
                    fits.check(model, value)
    entries = sum(parameter.numel() for parameter in model.parameters())
    for budget in {budget for arm in arms for budget in arm.budgets if budget is not None}:
        num_selected(budget, entries)
