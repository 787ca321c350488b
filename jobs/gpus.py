"""`--gpus-per-worker auto`: how many workers share a GPU, by a short measurement of this study's own training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from jobs.progress import console
from jobs.session import Session
from orchestrator.cluster import Cluster, sized
from orchestrator.compiled import pays
from orchestrator.experiment import Workspace
from orchestrator.pipeline import steady
from orchestrator.pool import Pool
from orchestrator.seeds import generator
from orchestrator.specs import Setting
from orchestrator.training import fit

MOST = 4  # workers on one GPU
GAIN = 1.1  # another worker must bring a tenth
SECONDS = 8.0  # of each measurement
STEPS = 50  # between two looks at the clock
FEWEST = 40  # subset models for which it is worth measuring


def best(rate: Callable[[int], float]) -> tuple[int, list[float]]:
    """How many workers to put on a GPU, and the rates seen: one more for as long as that brings a tenth."""
    rates = [rate(1)]
    while len(rates) < MOST:
        rates.append(rate(len(rates) + 1))
        if rates[-1] < GAIN * rates[-2]:
            return len(rates) - 1, rates
    return len(rates), rates


def shared(session: Session, cluster: Cluster) -> Cluster:
    """The same cluster with as many workers on each GPU as a measurement says; one, for few models."""
    models = session.plan.campaign_counts()["missing"]
    if models < FEWEST:
        console.print(f"one worker a GPU: {models} subset models are too few to measure for", highlight=False)
        return cluster
    sizes: list[Cluster] = []

    def rate(number: int) -> float:
        sizes.append(sized(session.options.workers, 1 / number))
        return steps_per_second(session, sizes[-1], "cuda", models)

    number, rates = best(rate)
    said = ", ".join(f"{place} {rate:.1f}" for place, rate in enumerate(rates, 1))
    console.print(f"steps a second by workers on a GPU: {said}; taking {number}", highlight=False)
    return sizes[number - 1]


def steps_per_second(session: Session, cluster: Cluster, device: str, models: int) -> float:
    """Steps of training a second of all workers of a cluster together; what comes once is apart."""
    asked = session.options.compile
    is_compiled = pays(device, session.study.campaign.models) if asked == "auto" else asked == "on"
    context = replace(session.context, compiled=is_compiled)
    setting = session.study.campaign_spec(session.dataset.fingerprint).setting
    with Pool(cluster, Workspace, (session.dataset, context, device)) as pool:
        pool.map(_warmed, [setting] * cluster.workers)  # dealt in turn: one to each
        return sum(pool.map(_timed, [setting] * cluster.workers))


def _warmed(workspace: Workspace, setting: Setting) -> None:
    _steps(workspace, setting, 0.0)


def _timed(workspace: Workspace, setting: Setting) -> float:
    return _steps(workspace, setting, SECONDS)


def _steps(workspace: Workspace, setting: Setting, seconds: float) -> float:
    """Steps a second over so many seconds, one round at least, of a model that is thrown away."""
    lab, training = workspace.lab, replace(setting.training.build(), epochs=1)
    stream = generator(0, "measurement")
    examples = lab.examples("train").augmented(training.augment)
    steps: list[int] = []
    with steady(lab.device):
        model, objective = lab.subset_model(setting.model, training, stream)
        start = time.perf_counter()
        while not steps or time.perf_counter() - start < seconds:
            fit(
                model,
                examples,
                training=training,
                generator=stream,
                objective=objective,
                num_batches=STEPS,
                report=lambda _, count, __: steps.append(count),
            )
        return sum(steps) / (time.perf_counter() - start)
