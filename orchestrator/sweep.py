"""Ray Tune: a map whose items are trials, on actors that are reused; results are durable before they are reported."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ray import tune

S = TypeVar("S")
A = TypeVar("A")
R = TypeVar("R")

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own store keeps the results
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt must not look like an end: it reaches our own handler
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # we resume by our own keys, never from Tune's state
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
MAX_DEATHS = 2  # workers that one trial may lose before it is given up


def run_trials(
    function: Callable[[S, A], R],
    items: Sequence[A],
    *,
    setup: Callable[..., S],
    inputs: tuple[Any, ...],
    workers: int,
    gpus_per_worker: float,
    done: Callable[[R], None],
) -> None:
    """Call `function(state, item)` in one Tune trial per item; `done` hears of each result, on the driver.

    Each worker makes its state once, by `setup(*inputs)`. Needs a Ray that is up and whose cores are free. A trial
    whose workers keep dying ends without a result; the others go on.
    """
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    trainable = tune.with_parameters(trial, function=function, items=tuple(items), setup=setup, inputs=inputs)
    scratch = tempfile.mkdtemp(prefix="tune-")
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, "gpu": gpus_per_worker}),
        param_space={"item": tune.grid_search(list(range(len(items))))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=workers,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            storage_path=scratch,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            callbacks=[_Listener(done)],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_states: dict[str, Any] = {}  # of this worker process, which Tune reuses from trial to trial


def trial(
    config: Mapping[str, Any],
    function: Callable[[S, A], R],
    items: Sequence[A],
    setup: Callable[..., S],
    inputs: tuple[Any, ...],
) -> None:
    """One trial: compute, then report; nothing follows the report."""
    if "state" not in _states:
        _states["state"] = setup(*inputs)
    tune.report({"result": function(_states["state"], items[config["item"]])})


class _Listener(tune.Callback):
    """Hands each result to the driver's own code."""

    def __init__(self, done: Callable[[Any], None] | None) -> None:
        self._done = done

    def __getstate__(self) -> dict[str, Any]:
        return {"_done": None}  # Tune pickles its callbacks beside a state that we never resume from

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self._done is not None:
            self._done(result["result"])
