"""Metrics of stored outputs, and comparisons of a run's outputs with a reference's. Never sees a model.

Each function returns values by split: a split that a run lacks is absent, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from orchestrator.data import Outputs, SplitOutputs
from orchestrator.registry import Registry
from orchestrator.seeds import numpy_generator

Values = Mapping[str, Mapping[str, float]]
"""Metrics by name and split."""

METRICS: Registry[Callable[..., dict[str, float]]] = Registry("metric", frozenset({"outputs"}))
COMPARISONS: Registry[Callable[..., dict[str, float]]] = Registry(
    "comparison", frozenset({"outputs", "reference", "references", "metrics", "reference_metrics"})
)
"""Functions of a run's `outputs` and one `reference`'s, or of all `references` that match the run and are not the run
itself; `metrics` and `reference_metrics` are values of METRICS by name and split, so that none is computed twice."""

ALL = "all"  # stands for the key of the reference where a comparison is with all of them


def with_forget_parts(outputs: Outputs) -> dict[str, SplitOutputs]:
    """All splits and, where the forget set holds both kinds, its flipped and its unflipped part apart."""
    forget = outputs["forget"]
    flipped = forget.labels != forget.true_labels
    splits = dict(outputs)
    if flipped.any() and not flipped.all():
        splits["forget_flipped"], splits["forget_unflipped"] = forget.take(flipped), forget.take(~flipped)
    return splits


@METRICS
def accuracy(outputs: Outputs) -> dict[str, float]:
    """Share of examples predicted as their given label; `forget_true`: as their true label."""
    values = {
        name: float((split.predictions == split.labels).mean()) for name, split in with_forget_parts(outputs).items()
    }
    forget = outputs["forget"]
    return values | {"forget_true": float((forget.predictions == forget.true_labels).mean())}


@METRICS(version=2)
def loss(outputs: Outputs) -> dict[str, float]:
    """Mean cross-entropy of the given labels, in nats; `forget_true`: of the true labels."""
    labelled = {name: (split, split.labels) for name, split in outputs.items()}
    labelled["forget_true"] = (outputs["forget"], outputs["forget"].true_labels)
    return {
        name: float(-split.log_probabilities[np.arange(len(labels)), labels].mean())
        for name, (split, labels) in labelled.items()
    }


@METRICS
def membership_auc(outputs: Outputs) -> dict[str, float]:
    """Area under the ROC of given-label confidence, forget (positive) against test examples.

    Test examples are weighted so that their labels are distributed as the forget set's; classes that the forget set
    lacks weigh nothing. Its target is a reference's own value, not 0.5. Absent where no test example shares a label.
    """
    from sklearn.metrics import roc_auc_score

    forget, test = outputs["forget"], outputs["test"]
    num_classes = forget.logits.shape[1]
    wanted = np.bincount(forget.labels, minlength=num_classes).astype(float)
    present = np.bincount(test.labels, minlength=num_classes)
    kept = present[forget.labels] > 0  # a label that the test set lacks cannot be matched
    weights = np.divide(wanted, present, out=np.zeros(num_classes), where=present > 0)[test.labels]
    if not kept.any():
        return {}
    confidences = np.concatenate([forget.confidences[kept], test.confidences])
    positive = np.concatenate([np.ones(kept.sum()), np.zeros(len(weights))])
    sample_weight = np.concatenate([np.ones(kept.sum()), weights])
    return {"forget": float(roc_auc_score(positive, confidences, sample_weight=sample_weight))}


def _svc_efficacy(outputs: Outputs, feature: Callable[[SplitOutputs], np.ndarray]) -> dict[str, float]:
    """Share of forget examples that SVC(C=3, gamma='auto', rbf) takes for non-members, as published with SalUn.

    Trained on a feature [n] or [n, k] of as many retain (members) as test examples (non-members), seeded samples of
    each.
    """
    from sklearn.svm import SVC

    size = min(len(outputs["retain"].labels), len(outputs["test"].labels))
    rng = numpy_generator(0, "published attack")
    features = {split: feature(outputs[split]).reshape(len(outputs[split].labels), -1) for split in _ATTACKED}
    members, others = (features[split][rng.permutation(len(features[split]))[:size]] for split in ("retain", "test"))
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(np.concatenate([members, others]), np.repeat([1, 0], size))
    return {"forget": float((attack.predict(features["forget"]) == 0).mean())}


_ATTACKED = ("retain", "test", "forget")


@METRICS
def published_svc_confidence(outputs: Outputs) -> dict[str, float]:
    """Published: membership efficacy of an SVC on given-label confidence (Fan et al. 2024), share called non-member."""
    return _svc_efficacy(outputs, lambda split: split.confidences)


@METRICS
def published_svc_correctness(outputs: Outputs) -> dict[str, float]:
    """Published: membership efficacy of an SVC on correctness (Fan et al. 2024), share called non-member."""
    return _svc_efficacy(outputs, lambda split: (split.predictions == split.labels).astype(float))


def entropies(split: SplitOutputs) -> np.ndarray:
    """Entropy of the predicted distribution, in nats, float64 [n]."""
    found: np.ndarray = -(np.exp(split.log_probabilities) * split.log_probabilities).sum(axis=1)
    return found


def modified_entropies(split: SplitOutputs) -> np.ndarray:
    """-(1 - p_y) log p_y - sum over other classes of p_c log(1 - p_c), float64 [n] (Song and Mittal 2021).

    The released unlearning codes take the columns of all labels at once, and log(1 - p) from log p; not so here.
    """
    rows, log_p = np.arange(len(split.labels)), split.log_probabilities
    p = np.exp(log_p)
    rest = p @ (1 - np.eye(p.shape[1]))  # 1 - p as the sum of the others, exact where p is nearly 1
    terms = -p * np.log(np.maximum(rest, 1e-30))
    terms[rows, split.labels] = -rest[rows, split.labels] * log_p[rows, split.labels]
    found: np.ndarray = terms.sum(axis=1)
    return found


@METRICS
def published_svc_entropy(outputs: Outputs) -> dict[str, float]:
    """Published: membership efficacy of an SVC on entropy (Fan et al. 2024), share called non-member."""
    return _svc_efficacy(outputs, entropies)


@METRICS
def published_svc_modified_entropy(outputs: Outputs) -> dict[str, float]:
    """Published: membership efficacy of an SVC on modified entropy (Song and Mittal 2021), share called non-member."""
    return _svc_efficacy(outputs, modified_entropies)


@METRICS
def published_svc_probability(outputs: Outputs) -> dict[str, float]:
    """Published: membership efficacy of an SVC on all probabilities (Fan et al. 2024), share called non-member."""
    return _svc_efficacy(outputs, lambda split: np.exp(split.log_probabilities))


@COMPARISONS
def accuracy_difference(metrics: Values, reference_metrics: Values) -> dict[str, float]:
    """Accuracy of the reference minus the run's: positive on `forget` means that it forgets more."""
    ours, theirs = metrics["accuracy"], reference_metrics["accuracy"]
    return {split: theirs[split] - value for split, value in ours.items() if split in theirs}


@COMPARISONS
def tug_of_war(metrics: Values, reference_metrics: Values) -> dict[str, float]:
    """Product over forget, retain and test of 1 - |difference in accuracy|; 1 is best (Zhao et al. 2024)."""
    gaps = accuracy_difference(metrics, reference_metrics)
    return {"all": math.prod(1 - abs(gaps[split]) for split in ("forget", "retain", "test"))}


@COMPARISONS
def disagreement(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    """Share of examples whose predicted class differs from the reference's."""
    shared = [name for name in outputs if name in reference]
    differs = {name: outputs[name].predictions != reference[name].predictions for name in shared}
    forget = outputs["forget"]
    flipped = forget.labels != forget.true_labels
    if flipped.any() and not flipped.all():
        differs |= {"forget_flipped": differs["forget"][flipped], "forget_unflipped": differs["forget"][~flipped]}
    return {name: float(np.count_nonzero(each) / len(each)) for name, each in differs.items()}


@COMPARISONS
def membership_auc_difference(metrics: Values, reference_metrics: Values) -> dict[str, float]:
    """Membership AUC of the reference minus the run's: the target of the attack is the reference's own value."""
    ours, theirs = metrics["membership_auc"], reference_metrics["membership_auc"]
    return {split: theirs[split] - value for split, value in ours.items() if split in theirs}


@COMPARISONS
def tug_of_war_membership(metrics: Values, reference_metrics: Values) -> dict[str, float]:
    """Tug-of-war with published SVC efficacy (confidence) in place of forget accuracy (ToW-MIA, Zhao et al. 2024)."""
    measured = (("published_svc_confidence", "forget"), ("accuracy", "retain"), ("accuracy", "test"))
    gaps = [metrics[name][split] - reference_metrics[name][split] for name, split in measured]
    return {"all": math.prod(1 - abs(gap) for gap in gaps)}


@COMPARISONS
def probability_distance(outputs: Outputs, references: Sequence[Outputs]) -> dict[str, float]:
    """Mean |p of the run - mean p of the references| of the given label; a reference is held against the others."""
    distances = {}
    for name, split in outputs.items():
        if all(name in other for other in references):
            expected = np.mean([other[name].confidences for other in references], axis=0)
            distances[name] = float(np.abs(split.confidences - expected).mean())
    return distances
