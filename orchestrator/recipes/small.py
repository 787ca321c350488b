"""Recipes that a laptop runs."""

from __future__ import annotations

from orchestrator.axes import loguniform
from orchestrator.recipes.base import FORGET_SETS, RECIPES, arms, localizations, replaced, rivals
from orchestrator.search import Search
from orchestrator.specs import DataSource, ForgetSet, Model, TrainingSpec
from orchestrator.study import Campaign, Study
from orchestrator.tuning import Tuning


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
def digits_search() -> Study:
    """The digits with rates drawn at random, eight per cell: DEL, its control, SalUn, fine-tuning; flipped labels."""
    rates = {
        "del": loguniform(0.003, 0.3),
        "random_within_tensor": loguniform(0.003, 0.3),
        "salun": loguniform(0.001, 0.1),
        "finetune": loguniform(0.003, 0.3),
    }
    made = arms(epochs=5, batch_size=64, budget=(0.3,))
    drawn = {
        name: arm.model_copy(update={"options": {**arm.options, "lr": rates[name]}}) if name in rates else arm
        for name, arm in made.items()
        if name in rates or name in ("identity", "retrain_short")
    }
    return replaced(
        digits(),
        recipe="digits_search",
        forget_sets=(ForgetSet(name="mislabelled"),),
        seeds=(0, 1),
        methods=drawn,
        search=Search(samples=8),
    )


@RECIPES
def digits_tuned() -> Study:
    """The demo's digits, tuned: each arm's rate is chosen on other seeds and forget sets; no subset models needed."""
    study = digits()
    rates: dict[str, tuple[float, ...]] = {
        "del": (0.03, 0.1, 0.2, 0.4),
        "random_within_tensor": (0.03, 0.1, 0.2, 0.4),
        "salun": (0.001, 0.003, 0.01, 0.03),
        "finetune": (0.01, 0.03, 0.1, 0.2),
        "neg_grad_plus": (0.001, 0.003, 0.01, 0.03),
        "random_labels": (0.001, 0.003, 0.01, 0.03),
        "retrain_short": (0.05, 0.1, 0.2, 0.4),
    }
    methods = {
        name: arm.model_copy(update={"options": {**arm.options, "lr": rates[name]}}) if name in rates else arm
        for name, arm in arms(epochs=5, batch_size=64, budget=(0.1, 0.3)).items()
    }
    return replaced(
        study,
        recipe="digits_tuned",
        forget_sets=(ForgetSet(name="random"), ForgetSet(name="mislabelled")),
        methods=methods,
        tuning=Tuning(criterion="tug_of_war_validation"),
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


@RECIPES
def cifar10_small_del() -> Study:
    """All methods and localizations of the paper on `cifar10_small`, at three budgets; two forget sets."""
    budget = (0.1, 0.2, 0.3)
    options = {"lr": (0.05,), "epochs": (10,), "batch_size": (128,)}
    return replaced(
        cifar10_small(),
        recipe="cifar10_small_del",
        forget_sets=(ForgetSet(name="random"), ForgetSet(name="mislabelled")),
        methods={
            **rivals(epochs=10, batch_size=128, budget=budget),
            **localizations(budget=budget, options=options),
        },
    )


@RECIPES
def cifar10_speed() -> Study:
    """All of CIFAR-10 from Parquet (set data.train and data.test) for speed on a GPU: airbench in bf16, 400 models."""
    return replaced(
        cifar10_small(),
        recipe="cifar10_speed",
        data=DataSource(
            name="image_parquet", options={"train": "cifar10-train.parquet", "test": "cifar10-test.parquet"}
        ),
        model=Model(name="airbench"),
        training=TrainingSpec(
            learning_rate=0.8,
            epochs=20,
            batch_size=512,
            weight_decay=5e-4,
            warmup=0.2,
            final=0.001,
            precision="bf16",
        ),
        campaign=Campaign(models=400),
        forget_sets=(ForgetSet(name="random"), ForgetSet(name="most_memorized")),
        methods=arms(epochs=4, batch_size=512, budget=(0.1, 0.3)),
    )
