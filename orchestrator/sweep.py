"""Ray Tune: one trial per missing run, on actors that are reused. A trial stores its row before it reports."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from orchestrator.data import Dataset
from orchestrator.experiment import Context, Outcome, Task, Workspace
from orchestrator.pool import Cluster

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own store keeps the results
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt must not look like an end: it reaches our own handler
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # we resume by our own keys, never from Tune's state
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_trials(
    tasks: Sequence[Task],
    dataset: Dataset,
    context: Context,
    cluster: Cluster,
    done: Callable[[Outcome], None],
) -> None:
    """Perform the tasks as Tune trials; `done` hears of each on the driver, its row being durable by then.

    Needs a Ray that is up and whose cores are free. A trial whose worker dies is tried again by Tune, twice.
    """
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    device = "cuda" if cluster.gpus_per_worker > 0 else "cpu"
    trainable = tune.with_parameters(trial, dataset=dataset, context=context, device=device, tasks=tuple(tasks))
    scratch = tempfile.mkdtemp(prefix="tune-")
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, "gpu": cluster.gpus_per_worker}),
        param_space={"task": tune.grid_search(list(range(len(tasks))))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=cluster.workers,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            storage_path=scratch,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=[_Listener(done)],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(Path(scratch), ignore_errors=True)


_workspace: Workspace | None = None  # of this worker process, which Tune reuses from trial to trial


def trial(config: Mapping[str, Any], dataset: Dataset, context: Context, device: str, tasks: Sequence[Task]) -> None:
    """One trial: perform the task, then report; nothing follows the report."""
    global _workspace
    if _workspace is None:
        _workspace = Workspace(dataset, context, device)
    outcome = _workspace.perform(tasks[config["task"]])
    tune.report({"outcome": vars(outcome)})


class _Listener(tune.Callback):
    """Hands each reported outcome to the driver's own code."""

    def __init__(self, done: Callable[[Outcome], None] | None = None) -> None:
        self._done = done

    def __getstate__(self) -> dict[str, Any]:
        return {"_done": None}  # Tune pickles its callbacks beside a state that we never resume from

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self._done is not None:
            self._done(Outcome(**result["outcome"]))
