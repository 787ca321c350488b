"""Recipes: named experiments as functions that return a study; one derives from another by replacing fields."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.registry import Registry
from orchestrator.specs import DataSource, ForgetSet, Model, Strategy, TrainingSpec
from orchestrator.study import Arm, Campaign, Study

RECIPES: Registry[Callable[[], Study]] = Registry("recipe", frozenset())

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


@RECIPES
def digits() -> Study:
    """The demo: 8x8 digits with 5 % flipped labels, 200 subset models, three forget sets, DEL, SalUn and controls."""
    return Study(
        recipe="digits",
        data=DataSource(name="digits", options={"label_noise": 0.05}),
        model=Model(name="small_cnn"),
        training=TrainingSpec(learning_rate=0.1, epochs=20, batch_size=64, warmup=0.2),
        forget_sets=FORGET_SETS,
        methods=arms(epochs=5, batch_size=64),
    )


@RECIPES
def cifar10_small() -> Study:
    """5,000 CIFAR-10 images from Parquet (set data.train and data.test), 5 % flipped labels, ResNet-9 of width 8."""
    sizes = {"num_train": 5000, "num_validation": 1000, "num_test": 2000, "label_noise": 0.05}
    return Study(
        recipe="cifar10_small",
        data=DataSource(
            name="image_parquet", options={"train": "cifar10-train.parquet", "test": "cifar10-test.parquet", **sizes}
        ),
        model=Model(name="resnet9", options={"width": 8}),
        training=TrainingSpec(
            learning_rate=0.1, epochs=30, batch_size=128, weight_decay=5e-4, warmup=0.25, final=0.001
        ),
        campaign=Campaign(models=40),
        forget_sets=(
            ForgetSet(name="random"),
            ForgetSet(name="mislabelled"),
            ForgetSet(name="most_memorized", options={"count": 250}),
        ),
        methods=arms(epochs=6, batch_size=128, budget=(0.1, 0.3)),
    )
