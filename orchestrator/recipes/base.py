"""The registry of recipes, and the arms that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from orchestrator.arms import Arm
from orchestrator.axes import Axis
from orchestrator.registry import Registry
from orchestrator.specs import ForgetSet, Strategy
from orchestrator.study import Study

RECIPES: Registry[Callable[[], Study]] = Registry("recipe", frozenset())

Options = Mapping[str, Axis]
Granularity = Literal["param", "channel"]

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)


def arms(*, epochs: int, batch_size: int, budget: tuple[float, ...] = BUDGETS) -> dict[str, Arm]:
    """DEL, SalUn, the methods without a mask and the controls, all with as many epochs; each rate is its own row."""
    shared = {"epochs": (epochs,), "batch_size": (batch_size,)}
    weighted = Strategy(name="weighted_gradient")
    return {
        "identity": Arm(method="identity"),
        "retrain_short": Arm(method="retrain_short", options={"lr": (0.1,), **shared}),
        "del": Arm(
            method="reset_and_finetune", options={"lr": (0.03, 0.1), **shared}, strategy=weighted, budget=budget
        ),
        "random_within_tensor": Arm(
            method="reset_and_finetune",
            options={"lr": (0.03, 0.1), **shared},
            strategy=Strategy(name="random_within_tensor"),
            base=weighted,
            budget=budget,
        ),
        "salun": Arm(
            method="random_labels",
            options={"lr": (0.003, 0.01), "redraw": (True,), **shared},
            strategy=Strategy(name="gradient"),
            granularity="param",
            budget=budget,
        ),
        "finetune": Arm(method="finetune", options={"lr": (0.03, 0.1), **shared}),
        "neg_grad_plus": Arm(method="neg_grad_plus", options={"lr": (0.01, 0.03), **shared}),
        "random_labels": Arm(method="random_labels", options={"lr": (0.003, 0.01), **shared}),
    }


FORGET_SETS = (ForgetSet(name="random"), ForgetSet(name="mislabelled"), ForgetSet(name="most_memorized"))


CRITMEM = Strategy(name="critmem", options={"batch_size": 64, "draws": 1, "num_examples": 100})
"""CritMem at the cost of a laptop: the union over a hundred forget examples, one draw of noise each."""


def localizations(
    *, budget: tuple[float, ...], options: Options, h: str = "released", critical: Strategy = CRITMEM
) -> dict[str, Arm]:
    """Every localization of the paper under reset-and-finetune, with the controls: which parameters should be reset."""

    def arm(strategy: str, granularity: Granularity = "channel", base: str | None = None) -> Arm:
        return Arm(
            method="reset_and_finetune",
            options=options,
            strategy=Strategy(name=strategy),
            base=None if base is None else Strategy(name=base),
            granularity=granularity,
            budget=budget,
            h=h,
        )

    return {
        "del": arm("weighted_gradient"),
        "weighted_gradient_param": arm("weighted_gradient", "param"),
        "gradient_channel": arm("gradient"),
        "salloc": arm("gradient", "param"),
        "weight_magnitude": arm("weight_magnitude"),
        "forget_agnostic": arm("weighted_gradient_train"),
        "random": arm("random"),
        "random_within_tensor": arm("random_within_tensor", base="weighted_gradient"),
        "shallowest": arm("shallowest"),
        "deepest": arm("deepest"),
        "critmem": Arm(method="reset_and_finetune", options=options, strategy=critical, budget=(None,)),
    }


def rivals(*, epochs: int, batch_size: int, budget: tuple[float, ...]) -> dict[str, Arm]:
    """The methods that the paper compares with, and the further ones, each at its published rate unless it says so."""
    shared = {"epochs": (epochs,), "batch_size": (batch_size,)}
    batch = {"batch_size": (batch_size,)}
    return {
        "identity": Arm(method="identity"),
        "retrain_short": Arm(method="retrain_short", options={"lr": (0.1,), **shared}),
        "finetune": Arm(method="finetune", options={"lr": (0.01, 0.1), **shared}),
        "l1_sparse": Arm(method="l1_sparse", options={"lr": (0.01, 0.1), **shared}),
        "neg_grad_plus": Arm(method="neg_grad_plus", options={"alpha": (0.95, 0.99), **batch}),
        "gradient_ascent": Arm(method="gradient_ascent", options={"lr": (1e-4, 1e-3), **batch}),
        "random_labels": Arm(method="random_labels", options={"lr": (0.01,), **shared}),
        "salun": Arm(
            method="random_labels",
            options={"lr": (0.013,), "redraw": (True,), "order": ("forget_first",), "final": (1.0,), **shared},
            strategy=Strategy(name="gradient"),
            granularity="param",
            budget=budget,
        ),
        "influence": Arm(method="influence", options={"alpha": (1900.0, 42000.0), **batch}),
        "ssd": Arm(method="ssd", options={"selection": (1.0, 16.0), **batch}),
        "scrub": Arm(method="scrub", options={**batch}),
        "cf_k": Arm(method="cf_k", options={"k": (1, 3), **shared}),
        "eu_k": Arm(method="eu_k", options={"k": (1, 3), **shared}),
        "bad_teacher": Arm(method="bad_teacher", options={**batch}),
    }


def replaced(study: Study, **changes: Any) -> Study:
    """A study with some of its fields replaced, checked anew."""
    return Study(**{name: getattr(study, name) for name in Study.model_fields} | changes)
