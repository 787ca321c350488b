"""Unlearning part by part (RUM, Zhao et al. 2024), and what stands in for memorization (Zhao and Triantafillou 2024).

Every recipe holds RUM against one method on the whole forget set (*vanilla*: `finetune`, `salun`, `neg_grad_plus`, for
as many epochs as one stage and as all three) and against the same stages on parts drawn at random (`_shuffled`). The
forget sets are drawn by the campaign's scores; `scores` says what the parts go by.
"""

from __future__ import annotations

from orchestrator.arms import CAMPAIGN, Arm
from orchestrator.recipes.base import RECIPES, Options, replaced
from orchestrator.recipes.small import cifar10_small, digits
from orchestrator.specs import DataSource, ForgetSet, Model, Strategy, TrainingSpec
from orchestrator.study import Campaign, Study

PROXIES = ("confidence", "max_confidence", "entropy", "binary_accuracy", "holdout_retraining", "loss_curvature")


def refined(
    *, epochs: tuple[int, int], batch_size: int, rates: tuple[float, ...], final: float, weight_decay: float
) -> dict[str, Arm]:
    """RUM, RUM-F, their shuffled controls and the vanilla methods.

    `epochs` of fine-tuning and of the other methods; `rates` of SalUn, the first in RUM-F (fine-tuning has 0.1 and
    NegGrad+ 0.01, as in RUM); `final`: what a rate falls to, as a share of it.
    """
    shared: Options = {"batch_size": (batch_size,), "weight_decay": (weight_decay,)}
    finetune = Arm(method="finetune", options={"lr": (0.1,), "epochs": epochs[:1], "final": (final,), **shared})
    salun = Arm(
        method="random_labels",
        options={"lr": rates, "epochs": epochs[1:], "redraw": (True,), "final": (final,), **shared},
        strategy=Strategy(name="gradient"),
        granularity="param",
        budget=(0.5,),
    )
    neg_grad_plus = Arm(
        method="neg_grad_plus", options={"lr": (0.01,), "alpha": (0.97,), "epochs": epochs[1:], **shared}
    )
    deletion = Arm(
        method="reset_and_finetune",
        options={"lr": (0.1,), "epochs": epochs[:1], **shared},
        strategy=Strategy(name="weighted_gradient"),
        budget=(0.3,),
    )
    nothing = Arm(method="identity")
    composed = {
        "rum": ((nothing, finetune, salun), (CAMPAIGN, *PROXIES)),
        "rum_salun": ((_at(salun, rates[:1]),) * 3, (CAMPAIGN, *PROXIES)),
        "rum_finetune": ((finetune,) * 3, (CAMPAIGN,)),
        "rum_neg_grad_plus": ((neg_grad_plus,) * 3, (CAMPAIGN,)),
        "rum_del": ((nothing, finetune, deletion), (CAMPAIGN,)),
    }
    return {
        "identity": nothing,
        "retrain_short": Arm(
            method="retrain_short", options={"lr": (0.1,), "epochs": epochs[:1], "batch_size": (batch_size,)}
        ),
        **{
            name: arm.model_copy(update={"options": {**arm.options, "epochs": (each, 3 * each)}})
            for name, arm, each in (
                ("finetune", finetune, epochs[0]),
                ("salun", salun, epochs[1]),
                ("neg_grad_plus", neg_grad_plus, epochs[1]),
            )
        },
        "del": deletion,
        "random_within_tensor": deletion.model_copy(
            update={"strategy": Strategy(name="random_within_tensor"), "base": deletion.strategy}
        ),
        **{name: Arm(method="rum", stages=stages, scores=scores) for name, (stages, scores) in composed.items()},
        **{f"{name}_shuffled": Arm(method="rum_shuffled", stages=stages) for name, (stages, _) in composed.items()},
    }


def _at(arm: Arm, rates: tuple[float, ...]) -> Arm:
    """An arm at some of its rates: three stages of two rates each would be eight settings."""
    return arm.model_copy(update={"options": {**arm.options, "lr": rates}})


@RECIPES
def digits_rum() -> Study:
    """RUM on the demo's digits, its parts by campaign scores and by each proxy; a mixed and a random forget set."""
    return replaced(
        digits(),
        recipe="digits_rum",
        forget_sets=(ForgetSet(name="mixed_memorized", options={"count": 150}), ForgetSet(name="random")),
        seeds=(0, 1, 2, 3, 4),
        methods=refined(epochs=(5, 5), batch_size=64, rates=(0.01, 0.1), final=0.01, weight_decay=0.0),
    )


@RECIPES
def cifar10_small_rum() -> Study:
    """RUM on 5,000 CIFAR-10 images (set data.train and data.test), its parts by campaign scores and by each proxy."""
    return replaced(
        cifar10_small(),
        recipe="cifar10_small_rum",
        campaign=Campaign(models=100),
        forget_sets=(ForgetSet(name="mixed_memorized", options={"count": 450}), ForgetSet(name="random")),
        methods=refined(epochs=(6, 3), batch_size=128, rates=(0.01, 0.1), final=0.01, weight_decay=5e-4),
    )


@RECIPES
def cifar10_resnet18_rum() -> Study:
    """RUM's main setting: CIFAR-10, ResNet-18, 3,000 examples, 400 subset models; rates and epochs as released.

    Originals, references and subset models share one training: RUM's own, without its augmentation, under which
    subset models would not fit their subsets in 30 epochs. RUM's subset models were trained at a tenth of the rate.
    """
    return Study(
        recipe="cifar10_resnet18_rum",
        data=DataSource(name="cifar10", options={"num_validation": 5000}),
        model=Model(name="resnet18"),
        training=TrainingSpec(learning_rate=0.1, epochs=30, batch_size=256, weight_decay=5e-4, final=0.0),
        campaign=Campaign(models=400),
        forget_sets=(ForgetSet(name="mixed_memorized", options={"count": 3000}),),
        methods=refined(epochs=(10, 5), batch_size=256, rates=(0.1,), final=1.0, weight_decay=5e-4),
    )
