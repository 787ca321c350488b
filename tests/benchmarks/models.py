"""Subset models per hour: the pool against a plain single-process PyTorch loop with a DataLoader, in one run.

Same data, network, epochs, rates and subsets; the rival has torch's default number of threads and DataLoader's
default settings. Start-up of both apart. `python -m tests.benchmarks.models [models of ours] [models of the rival]`.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.data import Dataset
from orchestrator.experiment import Context, Task, Workspace
from orchestrator.memorization import block_membership
from orchestrator.pool import Cluster, Pool, ray_cluster
from orchestrator.recipes import RECIPES
from orchestrator.store import Store
from orchestrator.study import Study
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


def pooled(study: Study, dataset: Dataset, cluster: Cluster, folder: str, blocks: int) -> tuple[float, float]:
    """Seconds per model on the pool, storing included, and the mean accuracy on the subsets."""
    from orchestrator.results import unpack

    store = Store(folder)
    campaign = study.campaign_spec(dataset.fingerprint)
    tasks = [Task("model", campaign, block, member) for block in range(blocks) for member in range(10)]
    with Pool(cluster, Workspace, (dataset, Context(store), "cpu")) as pool:
        start = time.perf_counter()
        outcomes = pool.map(Workspace.perform, tasks)
        seconds = time.perf_counter() - start
    assert not any(outcome.error for outcome in outcomes)
    whole = [Task("block", campaign, block).object_name for block in range(blocks)]
    accuracies = [unpack(store, name)["in_accuracy"].mean() for name in whole]
    return seconds / (10 * blocks), float(np.mean(accuracies))


def main() -> None:
    import tempfile

    study = RECIPES["digits"].function()
    dataset = study.data.entry({}, study.data.options)
    models, rivals = (int(word) for word in (*sys.argv[1:], "80", "8")[:2])
    with ray_cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        ours, fit = pooled(study, dataset, cluster, folder, models // 10)
    plain, plain_fit = plain_loop(study, dataset, rivals)
    print(f"pool of {cluster.workers}: {3600 / ours:.0f} models per hour ({models} models, subset accuracy {fit:.4f})")
    print(f"plain loop: {3600 / plain:.0f} models per hour ({rivals} models, subset accuracy {plain_fit:.4f})")
    print(f"ratio {plain / ours:.1f}")


if __name__ == "__main__":
    main()
