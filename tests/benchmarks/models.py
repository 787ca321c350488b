"""Subset models per hour: the pool against a plain single-process PyTorch loop with a DataLoader, in one run.

Same data, network, epochs, rates and subsets; the rival has torch's default number of threads and DataLoader's
default settings. They take turns; start-up of both apart; medians over rounds. Then the share of worker-seconds, first
task handed out to last returned, in training and prediction, with models of a second or more (four times the epochs).
`python -m tests.benchmarks.models [models of ours] [models of the rival] [rounds]`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.arrays import unpack
from orchestrator.cluster import ray_cluster
from orchestrator.data import Dataset
from orchestrator.experiment import Context, Workspace
from orchestrator.memorization import block_membership
from orchestrator.pool import Pool
from orchestrator.recipes import RECIPES
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.tasks import Task
from orchestrator.training import rate_factor


def plain_loop(study: Study, dataset: Dataset, count: int) -> tuple[float, float]:
    """Seconds per model of the loop that a research script has, and the mean accuracy on its subset."""
    torch.set_num_threads(os.cpu_count() or 1)
    rows = dataset.splits["train"]
    images = torch.tensor(dataset.images[rows]).permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor(dataset.labels[rows])
    test = torch.tensor(dataset.images[dataset.splits["test"]]).permute(0, 3, 1, 2).float() / 255
    recipe = study.training
    accuracies, start = [], time.perf_counter()
    for members in block_membership(dataset.split_labels("train"), study.campaign.fraction, 0, 0)[:count]:
        chosen = torch.tensor(np.flatnonzero(members))
        loader = DataLoader(
            TensorDataset(images[chosen], labels[chosen]), batch_size=recipe.batch_size, shuffle=True, drop_last=True
        )
        model = study.model.entry(
            {"image_shape": dataset.image_shape, "num_classes": dataset.num_classes}, study.model.options
        )
        optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        steps = len(loader) * recipe.epochs
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step, steps=steps: rate_factor(min(step, steps - 1), steps, recipe.warmup, recipe.final)
        )
        for _ in range(recipe.epochs):
            for batch, target in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch), target).backward()
                optimizer.step()
                scheduler.step()
        model.eval()
        with torch.no_grad():
            predicted = torch.cat([model(part).argmax(1) for part in images.split(512)])
            for part in test.split(512):
                model(part)
        accuracies.append((predicted[chosen] == labels[chosen]).float().mean().item())
    return (time.perf_counter() - start) / count, float(np.mean(accuracies))


class Measured(NamedTuple):
    """Seconds per model, the mean accuracy on the subsets, the share of worker-seconds in training, seconds each."""

    seconds: float
    accuracy: float
    utilisation: float
    training_seconds: float


def pooled(study: Study, dataset: Dataset, blocks: int) -> Measured:
    """Train blocks of a campaign on a pool of all cores, storing included."""
    campaign = study.campaign_spec(dataset.fingerprint)
    tasks = [Task("model", campaign, block, member) for block in range(blocks) for member in range(10)]
    with ray_cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        with Pool(cluster, Workspace, (dataset, Context(store), "cpu")) as pool:
            outcomes = pool.map(Workspace.perform, tasks)
            usage = pool.usage
        assert not any(outcome.error for outcome in outcomes)
        whole = [Task("block", campaign, block).object_name for block in range(blocks)]
        accuracy = float(np.mean([unpack(store, name)["in_accuracy"].mean() for name in whole]))
    training = sum(outcome.training_seconds for outcome in outcomes)
    return Measured(usage.span_seconds / len(tasks), accuracy, training / usage.worker_seconds, training / len(tasks))


def main() -> None:
    study = RECIPES["digits"].function()
    dataset = study.data.entry({}, study.data.options)
    models, rivals, rounds = (int(word) for word in (*sys.argv[1:], "80", "8", "3")[:3])
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(pooled(study, dataset, models // 10))
        plain.append(plain_loop(study, dataset, rivals))
    ratios = sorted(rival / own.seconds for own, (rival, _) in zip(ours, plain, strict=True))
    print(
        f"pool of {os.cpu_count()}: {3600 / median(own.seconds for own in ours):.0f} models per hour "
        f"({rounds} rounds of {models} models, subset accuracy {ours[0].accuracy:.4f})"
    )
    print(
        f"plain loop: {3600 / median(rival for rival, _ in plain):.0f} models per hour "
        f"({rounds} rounds of {rivals} models, subset accuracy {plain[0][1]:.4f})"
    )
    print(f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    training = study.training.model_copy(update={"epochs": 4 * study.training.epochs})
    longer = study.model_copy(update={"training": training})
    used = pooled(longer, dataset, max(1, models // 20))
    print(
        f"utilisation: {used.utilisation:.1%} of worker-seconds in training and prediction, "
        f"with models of {used.training_seconds:.1f} s; {median(own.utilisation for own in ours):.1%} with models of "
        f"{median(own.training_seconds for own in ours):.1f} s"
    )


if __name__ == "__main__":
    main()
