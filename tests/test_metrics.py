import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from orchestrator.data import SplitOutputs
from orchestrator.metrics import COMPARISONS, METRICS

SIZES = {"forget": 30, "retain": 70, "validation": 20, "test": 50}


def logits_for(probabilities: list[list[float]]) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def split_of(probabilities: list[list[float]], labels: list[int], true: list[int] | None = None) -> SplitOutputs:
    given = np.array(labels)
    return SplitOutputs(logits_for(probabilities), given, given if true is None else np.array(true))


def drawn(seed: int, num_classes: int = 4, coarse: bool = False) -> dict[str, SplitOutputs]:
    """Random outputs; `coarse` ones have few distinct rows, so confidences tie."""
    rng = np.random.default_rng(seed)
    outputs = {}
    for name, size in SIZES.items():
        logits = rng.normal(0, 2, (size, num_classes))
        if coarse:
            logits = np.round(logits / 3) * 3
        labels = rng.integers(0, num_classes, size)
        true = np.where(rng.random(size) < 0.3, (labels + 1) % num_classes, labels)
        outputs[name] = SplitOutputs(logits.astype(np.float16), labels, true)
    return outputs


def metric(name: str, outputs: Mapping[str, SplitOutputs]) -> dict[str, float]:
    values: dict[str, float] = METRICS[name]({"outputs": outputs}, {})
    return values


def comparison(name: str, outputs: Mapping[str, SplitOutputs], reference: Mapping[str, SplitOutputs]) -> dict[str, float]:
    values: dict[str, float] = COMPARISONS[name]({"outputs": outputs, "reference": reference}, {})
    return values


# Predictions 0 1 1 2 | given labels 0 1 2 2 | true labels 0 1 2 0
BY_HAND = split_of(
    [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2], [0.25, 0.25, 0.5]], [0, 1, 2, 2], [0, 1, 2, 0]
)
RIGHT = split_of([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], [0, 2])
HALF = split_of([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], [0, 1])


# ---- promises over the registries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_finite_floats_by_split(name: str) -> None:
    values = metric(name, drawn(0))
    assert values
    assert all(type(value) is float and math.isfinite(value) for value in values.values())
    assert values == metric(name, drawn(0))


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_gives_finite_floats_by_split(name: str) -> None:
    values = comparison(name, drawn(0), drawn(1))
    assert values
    assert all(type(value) is float and math.isfinite(value) for value in values.values())


def spoilt(outputs: dict[str, SplitOutputs], split: str, value: float) -> dict[str, SplitOutputs]:
    logits = outputs[split].logits.copy()
    logits[3, 1] = value
    return outputs | {split: SplitOutputs(logits, outputs[split].labels, outputs[split].true_labels)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("name", METRICS)
def test_a_logit_that_is_not_finite_is_an_error(name: str, split: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"the logits of 1 of {SIZES[split]} examples are NaN or infinite"):
        metric(name, spoilt(drawn(0), split, value))


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_logit_that_is_not_finite_is_an_error_on_either_side(name: str) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        comparison(name, spoilt(drawn(0), "forget", math.nan), drawn(1))
    with pytest.raises(ValueError, match="NaN or infinite"):
        comparison(name, drawn(0), spoilt(drawn(1), "forget", math.nan))


def test_a_split_without_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no examples"):
        drawn(0)["forget"].take(np.zeros(30, dtype=bool))


# ---- accuracy and loss ---------------------------------------------------------------------------------------------


def test_accuracy_by_hand() -> None:
    assert metric("accuracy", {"forget": BY_HAND, "test": HALF}) == {
        "forget": 0.75,
        "forget_true": 0.5,
        "forget_flipped": 1.0,
        "forget_unflipped": pytest.approx(2 / 3),
        "test": 0.5,
    }


@pytest.mark.parametrize("flipped", [False, True])
def test_a_forget_set_of_one_kind_has_no_parts(flipped: bool) -> None:
    forget = SplitOutputs(BY_HAND.logits, BY_HAND.labels, BY_HAND.labels + flipped)
    assert set(metric("accuracy", {"forget": forget})) == {"forget", "forget_true"}


def test_loss_by_hand() -> None:
    expected = -(math.log(0.5) + math.log(0.8) + math.log(0.2) + math.log(0.5)) / 4
    assert metric("loss", {"forget": BY_HAND}) == {"forget": pytest.approx(expected, rel=1e-6)}


def test_accuracy_and_loss_equal_those_of_torch() -> None:
    outputs = drawn(3)
    for name, split in outputs.items():
        logits, labels = torch.tensor(split.logits).double(), torch.tensor(split.labels)
        assert metric("loss", outputs)[name] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
        assert metric("accuracy", outputs)[name] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


# ---- membership ----------------------------------------------------------------------------------------------------


def by_pairs(outputs: Mapping[str, SplitOutputs]) -> float:
    """Every pair of a forget and a test example, test examples weighted to the forget set's labels; ties count half."""
    forget, test = outputs["forget"], outputs["test"]
    ours, theirs = (
        torch.softmax(torch.tensor(split.logits).double(), dim=1)[range(len(split.labels)), split.labels].numpy()
        for split in (forget, test)
    )
    won = total = 0.0
    for i, label in enumerate(forget.labels):
        if label not in test.labels:
            continue
        for j, other in enumerate(test.labels):
            weight = (forget.labels == other).sum() / (test.labels == other).sum()
            won += weight * (1.0 if ours[i] > theirs[j] + 1e-12 else 0.5 if abs(ours[i] - theirs[j]) <= 1e-12 else 0.0)
            total += weight
    return won / total


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_membership_auc_equals_counting_pairs(seed: int, coarse: bool) -> None:
    outputs = drawn(seed, num_classes=3, coarse=coarse)
    if coarse:
        ties = np.round(outputs["forget"].confidences, 9)[:, None] == np.round(outputs["test"].confidences, 9)
        assert ties.mean() > 0.05
    assert metric("membership_auc", outputs) == {"forget": pytest.approx(by_pairs(outputs), abs=1e-12)}


def test_membership_auc_by_hand() -> None:
    # forget: two of class 0 at .9 and .5, one of class 1 at .6; test: class 0 at .5 (weight 2), class 1 at .6 and .7
    # (weight 1/2 each), class 2 (weight 0). Weights won: 3, .5 + 1 + 0 = ... of 3 each
    forget = split_of([[0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.2, 0.6, 0.2]], [0, 0, 1])
    test = split_of([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.1, 0.7, 0.2], [0.001, 0.001, 0.998]], [0, 1, 1, 2])
    # .9 beats all: 3. .5 ties with the .5 of weight 2: 1. .6 beats it: 2, and ties with the .6: .25. Of 9 in all
    assert metric("membership_auc", {"forget": forget, "test": test}) == {"forget": pytest.approx((3 + 1 + 2.25) / 9)}


def test_forget_labels_that_the_test_set_lacks_take_no_part() -> None:
    outputs = drawn(1, num_classes=3)
    test = outputs["test"]
    without = outputs | {"test": test.take(test.labels != 2)}
    trimmed = without | {"forget": outputs["forget"].take(outputs["forget"].labels != 2)}
    assert metric("membership_auc", without) == pytest.approx(metric("membership_auc", trimmed))
    assert metric("membership_auc", without)["forget"] == pytest.approx(by_pairs(without))
    disjoint = {
        "forget": outputs["forget"].take(outputs["forget"].labels == 2),
        "test": test.take(test.labels != 2),
    }
    assert metric("membership_auc", disjoint) == {}, "absent is absent, not 0 and not 0.5"


def test_the_label_distribution_of_the_test_set_does_not_matter() -> None:
    """Class 0 is easy and class 1 is hard, alike in and out: unweighted, the mixture alone would give the forget set away."""
    easy, hard = [0.9, 0.1], [0.6, 0.4]
    forget = split_of([easy] * 9 + [hard[::-1]], [0] * 9 + [1])
    test = split_of([easy] * 2 + [hard[::-1]] * 18, [0] * 2 + [1] * 18)
    assert metric("membership_auc", {"forget": forget, "test": test})["forget"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["published_svc_confidence", "published_svc_correctness"])
def test_published_attacks_equal_scikit_learn_by_hand(name: str) -> None:
    """With as many retain as test examples there is nothing to sample, and the attack can be written out."""
    outputs = drawn(2)
    outputs["retain"] = outputs["retain"].take(np.arange(50))

    def feature(split: str) -> np.ndarray:
        logits = torch.tensor(outputs[split].logits).double()
        if name.endswith("correctness"):
            return (logits.numpy().argmax(axis=1) == outputs[split].labels).astype(float)
        values: np.ndarray = torch.softmax(logits, 1)[range(len(logits)), outputs[split].labels].numpy()
        return values

    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(np.concatenate([feature("retain"), feature("test")]).reshape(-1, 1), [1] * 50 + [0] * 50)
    expected = 1 - attack.predict(feature("forget").reshape(-1, 1)).mean()
    assert metric(name, outputs) == {"forget": pytest.approx(expected)}


@pytest.mark.parametrize("name", ["published_svc_confidence", "published_svc_correctness"])
@pytest.mark.parametrize(("like", "expected"), [("retain", 0.0), ("test", 1.0)])
def test_published_attacks_tell_members_from_others(name: str, like: str, expected: float) -> None:
    right, wrong = split_of([[0.99, 0.01]] * 200, [0] * 200), split_of([[0.01, 0.99]] * 40, [0] * 40)
    outputs = {"retain": right, "test": wrong}
    outputs["forget"] = outputs[like].take(np.arange(10))
    assert metric(name, outputs) == {"forget": expected}


# ---- comparisons ---------------------------------------------------------------------------------------------------


def test_differences_are_reference_minus_run() -> None:
    run = {"forget": RIGHT, "retain": RIGHT, "test": HALF, "validation": HALF}
    reference = {"forget": HALF, "retain": RIGHT, "test": RIGHT}
    gaps = comparison("accuracy_difference", run, reference)
    assert {name: gaps[name] for name in ("forget", "retain", "test")} == {"forget": -0.5, "retain": 0.0, "test": 0.5}
    assert "validation" not in gaps, "a split that the reference lacks is absent"


def test_tug_of_war_by_hand() -> None:
    thirds = split_of([[0.6, 0.4]] * 3, [0, 0, 1])  # accuracy 2/3
    run = {"forget": RIGHT, "retain": RIGHT, "test": HALF}
    reference = {"forget": HALF, "retain": thirds, "test": RIGHT}
    # gaps 1/2, 1/3 and 1/2: (1 - 1/2)(1 - 1/3)(1 - 1/2)
    assert comparison("tug_of_war", run, reference) == {"all": pytest.approx(1 / 6)}
    assert comparison("tug_of_war", reference, run) == {"all": pytest.approx(1 / 6)}
    assert comparison("tug_of_war", run, run) == {"all": 1.0}


def test_disagreement_by_hand() -> None:
    # predictions 0 1 1 2 against 0 0 1 1; the last example is the flipped one
    other = split_of([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]], [0, 1, 2, 2], [0, 1, 2, 0])
    assert comparison("disagreement", {"forget": BY_HAND}, {"forget": other}) == {
        "forget": 0.5,
        "forget_flipped": 1.0,
        "forget_unflipped": pytest.approx(1 / 3),
    }


def test_disagreement_sees_what_accuracy_does_not() -> None:
    """Equal accuracy on other examples: the gap is zero, the disagreement is not."""
    run, reference = split_of([[0.9, 0.1]] * 2, [0, 1]), split_of([[0.1, 0.9]] * 2, [0, 1])
    assert comparison("accuracy_difference", {"forget": run}, {"forget": reference})["forget"] == 0.0
    assert comparison("disagreement", {"forget": run}, {"forget": reference})["forget"] == 1.0


def test_membership_auc_is_compared_with_the_references_own() -> None:
    run, reference = drawn(0), drawn(1)
    assert comparison("membership_auc_difference", run, reference) == {
        "forget": pytest.approx(by_pairs(reference) - by_pairs(run))
    }
