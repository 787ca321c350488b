"""Subset models per hour of 1, 2 and 4 workers of the pool against as many independent processes, in one run.

The independent processes train the same models with `pipeline.train_subset_model`, one thread each, in the workers'
environment, and store nothing. Warm both; they take turns; medians over rounds. Beside it how much a machine gives to
several processes at all: matrix products in 1, 2 and 4 processes at once. `python -m tests.benchmarks.scaling [models
per worker and round] [rounds]`.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile

from orchestrator import pipeline
from orchestrator.cluster import Cluster, ray_cluster
from orchestrator.experiment import Context, Workspace
from orchestrator.memorization import block_membership
from orchestrator.pipeline import Lab
from orchestrator.pool import Pool
from orchestrator.recipes import RECIPES
from orchestrator.seeds import generator
from orchestrator.store import Store
from orchestrator.tasks import Task
from tests.benchmarks.processes import Processes, matrix_rate


@functools.cache
def lab() -> Lab:
    study = RECIPES["digits"].function()
    return Lab(study.data.entry({}, study.data.options))


def train(place: int, first: int, count: int) -> None:
    """Train `count` subset models of digits, as a script without a pool would: one after another."""
    study = RECIPES["digits"].function()
    labels = lab().dataset.split_labels("train")
    for index in range(first + place * count, first + (place + 1) * count):
        block, member = divmod(index, 10)
        members = block_membership(labels, study.campaign.fraction, 0, block)[member]
        stream = generator(0, "subset model", block, member)
        pipeline.train_subset_model(
            lab(), study.model, study.training.build(), members, fraction=study.campaign.fraction, stream=stream
        )


def compare(workers: int, count: int, rounds: int) -> tuple[list[float], list[float], float]:
    """Models per second of the pool and of the processes by round, and matrix products per second of all processes."""
    study = RECIPES["digits"].function()
    campaign = study.campaign_spec(lab().dataset.fingerprint)
    ours, independent, products = [], [], []
    with tempfile.TemporaryDirectory() as folder, Processes(workers) as processes:
        inputs = (lab().dataset, Context(Store(folder)), "cpu")
        with Pool(Cluster(workers, 0.0), Workspace, inputs) as pool:
            for turn in range(-1, rounds):  # the first, which is not counted, warms both
                share, first = (count, (2 + turn * count) * workers) if turn >= 0 else (2, 0)
                places = [divmod(index, 10) for index in range(first, first + share * workers)]
                before = pool.usage.span_seconds
                outcomes = pool.map(Workspace.perform, [Task("model", campaign, *place) for place in places])
                assert not any(outcome.error for outcome in outcomes)
                seconds, _ = processes.at_once(train, first, share)
                rate = sum(processes.at_once(matrix_rate)[1])
                if turn >= 0:
                    ours.append(share * workers / (pool.usage.span_seconds - before))
                    independent.append(share * workers / seconds)
                    products.append(rate)
    return ours, independent, statistics.median(products)


def main() -> None:
    count, rounds = (int(word) for word in (*sys.argv[1:], "8", "5")[:2])
    most = min(4, os.cpu_count() or 1)
    alone: tuple[float, float, float] | None = None
    with ray_cluster(workers=most):
        for workers in (1, 2, 4)[: most.bit_length()]:
            ours, independent, products = compare(workers, count, rounds)
            ratios = sorted(a / b for a, b in zip(ours, independent, strict=True))
            medians = statistics.median(ours), statistics.median(independent), products
            alone = alone or medians
            print(
                f"{workers} workers: {3600 * medians[0]:.0f} models per hour, as many processes "
                f"{3600 * medians[1]:.0f}: {statistics.median(ratios):.3f} of them "
                f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds of {count * workers} models)"
            )
            print(
                f"  against 1: pool {medians[0] / alone[0]:.2f}, processes {medians[1] / alone[1]:.2f}, "
                f"matrix products {products / alone[2]:.2f} times as much"
            )


if __name__ == "__main__":
    main()
