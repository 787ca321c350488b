import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from orchestrator.data import SPLITS, Outputs, SplitOutputs
from orchestrator.metrics import COMPARISONS, METRICS, entropies, modified_entropies, with_forget_parts

SIZES = {"forget": 30, "retain": 60, "validation": 20, "test": 60}


def random_outputs(seed: int, num_classes: int = 4, coarse: bool = False) -> dict[str, SplitOutputs]:
    """Outputs whose forget set holds flipped labels; `coarse` ones tie often."""
    rng = np.random.default_rng(seed)
    splits = {}
    for name, size in SIZES.items():
        labels = np.random.default_rng(size).integers(0, num_classes, size)  # the same for every seed
        true = np.where(np.arange(size) % 5 == 0, (labels + 1) % num_classes, labels) if name == "forget" else labels
        logits = rng.normal(0, 2, (size, num_classes)) + 2 * np.eye(num_classes)[labels]
        logits = (logits > 0) * 1.0 if coarse else logits
        splits[name] = SplitOutputs(logits.astype(np.float16), labels, true)
    return splits


def predicting(predictions: list[int], labels: list[int], true: list[int] | None = None) -> SplitOutputs:
    """Outputs of three classes whose predictions are these."""
    logits = 4 * np.eye(3, dtype=np.float16)[predictions]
    return SplitOutputs(logits, np.array(labels), np.array(labels if true is None else true))


def confident(confidences: list[float], labels: list[int] | None = None) -> SplitOutputs:
    """Outputs of two classes that give the given label these probabilities."""
    given = np.array(labels or [0] * len(confidences))
    odds = np.log(np.array(confidences) / (1 - np.array(confidences)))
    logits = np.where(given[:, None] == [0, 1], odds[:, None], 0.0)
    return SplitOutputs(logits.astype(np.float64), given, given)


class Computed(dict[str, dict[str, float]]):
    """The metrics of outputs by name, computed when they are asked for."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs

    def __missing__(self, name: str) -> dict[str, float]:
        return value_of(name, self.outputs)


def value_of(name: str, outputs: Outputs, reference: Outputs | None = None) -> dict[str, float]:
    """A metric, or a comparison with a reference, called as the project calls it."""
    values: dict[str, float]
    if name in METRICS:
        values = METRICS[name]({"outputs": outputs}, METRICS[name].resolve({}))
    else:
        available = {"outputs": outputs, "reference": reference, "references": [reference]}
        available |= {"metrics": Computed(outputs), "reference_metrics": Computed(reference or {})}
        values = COMPARISONS[name](available, COMPARISONS[name].resolve({}))
    return values


ALL = [*METRICS, *COMPARISONS]


# ---- promises over the registries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("name", ALL)
def test_logits_that_are_not_finite_are_an_error(name: str, split: str, bad: float) -> None:
    good = random_outputs(0)

    def spoiled() -> dict[str, SplitOutputs]:
        logits = good[split].logits.copy()
        logits[-1, 2] = bad
        return good | {split: SplitOutputs(logits, good[split].labels, good[split].true_labels)}

    for pair in (lambda: (spoiled(), good), lambda: (good, spoiled())):
        with pytest.raises(ValueError, match=r"1 of \d+ examples are NaN or infinite"):
            value_of(name, *pair())


@pytest.mark.parametrize("name", ALL)
def test_values_are_finite_floats_of_known_splits(name: str) -> None:
    for seed in range(3):
        values = value_of(name, random_outputs(seed), random_outputs(seed + 10))
        assert values
        assert all(type(value) is float and np.isfinite(value) for value in values.values())
        assert set(values) <= {*SPLITS, *with_forget_parts(random_outputs(seed)), "forget_true", "all"}


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_examples_does_not_matter(name: str) -> None:
    ours, theirs = random_outputs(0), random_outputs(1)
    orders = {split: np.random.default_rng(3).permutation(size) for split, size in SIZES.items()}

    def shuffled(outputs: Outputs) -> dict[str, SplitOutputs]:
        return {split: part.take(orders[split]) for split, part in outputs.items()}

    assert value_of(name, shuffled(ours), shuffled(theirs)) == pytest.approx(value_of(name, ours, theirs), abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_split_that_a_run_lacks_is_absent(name: str) -> None:
    ours, theirs = random_outputs(0), random_outputs(1)
    whole = value_of(name, ours, theirs)
    for run, reference in ((True, True), (True, False), (False, True)):
        pair = [dict(ours), dict(theirs)]
        for outputs, lacks in zip(pair, (run, reference), strict=True):
            if lacks:
                del outputs["validation"]
        expected = {split: value for split, value in whole.items() if split != "validation"}
        if name in METRICS and not run:
            expected = whole
        assert value_of(name, *pair) == expected


def test_a_split_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        SplitOutputs(np.zeros((0, 3)), np.zeros(0, dtype=int), np.zeros(0, dtype=int))


# ---- accuracy and loss ---------------------------------------------------------------------------------------------

BY_HAND = {
    "forget": predicting([0, 1, 2, 2], labels=[0, 1, 0, 1], true=[0, 1, 2, 1]),  # the third is flipped
    "retain": predicting([0, 1, 2], labels=[0, 1, 2]),
    "test": predicting([0, 0, 0, 1, 1], labels=[0, 0, 0, 0, 0]),
}
REFERENCE = {
    "forget": predicting([0, 0, 2, 2], labels=[0, 1, 0, 1], true=[0, 1, 2, 1]),
    "retain": predicting([0, 2, 2], labels=[0, 1, 2]),
    "test": predicting([0, 0, 0, 0, 1], labels=[0, 0, 0, 0, 0]),
}


def test_accuracy_by_hand() -> None:
    assert value_of("accuracy", BY_HAND) == pytest.approx(
        {
            "forget": 2 / 4,
            "retain": 1,
            "test": 3 / 5,
            "forget_flipped": 0,
            "forget_unflipped": 2 / 3,
            "forget_true": 3 / 4,
        }
    )


def test_forget_parts_are_there_only_where_both_kinds_are() -> None:
    clean = {"forget": predicting([0], [0]), "test": predicting([0], [0])}
    flipped = {"forget": predicting([0], [1], [0]), "test": predicting([0], [0])}
    assert set(value_of("accuracy", clean)) == set(value_of("accuracy", flipped)) == {"forget", "test", "forget_true"}
    parts = with_forget_parts(BY_HAND)
    assert parts["forget_flipped"].labels.tolist() == [0]
    assert parts["forget_flipped"].true_labels.tolist() == [2]
    assert parts["forget_unflipped"].predictions.tolist() == [0, 1, 2]


def test_loss_by_hand() -> None:
    # logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8
    logits = np.log(np.array([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]))
    outputs = {"forget": SplitOutputs(logits, np.array([0, 2]), np.array([1, 2]))}
    given, true = (np.log(8) + np.log(8 / 5)) / 2, (np.log(4) + np.log(8 / 5)) / 2
    assert value_of("loss", outputs) == pytest.approx({"forget": given, "forget_true": true})


def test_accuracy_and_loss_equal_those_of_torch() -> None:
    outputs = random_outputs(3)
    accuracies, losses = value_of("accuracy", outputs), value_of("loss", outputs)
    for name, split in outputs.items():
        logits, labels = torch.tensor(split.logits).double(), torch.tensor(split.labels)
        assert losses[name] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-9)
        assert accuracies[name] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


# ---- membership ----------------------------------------------------------------------------------------------------


def brute_force_auc(outputs: Outputs) -> float:
    """Weighted share of pairs of a forget and a test example in which the forget example is more confident.

    Each test example weighs as many forget examples as have its label, shared among the test examples of that label.
    """
    forget, test = outputs["forget"], outputs["test"]

    def confidence(split: SplitOutputs, i: int) -> float:
        odds = np.exp(split.logits[i].astype(float))
        return float(odds[split.labels[i]] / odds.sum())

    won = total = 0.0
    for i, label in enumerate(forget.labels):
        if label not in test.labels:
            continue
        for j, other in enumerate(test.labels):
            weight = (forget.labels == other).sum() / (test.labels == other).sum()
            gap = confidence(forget, i) - confidence(test, j)
            won += weight * (0.5 if abs(gap) < 1e-12 else gap > 0)
            total += weight
    return won / total


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_membership_auc_equals_counted_pairs(seed: int, coarse: bool) -> None:
    outputs = random_outputs(seed, coarse=coarse)
    assert value_of("membership_auc", outputs) == pytest.approx({"forget": brute_force_auc(outputs)}, abs=1e-9)


def test_membership_auc_without_a_class_on_either_side() -> None:
    outputs = random_outputs(5)
    for split, missing in (("test", 1), ("forget", 2)):
        outputs[split] = outputs[split].take(outputs[split].labels != missing)
    assert value_of("membership_auc", outputs) == pytest.approx({"forget": brute_force_auc(outputs)}, abs=1e-9)


def test_membership_auc_by_hand() -> None:
    # no weights: 6 pairs, of which .9 wins two and .5 wins one and ties one
    one_class = {"forget": confident([0.9, 0.5]), "test": confident([0.5, 0.3, 0.95])}
    assert value_of("membership_auc", one_class) == pytest.approx({"forget": (2 + 1.5) / 6})
    # labels 0, 0, 0, 1 to be forgotten; test labels 0, 1: the first test example weighs 3, the second 1
    weighted = {
        "forget": confident([0.8, 0.8, 0.8, 0.8], [0, 0, 0, 1]),
        "test": confident([0.6, 0.9], [0, 1]),
    }
    assert value_of("membership_auc", weighted) == pytest.approx({"forget": 3 / 4})


def test_membership_auc_is_absent_where_no_label_is_shared() -> None:
    outputs = {"forget": confident([0.9, 0.8], [0, 0]), "test": confident([0.5, 0.3], [1, 1])}
    assert value_of("membership_auc", outputs) == {}
    assert value_of("membership_auc_difference", outputs, outputs) == {}


def test_membership_auc_does_not_punish_a_forget_set_of_hard_classes() -> None:
    """Forget examples like the test examples of their own class are at one half, whatever the other classes are."""
    hard, easy = [0.1, 0.2, 0.3, 0.4], [0.9, 0.95, 0.85, 0.8]
    outputs = {"forget": confident(hard, [1] * 4), "test": confident(easy + hard, [0] * 4 + [1] * 4)}
    assert value_of("membership_auc", outputs) == pytest.approx({"forget": 0.5})


FEATURES: dict[str, Callable[[SplitOutputs], Any]] = {
    "published_svc_confidence": lambda s: (
        np.exp(s.logits.astype(float))[np.arange(len(s.labels)), s.labels] / np.exp(s.logits.astype(float)).sum(axis=1)
    ),
    "published_svc_correctness": lambda s: (s.logits.argmax(axis=1) == s.labels).astype(float),
    "published_svc_entropy": lambda s: np.array([-sum(x * math.log(x) for x in row) for row in softmax(s)]),
    "published_svc_modified_entropy": lambda s: np.array(
        [
            -sum((1 - x) * math.log(x) if c == y else x * math.log(1 - x) for c, x in enumerate(row))
            for row, y in zip(softmax(s), s.labels, strict=True)
        ]
    ),
    "published_svc_probability": lambda s: np.array(softmax(s)),
}


def softmax(split: SplitOutputs) -> list[list[float]]:
    rows = [[math.exp(x) for x in row] for row in split.logits.tolist()]
    return [[x / sum(row) for x in row] for row in rows]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FEATURES)
def test_the_published_attacks_are_those_of_scikit_learn(name: str, seed: int) -> None:
    outputs, feature = random_outputs(seed), FEATURES[name]
    # as many retain as test examples, so every sample of them is all of them; gamma is one over the features
    members, others, asked = (feature(outputs[part]).reshape(SIZES[part], -1) for part in ("retain", "test", "forget"))
    attack = SVC(C=3, gamma=1 / members.shape[1], kernel="rbf").fit(
        np.concatenate([others, members]), [0] * len(others) + [1] * len(members)
    )
    called = attack.predict(asked)
    assert value_of(name, outputs) == pytest.approx({"forget": np.mean(called == 0)})


def test_the_published_attacks_draw_their_members_from_the_whole_retain_set() -> None:
    """The first thirty retain examples are unlike the rest: members must not be the first ones alone."""
    outputs = {
        "forget": confident([0.75] * 5),
        "retain": confident([0.1] * 30 + [0.9] * 570),
        "test": confident([0.5] * 30),
    }
    assert value_of("published_svc_confidence", outputs) == {"forget": 0.0}


def test_the_published_attacks_by_hand() -> None:
    """Members are right and sure, others wrong and unsure: three of four forget examples look like others."""
    outputs = {
        "forget": confident([0.3, 0.28, 0.33, 0.9]),
        "retain": confident([0.9, 0.91, 0.92, 0.93] * 5),
        "test": confident([0.3, 0.31, 0.32] * 2),
    }
    for name in FEATURES:
        assert value_of(name, outputs) == {"forget": 0.75}


def test_the_published_attacks_are_trained_on_equally_many_of_both() -> None:
    """At a tie of shares, the larger side would win every forget example."""
    half_right = predicting([0, 1] * 10, labels=[0] * 20)
    outputs = {
        "forget": predicting([0, 0, 1], labels=[0, 0, 0]),
        "retain": predicting([0] * 300, labels=[0] * 300),
        "test": half_right,
    }
    # 20 right members and 10 right others, against 10 wrong others: wrong ones are others
    assert value_of("published_svc_correctness", outputs) == pytest.approx({"forget": 1 / 3})
    outputs["retain"] = predicting([0, 1, 1, 1] * 100, labels=[0] * 400)
    # 300 wrong members would drown the 10 wrong others; a sample of 20 leaves right ones to the others
    assert value_of("published_svc_correctness", outputs) == pytest.approx({"forget": 2 / 3})


# ---- comparisons ---------------------------------------------------------------------------------------------------


def test_comparisons_by_hand() -> None:
    # accuracies of the run .5, 1, .6; of the reference .25, 2/3, .8
    assert value_of("accuracy_difference", BY_HAND, REFERENCE) == pytest.approx(
        {
            "forget": -0.25,
            "retain": -1 / 3,
            "test": 0.2,
            "forget_flipped": 0,
            "forget_unflipped": -1 / 3,
            "forget_true": -0.25,
        }
    )
    assert value_of("tug_of_war", BY_HAND, REFERENCE) == pytest.approx({"all": 0.75 * (2 / 3) * 0.8})
    assert value_of("disagreement", BY_HAND, REFERENCE) == pytest.approx(
        {"forget": 1 / 4, "retain": 1 / 3, "test": 1 / 5, "forget_flipped": 0, "forget_unflipped": 1 / 3}
    )


def test_disagreement_sees_what_accuracy_does_not() -> None:
    """Equal accuracy on other examples: the gap is zero, the disagreement is not."""
    run, reference = {"forget": predicting([0, 0], [0, 1])}, {"forget": predicting([1, 1], [0, 1])}
    assert value_of("accuracy_difference", run, reference)["forget"] == 0.0
    assert value_of("disagreement", run, reference) == {"forget": 1.0}


def test_a_run_compared_with_itself() -> None:
    outputs = random_outputs(0)
    for name in ("accuracy_difference", "disagreement", "membership_auc_difference"):
        assert set(value_of(name, outputs, outputs).values()) == {0.0}
    assert set(value_of("probability_distance", outputs, outputs).values()) == {0.0}
    for name in ("tug_of_war", "tug_of_war_membership"):
        assert value_of(name, outputs, outputs) == {"all": 1.0}


def test_probability_distance_is_to_the_mean_of_the_references() -> None:
    """.9 and .1 against references of .5 and .7, .2 and .4: |.9 - .6| and |.1 - .3|, and not the mean of four gaps."""
    run = {"forget": confident([0.9, 0.1])}
    references = [{"forget": confident([0.5, 0.2])}, {"forget": confident([0.7, 0.4])}]
    found = COMPARISONS["probability_distance"]({"outputs": run, "references": references}, {})
    assert found == pytest.approx({"forget": 0.25}, abs=1e-9)


def test_membership_tug_of_war_by_hand() -> None:
    def metrics(attack: float, retain: float, test: float) -> dict[str, dict[str, float]]:
        return {
            "published_svc_confidence": {"forget": attack},
            "accuracy": {"forget": 0, "retain": retain, "test": test},
        }

    available = {"metrics": metrics(0.5, 0.9, 0.8), "reference_metrics": metrics(0.3, 1.0, 0.75)}
    found = COMPARISONS["tug_of_war_membership"](available, {})
    assert found == pytest.approx({"all": 0.8 * 0.9 * 0.95})


def test_entropies_by_hand() -> None:
    logits = np.log(np.array([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]))  # probabilities 1/8, 2/8, 5/8
    split = SplitOutputs(logits, np.array([0, 2]), np.array([0, 2]))
    p = np.array([1, 2, 5]) / 8
    assert entropies(split) == pytest.approx([-(p * np.log(p)).sum()] * 2)
    first = -(7 / 8) * np.log(1 / 8) - (2 / 8) * np.log(6 / 8) - (5 / 8) * np.log(3 / 8)
    second = -(3 / 8) * np.log(5 / 8) - (1 / 8) * np.log(7 / 8) - (2 / 8) * np.log(6 / 8)
    assert modified_entropies(split) == pytest.approx([first, second])


def test_modified_entropy_is_finite_where_a_model_is_certain() -> None:
    logits = np.array([[60000.0, 0.0, 0.0], [60000.0, 0.0, 0.0]])  # p = 1, 0, 0
    split = SplitOutputs(logits, np.array([0, 1]), np.array([0, 1]))
    right, wrong = modified_entropies(split)
    assert right == 0
    assert np.isfinite(wrong)
    assert wrong > 60000, "a sure mistake has the largest modified entropy"


def test_differences_are_positive_where_the_run_forgets_more() -> None:
    forgetful = {**BY_HAND, "forget": predicting([1, 0, 1, 0], labels=[0, 1, 0, 1], true=[0, 1, 2, 1])}
    assert value_of("accuracy_difference", forgetful, BY_HAND)["forget"] == 0.5
    shy: Mapping[str, SplitOutputs] = {"forget": confident([0.2, 0.3]), "test": confident([0.4, 0.5])}
    sure = {"forget": confident([0.8, 0.9]), "test": confident([0.4, 0.5])}
    assert value_of("membership_auc_difference", shy, sure) == {"forget": 1.0}


def test_membership_differences_equal_those_of_counted_pairs() -> None:
    ours, theirs = random_outputs(1), random_outputs(2)
    expected = brute_force_auc(theirs) - brute_force_auc(ours)
    assert value_of("membership_auc_difference", ours, theirs) == pytest.approx({"forget": expected}, abs=1e-9)
