"""Ray Tune: a map whose items are trials, on actors that are reused; results are durable before they are reported."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ray import tune

from orchestrator.pool import MAX_TRIES, WorkerDeathError, death_reason
from orchestrator.store import StorageError

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

    Each worker makes its state once, by `setup(*inputs)`. Needs a Ray that is up and whose cores are free. Raises
    WorkerDeathError, after all the others are done, where the workers of a trial kept dying, and StorageError at once
    where the storage is full or gone.
    """
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    trainable = tune.with_parameters(trial, function=function, items=tuple(items), setup=setup, inputs=inputs)
    scratch = tempfile.mkdtemp(prefix="tune-")
    listener = _Listener(done)
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
            failure_config=tune.FailureConfig(max_failures=MAX_TRIES - 1),
            callbacks=[listener],
        ),
    )
    tuning, level = logging.getLogger("ray.tune"), logging.getLogger("ray.tune").level
    tuning.setLevel(logging.CRITICAL)  # a death is said by who catches it, once, and not as a traceback of Ray's
    try:
        tuner.fit()
    except Exception as error:  # Tune wraps what a callback raises
        raise listener.stopped or error from None
    finally:
        tuning.setLevel(level)
        shutil.rmtree(scratch, ignore_errors=True)
    if listener.lost:
        raise WorkerDeathError([(items[item], reason) for item, reason in listener.lost], len(items))


_states: dict[str, Any] = {}  # of this worker process, which Tune reuses from trial to trial


def trial(
    config: Mapping[str, Any],
    function: Callable[[S, A], R],
    items: Sequence[A],
    setup: Callable[..., S],
    inputs: tuple[Any, ...],
) -> None:
    """One trial: compute, then report; nothing follows the report. Storage that is gone is reported too: see below."""
    if "state" not in _states:
        _states["state"] = setup(*inputs)
    try:
        result = function(_states["state"], items[config["item"]])
    except StorageError as error:
        tune.report({"stopped": str(error)})
        return
    tune.report({"result": result})


class _Listener(tune.Callback):
    """Hands each result to the driver's own code, and keeps the items whose workers kept dying."""

    def __init__(self, done: Callable[[Any], None] | None) -> None:
        self._done = done
        self.lost: list[tuple[int, str]] = []
        self.stopped: StorageError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_done": None,
            "lost": [],
            "stopped": None,
        }  # Tune pickles its callbacks beside a state that we never resume from

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "stopped" in result:  # no other trial could keep what it computes: all end, and none is tried again
            self.stopped = StorageError(result["stopped"])
            raise self.stopped
        if self._done is not None:
            self._done(result["result"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.lost.append((trial.config["item"], death_reason(MAX_TRIES, trial.get_pickled_error())))
