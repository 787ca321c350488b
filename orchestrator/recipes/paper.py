"""The experiments of the DEL paper (Torkzadehmahani et al. 2025): one original, one draw, three unlearning seeds.

Training, forget draws and the batches of gradient masks are as released; rates of methods are the released ones or,
where none is known, RUM's. Each recipe has a twin in protocol `joint`, in which draws, originals and unlearning vary
together and the draws are ours.
No recipe augments images but that of ImageNet-100, whose random crops are taken from the middle square here. Nothing
is standardized, as released (but for ImageNet-100); test and retain accuracy are over all examples, where the released
loaders leave out the last batch.
"""

from __future__ import annotations

from typing import Any

from orchestrator.arms import Arm
from orchestrator.recipes.base import RECIPES, Options, localizations, replaced, rivals
from orchestrator.specs import DataSource, ForgetSet, Model, Strategy, TrainingSpec
from orchestrator.study import Study
from orchestrator.unlearning import METHODS

BUDGETS = (0.1, 0.2, 0.3)
IID = ForgetSet(name="random", options={"as_released": True})


def of_classes(*numbers: int) -> ForgetSet:
    """A tenth of the training set, from some classes alone, in the released draw."""
    return ForgetSet(name="random_of_classes", options={"classes": tuple(map(str, numbers)), "as_released": True})


def published(
    recipe: str,
    data: DataSource,
    model: Model,
    forget_set: ForgetSet,
    *,
    rate: float,
    del_rate: float,
    epochs: int = 30,
    h: str = "released",
    tuned: dict[str, Options] | None = None,
) -> Study:
    """A setting of the paper: DEL and its control at three budgets, every rival, retraining for as many epochs as DEL.

    `tuned`: options of rivals that were released for this setting.
    """
    options: Options = {"lr": (del_rate,), "epochs": (epochs,), "batch_size": (128,)}
    located = localizations(budget=BUDGETS, options=options, h=h)
    others = {
        name: arm.model_copy(update={"options": {**arm.options, **(tuned or {}).get(name, {})}})
        for name, arm in rivals(epochs=10, batch_size=128, budget=(0.3,)).items()
    }
    short = {"lr": (rate,), "epochs": (epochs,), "batch_size": (128,), "warmup": (0.0,)}
    return Study(
        recipe=recipe,
        data=data,
        model=model,
        training=TrainingSpec(learning_rate=rate, epochs=epochs, batch_size=128, schedule="epoch"),
        forget_sets=(forget_set,),
        protocol="del",
        methods=_as_released(
            {
                **others,
                "retrain_short": Arm(method="retrain_short", options=short),
                "salloc_relabel": _relabelled(("gradient", "param"), (0.3,)),
                **{name: located[name] for name in ("del", "random_within_tensor")},
            }
        ),
    )


def _as_released(arms: dict[str, Arm], released: bool = True) -> dict[str, Arm]:
    """Arms whose masks leave out the last batch of a shuffle and whose rates fall by epoch, as released, or do not."""

    def told(strategy: Strategy | None) -> Strategy | None:
        if strategy is None or "as_released" not in strategy.entry.options:
            return strategy
        return Strategy(name=strategy.name, options={**strategy.options, "as_released": released})

    def falling(arm: Arm) -> Options:
        known = {"schedule": ("epoch" if released else "step",)} if "schedule" in METHODS[arm.method].options else {}
        return {**arm.options, **known}

    return {
        name: arm.model_copy(update={"strategy": told(arm.strategy), "base": told(arm.base), "options": falling(arm)})
        for name, arm in arms.items()
    }


def _relabelled(strategy: tuple[str, Any], budget: tuple[float, ...]) -> Arm:
    """Random labels under a mask as released with DEL: drawn once, shuffled together (its SalLoc-RL)."""
    return Arm(
        method="random_labels",
        options={"lr": (0.013,), "epochs": (10,), "batch_size": (128,)},
        strategy=Strategy(name=strategy[0]),
        granularity=strategy[1],
        budget=budget,
    )


def joint(study: Study) -> Study:
    """The same setting in protocol `joint`: three draws of our own, each with an original and references of its own."""
    rules = tuple(ForgetSet(name=r.name, options={**r.options, "as_released": False}) for r in study.forget_sets)
    training = study.training.model_copy(update={"schedule": "step"})
    methods = _as_released(dict(study.methods), released=False)
    changes = {"forget_sets": rules, "training": training, "methods": methods}
    return replaced(study, recipe=f"{study.recipe}_joint", protocol="joint", **changes)


def _tuned(neg_grad: float, influence: float, selection: float, damping: float = 1.0) -> dict[str, Options]:
    return {
        "neg_grad_plus": {"alpha": (neg_grad,)},
        "influence": {"alpha": (influence,)},
        "ssd": {"selection": (selection,), "damping": (damping,)},
    }


CIFAR10, RESNET18 = DataSource(name="cifar10"), Model(name="resnet18")
SVHN, VIT = DataSource(name="svhn"), Model(name="vit_small_data")


@RECIPES
def cifar10_resnet18_iid() -> Study:
    """DEL paper: CIFAR-10, ResNet-18, a random tenth forgotten; every baseline and control, protocol del."""
    tuned = _tuned(0.95, 42000.0, 1.0)
    return published("cifar10_resnet18_iid", CIFAR10, RESNET18, IID, rate=0.1, del_rate=0.015, tuned=tuned)


@RECIPES
def cifar10_resnet18_classes() -> Study:
    """DEL paper: CIFAR-10, ResNet-18, Non-IID: as many, from the classes bird and dog; protocol del."""
    tuned = _tuned(0.99, 1900.0, 16.0)
    forget_set = of_classes(2, 5)
    return published("cifar10_resnet18_classes", CIFAR10, RESNET18, forget_set, rate=0.1, del_rate=0.015, tuned=tuned)


@RECIPES
def svhn_vit_iid() -> Study:
    """DEL paper: SVHN, small-data ViT, a random tenth forgotten; protocol del (rates of the released script)."""
    tuned = _tuned(0.95, 4000.0, 5.0, 3.0)
    return published("svhn_vit_iid", SVHN, VIT, IID, rate=0.05, del_rate=0.05, h="all", tuned=tuned)


@RECIPES
def svhn_vit_classes() -> Study:
    """DEL paper: SVHN, small-data ViT, Non-IID: as many, from the digits 3 and 6; protocol del."""
    tuned = _tuned(0.99, 6000.0, 5.0, 3.0)
    return published("svhn_vit_classes", SVHN, VIT, of_classes(3, 6), rate=0.05, del_rate=0.05, h="all", tuned=tuned)


@RECIPES
def imagenet100_resnet50_iid() -> Study:
    """DEL paper: ImageNet-100 (set data.root), ResNet-50 at 128 pixels, a random tenth forgotten; protocol del."""
    data = DataSource(name="image_folder", options={"root": "imagenet-100", "resize": 160, "crop": 128})
    model, tuned = Model(name="resnet50"), _tuned(0.95, 2000.0, 2.0)
    study = published("imagenet100_resnet50_iid", data, model, IID, rate=0.1, del_rate=0.1, epochs=100, tuned=tuned)
    return replaced(study, training=study.training.model_copy(update={"augment": "resized_crop_flip"}))


@RECIPES
def cifar10_resnet18_iid_joint() -> Study:
    """cifar10_resnet18_iid in protocol joint: three draws, originals and sets of references."""
    return joint(cifar10_resnet18_iid())


@RECIPES
def cifar10_resnet18_classes_joint() -> Study:
    """cifar10_resnet18_classes in protocol joint: three draws, originals and sets of references."""
    return joint(cifar10_resnet18_classes())


@RECIPES
def svhn_vit_iid_joint() -> Study:
    """svhn_vit_iid in protocol joint: three draws, originals and sets of references."""
    return joint(svhn_vit_iid())


@RECIPES
def svhn_vit_classes_joint() -> Study:
    """svhn_vit_classes in protocol joint: three draws, originals and sets of references."""
    return joint(svhn_vit_classes())


@RECIPES
def imagenet100_resnet50_iid_joint() -> Study:
    """imagenet100_resnet50_iid in protocol joint: three draws, originals and sets of references."""
    return joint(imagenet100_resnet50_iid())


# ---- ablations, on cifar10_resnet18_classes; `--set data=... --set model=...` moves them elsewhere -----------------

DEL_OPTIONS: Options = {"lr": (0.015,), "epochs": (30,), "batch_size": (128,)}


def _ablation(recipe: str, names: tuple[str, ...], budget: tuple[float, ...] = BUDGETS) -> Study:
    located = localizations(budget=budget, options=DEL_OPTIONS, critical=Strategy(name="critmem"))
    study = cifar10_resnet18_classes()
    chosen = {name: located[name] for name in dict.fromkeys((*names, "random_within_tensor"))}
    return replaced(study, recipe=recipe, methods={**_controls(study), **_as_released(chosen)})


def _controls(study: Study) -> dict[str, Arm]:
    return {name: study.methods[name] for name in ("identity", "retrain_short", "random_within_tensor")}


@RECIPES
def ablation_criteria() -> Study:
    """DEL's Table 1: {parameter, channel} x {gradient, weighted gradient} under reset-and-finetune."""
    names = ("del", "weighted_gradient_param", "gradient_channel", "salloc")
    return _ablation("ablation_criteria", names)


@RECIPES
def ablation_random_masks() -> Study:
    """DEL's Table 3: the structured mask against random channels, with its layer profile and without."""
    return _ablation("ablation_random_masks", ("del", "random_within_tensor", "random"))


@RECIPES
def ablation_forget_agnostic() -> Study:
    """DEL's Table 4: criticality on the forget set, on the training set, and plain magnitude; both forget sets."""
    study = _ablation("ablation_forget_agnostic", ("del", "forget_agnostic", "weight_magnitude"))
    return replaced(study, forget_sets=(IID, of_classes(2, 5)))


@RECIPES
def ablation_budgets() -> Study:
    """DEL's Figure 2: shallowest, deepest, SalLoc, CritMem and DEL over budgets under reset-and-finetune.

    CritMem searches for every forget example, which takes longer than all else here; fewer are
    `--set methods.critmem.strategy.num_examples=1000`, as Maini et al. did.
    """
    budgets = (0.05, 0.1, 0.1687, 0.2, 0.3, 0.4, 0.5)
    return _ablation("ablation_budgets", ("del", "salloc", "shallowest", "deepest", "critmem"), budgets)


@RECIPES
def ablation_pairings() -> Study:
    """DEL's Figure 3: localizations x unlearning methods at budget 0.3."""
    located = localizations(budget=(0.3,), options=DEL_OPTIONS)
    methods: dict[str, tuple[str, Options]] = {
        "reset": ("reset_and_finetune", DEL_OPTIONS),
        "finetune": ("finetune", {"lr": (0.01,), "epochs": (10,)}),
        "relabel": ("random_labels", {"lr": (0.013,), "epochs": (10,)}),
        "neg_grad_plus": ("neg_grad_plus", {"alpha": (0.99,)}),
    }
    pairs = {}
    for place in ("del", "salloc", "shallowest", "deepest", "random_within_tensor"):
        for name, (method, options) in methods.items():
            arm = located[place].model_copy(update={"method": method, "options": options})
            pairs[place if name == "reset" else f"{place}+{name}"] = arm
    study = cifar10_resnet18_classes()
    return replaced(study, recipe="ablation_pairings", methods=_controls(study) | _as_released(pairs))
