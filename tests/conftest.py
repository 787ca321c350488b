"""Fixtures that several modules share. One thread each: sums in another order would be other numbers."""

# the environment is set before torch and Ray are imported

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.data import Examples, Splits
from orchestrator.models import Factory, factory
from orchestrator.seeds import generator

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["PYTHONPATH"] = str(ROOT)  # so that Ray's workers find the functions of these modules
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray keeps the first mode that a process uses
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "UNLEARN_STORAGE", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def splits() -> Splits:
    """Forty random 6x6 images of three classes, twelve of them to be forgotten."""
    stream = generator(0, "test images")
    images = torch.randint(256, (40, 6, 6, 1), generator=stream, dtype=torch.uint8)
    train = Examples(images, torch.randint(3, (40,), generator=stream))
    return Splits(train, train.take(torch.arange(12)), train.take(torch.arange(12, 40)))


@pytest.fixture(scope="session")
def fresh() -> Factory:
    """Makes a small convolutional network with batch norm: 10, 20 and 20 output channels."""
    return factory("small_cnn", {"width": 10}, (1, 6, 6), 3)


@pytest.fixture
def model(fresh: Factory) -> nn.Module:
    """A new network of that kind whose batch norm has seen some data, so that no buffer is at its initial value."""
    made = fresh(generator(1, "test model"))
    with torch.no_grad():
        made.train()(torch.rand(16, 1, 6, 6, generator=generator(2, "test input")))
    return made
