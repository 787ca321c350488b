"""Stand-ins for memorization: their formulas by hand, and training that is not disturbed by being watched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator import pipeline
from orchestrator.data import DATASETS, Examples, Splits
from orchestrator.pipeline import Lab
from orchestrator.proxies import PROXIES, LearningEvents, Watcher, curvatures, log_probabilities
from orchestrator.registry import Chosen, InputError
from orchestrator.seeds import generator
from orchestrator.training import Training, clone, fit, predict


class Fixed(nn.Module):
    """Says the same logits for the same example, whatever the weights."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


def test_learning_events_by_hand() -> None:
    """Two examples of three classes, over two epochs."""
    examples = Examples(torch.zeros(2, 4, 4, 1, dtype=torch.uint8), torch.tensor([0, 2]))
    watcher = Watcher(examples)
    epochs = [[[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]], [[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]]
    for probabilities in epochs:
        watcher.look(Fixed(torch.tensor(probabilities).log()))

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p)

    found = {
        name: PROXIES[name]({"events": watcher.events}, {}) for name in ("confidence", "max_confidence", "entropy")
    }
    assert found["confidence"] == pytest.approx([1 - (0.5 + 0.2) / 2, 1 - (0.1 + 0.8) / 2])
    assert found["max_confidence"] == pytest.approx([1 - (0.5 + 0.7) / 2, 1 - (0.6 + 0.8) / 2])
    means = [(entropy(epochs[0][i]) + entropy(epochs[1][i])) / 2 for i in range(2)]
    assert found["entropy"] == pytest.approx(means, rel=1e-5)
    assert PROXIES["binary_accuracy"]({"events": watcher.events}, {}) == pytest.approx([0.5, 0.5])


def test_curvature_is_that_of_a_slow_loop(model: nn.Module, splits: Splits) -> None:
    net = clone(model).eval()

    def gradient(image: Tensor, label: Tensor) -> Tensor:
        given = image.clone().requires_grad_(True)
        functional.cross_entropy(net(given[None]), label[None]).backward()  # type: ignore[no-untyped-call]
        assert given.grad is not None
        return given.grad

    expected = []
    for image, label in zip(
        splits.train.images[:6].permute(0, 3, 1, 2).float() / 255, splits.train.labels, strict=False
    ):
        here = gradient(image, label)
        step = 0.01 * here.sign() / (here.sign().norm() + 1e-7)
        expected.append(float((gradient(image + step, label) - here).norm()))
    found = curvatures(model, splits.train.take(torch.arange(6)), batch_size=4)
    assert found == pytest.approx(expected, rel=1e-2)  # single precision, small differences
    assert found.min() > 0


def test_holdout_retraining_is_the_symmetric_divergence_from_a_copy(model: nn.Module, splits: Splits) -> None:
    available = {"model": model, "train": splits.train, "validation": splits.retain, "generator": generator(3)}
    options = {"lr": 0.05, "epochs": 2, "batch_size": 8, "momentum": 0.9, "weight_decay": 5e-4}
    before = clone(model)
    found = PROXIES["holdout_retraining"](available, options)
    copy = fit(clone(model), splits.retain, training=Training(0.05, 2, 8, 0.9, 5e-4, final=1.0), generator=generator(3))
    p, q = (torch.tensor(predict(net, splits.train)).double().softmax(1) for net in (model, copy))
    expected = [
        (functional.kl_div(b.log(), a, reduction="sum") + functional.kl_div(a.log(), b, reduction="sum")) / 2
        for a, b in zip(p, q, strict=True)
    ]
    assert found == pytest.approx([float(value) for value in expected], rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(InputError, match="needs a validation split"):
        PROXIES["holdout_retraining"]({**available, "validation": splits.retain.take(torch.arange(0))}, options)


@pytest.fixture(scope="module")
def watched() -> tuple[Lab, dict[str, Any], dict[str, np.ndarray], dict[str, float]]:
    """All proxies of a small network on the digits, 5 % of whose labels are flipped."""
    data = DATASETS["digits"]
    lab = Lab(data({}, data.resolve({"label_noise": 0.05})))
    setting = {"model": Chosen("small_cnn", {"width": 8}), "training": Training(0.1, 8, 64)}
    values, seconds = pipeline.proxies(lab, [Chosen(name, {}) for name in PROXIES], **setting, seed=0)
    return lab, setting, values, seconds


def test_every_proxy_finds_flipped_labels_and_says_its_cost(watched: Any) -> None:
    lab, _, values, seconds = watched
    flipped = lab.dataset.split_labels("train") != lab.dataset.split_true_labels("train")
    assert set(values) == set(PROXIES)
    assert set(seconds) == {*PROXIES, "training"}
    for name, value in values.items():
        assert value.shape == (1200,), name
        assert value.dtype == np.float64
        assert np.isfinite(value).all()
        ahead = np.mean([(value[flipped] > other).mean() for other in value[~flipped]])
        assert ahead > 0.7, f"{name}: a flipped example is above another in {ahead:.2f} of pairs"


def test_watching_changes_nothing(watched: Any) -> None:
    lab, setting, values, _ = watched
    plain = pipeline.train_original(lab, **setting, seed=0)
    seen, watcher, _ = pipeline.train_watched(lab, **setting, seed=0, with_curvature=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), seen.state_dict().values(), strict=True))
    assert np.array_equal(PROXIES["confidence"]({"events": watcher.events}, {}), values["confidence"])
    assert watcher.epochs == 8


def test_log_probabilities_bear_large_logits() -> None:
    found = log_probabilities(np.array([[1e4, 0.0], [3.0, 3.0]], dtype=np.float32))
    assert found[0].tolist() == [0.0, -1e4]
    assert found[1] == pytest.approx([-math.log(2)] * 2)
    assert isinstance(LearningEvents(*(np.zeros(1) for _ in range(4))).entropy, np.ndarray)
