"""What subset models say is the same from logits and from what is stored of many classes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from orchestrator.pipeline import half
from orchestrator.subset_outputs import SubsetOutputs, packed, unpacked


def made(classes: int, seed: int = 0, examples: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Logits float16 of three models, some examples with ties and with both zeros at the top, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (3, examples, classes)).astype(np.float16)
    logits[:, :40] = np.round(logits[:, :40] / 4)
    logits[:, 40:60] = -np.abs(logits[:, 40:60])
    logits[:, 40:60, 3], logits[:, 40:60, 1] = 0.0, -0.0
    return logits, rng.integers(0, classes, examples)


def stored(logits: np.ndarray, labels: np.ndarray) -> SubsetOutputs:
    parts = [packed("test", each, labels) for each in logits]
    return unpacked("test", {name: np.stack([part[name] for part in parts]) for name in parts[0]}, labels)


def test_both_forms_say_the_same_of_the_same_logits() -> None:
    logits, labels = made(30)
    whole, short = SubsetOutputs(labels, logits), stored(logits, labels)
    assert short.logits is None
    assert np.array_equal(short.correct, whole.correct)
    assert short.margin == pytest.approx(whole.margin, rel=1e-3, abs=1e-3)
    assert short.probability == pytest.approx(whole.probability, abs=2e-3)
    assert whole.probability == pytest.approx(1 / (1 + np.exp(-whole.margin.astype(float))), abs=1e-6)


@pytest.mark.parametrize(("classes", "names"), [(20, {"test"}), (21, {"test_correct", "test_margin"})])
def test_above_twenty_classes_logits_are_not_stored(classes: int, names: set[str]) -> None:
    logits, labels = made(classes)
    parts = packed("test", logits[0], labels)
    assert set(parts) == names
    assert sum(part.nbytes for part in parts.values()) == (40 if classes == 20 else 3) * len(labels)


@pytest.mark.parametrize(("classes", "scale"), [(2, 1), (10, 1), (30, 1), (10, 20)])
def test_logits_say_what_numpy_and_scipy_say(classes: int, scale: int) -> None:
    logits, labels = made(max(classes, 4)) if classes != 2 else (made(4)[0][..., 2:], made(4)[1] % 2)
    logits *= np.float16(scale)  # times 20 they leave the range of exponentials in float32
    assert (np.abs(logits).max() > 88) == (scale > 1)
    said, places = SubsetOutputs(labels, logits), np.arange(len(labels))
    assert np.array_equal(said.correct, logits.argmax(axis=2) == labels)
    exact = logits.astype(np.float64)
    assert said.probability == pytest.approx(np.exp(log_softmax(exact, axis=2))[:, places, labels], abs=1e-6)
    others = exact.copy()
    others[:, places, labels] = -np.inf
    margin = exact[:, places, labels] - logsumexp(others, axis=2)
    assert said.margin == pytest.approx(margin, rel=1e-5, abs=1e-5)


def test_what_cannot_be_held_is_at_the_end_of_the_range_and_nan_is_wrong() -> None:
    logits = half(np.array([[[1e9, -1e9, 0.0], [-1e9, 1e9, 0.0], [0.0, np.nan, 1.0], [1.0, 2.0, 3.0]]]))
    labels = np.array([0, 0, 0, 2])
    said = SubsetOutputs(labels, logits)
    assert said.correct.tolist() == [[True, False, False, True]]
    assert said.probability[0, :2].tolist() == [1.0, 0.0]
    wide = np.concatenate([logits[0, :2], np.full((2, 20), -9, np.float16)], axis=1)
    assert stored(wide[None], labels[:2]).margin[0].tolist() == [65504.0, -65504.0]
