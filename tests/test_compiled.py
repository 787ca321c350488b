"""Subset models through one compiled model, against the same models trained eagerly. On a CPU: no CUDA graphs here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from orchestrator import compiled
from orchestrator.compiled import Reused, pays
from orchestrator.data import Dataset
from orchestrator.models import Factory
from orchestrator.pipeline import Lab, train_subset_model
from orchestrator.registry import Chosen
from orchestrator.seeds import generator, numpy_generator
from orchestrator.training import Training, clone, fit

TRAINING = Training(0.1, epochs=3, batch_size=8, momentum=0.9, weight_decay=0.01, warmup=0.3, final=0.05)


@pytest.fixture
def dataset() -> Dataset:
    rng = numpy_generator(0, "compiled")
    labels = np.arange(60) % 3
    images = rng.integers(256, size=(60, 6, 6, 1), dtype=np.uint8)
    return Dataset(images, labels, labels, {"train": np.arange(40), "test": np.arange(40, 60)}, ("a", "b", "c"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is traced and reused is the same under every backend of torch's; this one runs no C++ compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(lab: Lab, number: int, training: Training = TRAINING) -> dict[str, np.ndarray]:
    members = numpy_generator(number, "members").permutation(40) < 28
    model = Chosen("small_cnn", {"width": 4})
    return train_subset_model(lab, model, training, members, fraction=0.7, stream=generator(number, "subset model"))


def test_compiled_subset_models_are_the_eager_ones_and_compile_once(dataset: Dataset) -> None:
    eager, fast = Lab(dataset), Lab(dataset, compiled=True)
    graphs = []
    for number in range(3):
        plain, found = trained(eager, number), trained(fast, number)
        graphs.append(counters["stats"]["unique_graphs"])
        np.testing.assert_allclose(found["train"], plain["train"], atol=2e-3)
        np.testing.assert_allclose(found["test"], plain["test"], atol=2e-3)
        assert not np.array_equal(plain["train"], trained(eager, number + 1)["train"]), "models differ by their subset"
    assert graphs == [1, 1, 1]
    assert eager.subset_numerics == eager.numerics == fast.numerics
    assert fast.subset_numerics == eager.numerics.replace("eager", "compiled")


class Branching(nn.Module):
    """Looks at its values to decide what to do: nothing that can be compiled whole. Drops at random besides."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.flatten(x, 1), 0.5, self.training)
        return self.head(-x if float(x.sum()) < 0 else x)  # type: ignore[no-any-return]


def test_what_cannot_be_compiled_is_trained_eagerly_and_said_once(dataset: Dataset) -> None:
    examples = dataset.examples("train")
    first, plain = Branching(), Branching()
    with pytest.warns(RuntimeWarning, match="subset models are trained without compiling") as told:
        reused = Reused(clone(first), TRAINING, examples)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert reused.mode == "eager"
    torch.manual_seed(0)
    found = fit(reused.loaded(plain), examples, training=TRAINING, generator=generator(3), objective=reused.objective)
    torch.manual_seed(0)
    fit(plain, examples, training=TRAINING, generator=generator(3))
    assert torch.equal(found.get_parameter("head.weight"), plain.head.weight)


def test_compiling_draws_no_random_numbers_and_moves_nothing(dataset: Dataset, fresh: Factory) -> None:
    made = nn.Sequential(fresh(generator(1)), nn.Dropout(0.5))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reused = Reused(clone(made), TRAINING, dataset.examples("train"))
    assert torch.equal(torch.rand(3), expected)
    loaded = reused.loaded(made)
    assert loaded is reused.model
    for value, before in zip(loaded.state_dict().values(), made.state_dict().values(), strict=True):
        assert torch.equal(value, before)
    assert all(parameter.grad is None for parameter in loaded.parameters())


def test_another_training_is_compiled_anew(dataset: Dataset) -> None:
    eager, fast = Lab(dataset), Lab(dataset, compiled=True)
    for training in (TRAINING, Training(0.05, epochs=1, batch_size=12, precision="bf16")):
        found, plain = trained(fast, 0, training), trained(eager, 0, training)
        np.testing.assert_allclose(found["train"], plain["train"], atol=0.02 if training.precision == "bf16" else 2e-3)
        assert fast.subset_numerics.endswith("compiled")


def test_compiling_pays_on_a_gpu_for_many_models() -> None:
    assert not pays("cpu", 10_000)
    assert [pays("cuda", models) for models in (10, 99, 100, 4000)] == [False, False, True, True]
