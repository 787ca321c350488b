"""Ray Tune: a map whose items are trials, on actors that are reused; results are durable before they are reported."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.pipeline import RunStoppedError
from orchestrator.pool import (
    MAX_TRIES,
    PATIENCE_SECONDS,
    NoWorkersError,
    WorkerDeathError,
    death_reason,
    no_workers,
    what_killed,
)
from orchestrator.progress import Watch
from orchestrator.store import StorageError

S = TypeVar("S")
A = TypeVar("A")
R = TypeVar("R")

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own store keeps the results
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt must not look like an end: it reaches our own handler
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # we resume by our own keys, never from Tune's state
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_NAME = "unlearn-trial"  # with a token: two drivers on one cluster must not register under one name


def run_trials(
    function: Callable[..., R],
    items: Iterable[A],
    *,
    setup: Callable[..., S],
    inputs: tuple[Any, ...],
    workers: int,
    gpus_per_worker: float,
    done: Callable[[R], None],
    tries: int = MAX_TRIES,
    watch: Watch[A, Any] | None = None,
    begun: Callable[[A], None] | None = None,
    died: Callable[[A, str], None] | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> None:
    """Call `function(state, item)` in one Tune trial per item; `done` hears of each result, on the driver.

    `begun` hears of each item that a worker turns to, `died` of each that is tried again, with what killed its worker.

    `items` are taken one by one as workers become free, so that one may depend on earlier results, and none is begun
    once they end. Each worker makes its state once, by `setup(*inputs)`. Under a `watch` the function is given a third
    argument, to report its progress to; what is stopped there must let RunStoppedError pass. Needs a Ray that is up and
    whose cores are free. Raises WorkerDeathError, after all the others are done, where the workers of a trial kept
    dying, StorageError at once where the storage is full or gone, NoWorkersError where no node had room for a worker
    for `patience_seconds` (Tune itself waits for ever), and RuntimeError where Tune returned before all the items were
    over, which it does not say by itself.
    """
    coming = iter(items)
    first = next(coming, None)
    if first is None:
        return  # Tune takes a search without trials for an error
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    bound = tune.with_parameters(trial, function=function, setup=setup, inputs=inputs, is_watched=watch is not None)
    scratch = tempfile.mkdtemp(prefix="tune-")
    bound.__name__ = f"{_NAME}-{os.path.basename(scratch)}"
    feed, listener = _Feed(chain([first], coming)), _Listener(done, tries, watch, begun, died, patience_seconds)
    tuner = tune.Tuner(
        tune.with_resources(bound, {"cpu": 1, "gpu": gpus_per_worker}),
        tune_config=tune.TuneConfig(
            search_alg=feed,
            scheduler=_Judge(watch),
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=workers,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            storage_path=scratch,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=tries - 1),
            callbacks=[listener],
        ),
    )
    tuning, level = logging.getLogger("ray.tune"), logging.getLogger("ray.tune").level
    tuning.setLevel(logging.CRITICAL)  # a death is said by who catches it, once, and not as a traceback of Ray's
    try:
        tuner.fit()
    except Exception as error:  # Tune wraps what a callback raises
        raise feed.error or listener.stopped or error from None
    finally:
        tuning.setLevel(level)
        shutil.rmtree(scratch, ignore_errors=True)
    if feed.error is not None:
        raise feed.error
    if listener.lost:
        raise WorkerDeathError(listener.lost, feed.given)
    if listener.over < feed.given:
        raise RuntimeError(f"Tune ended with {feed.given - listener.over} of {feed.given} trials unfinished")


_states: dict[str, Any] = {}  # of this worker process, which Tune reuses from trial to trial


def trial(
    config: Mapping[str, Any],
    function: Callable[..., Any],
    setup: Callable[..., Any],
    inputs: tuple[Any, ...],
    is_watched: bool,
) -> None:
    """One trial: compute, then report; nothing follows the report. Storage that is gone is reported too: see below."""
    if "state" not in _states:
        _states["state"] = setup(*inputs)
    try:
        result = function(_states["state"], config["item"].value, *([_report] if is_watched else []))
    except StorageError as error:
        tune.report({"stopped": str(error)})
        return
    except RunStoppedError:
        sys.exit(0)  # as Tune has it end: the actor is reused only if its function is over
    tune.report({"result": result})


def _report(progress: Any) -> None:
    """Report from within a trial; Tune ends the trial there (SystemExit) where it is stopped."""
    try:
        tune.report({"progress": progress})
    except SystemExit:
        raise RunStoppedError from None  # which no `except Exception` takes for a failure


class _Item:
    """An item on its way to a worker; Tune copies and prints what it is given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, _: Any) -> _Item:
        return self

    def __repr__(self) -> str:
        return "item"


class _Feed(Searcher):
    """Hands items to Tune one by one, as it asks; keeps what was raised in making one."""

    def __init__(self, items: Iterator[Any]) -> None:
        super().__init__(metric="unused", mode="max")
        self._items: Iterator[Any] | None = items
        self.given = 0
        self.error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_items": None, "given": 0, "error": None}  # Tune pickles it for a resume that we never ask for

    def suggest(self, trial_id: str) -> Any:
        if self._items is None:
            return Searcher.FINISHED
        try:
            item = next(self._items)
        except StopIteration:
            self._items = None
            return Searcher.FINISHED
        except Exception as error:  # Tune would wrap it; the items that are running come to their end
            self._items, self.error = None, error
            return Searcher.FINISHED
        self.given += 1
        return {"item": _Item(item)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the listener hears of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see __getstate__."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **_: Any) -> bool:
        return True


class _Judge(FIFOScheduler):
    """Stops the trials that the watch says; never at the last report, which has the result."""

    def __init__(self, watch: Watch[Any, Any] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __getstate__(self) -> dict[str, Any]:
        return {"_watch": None}

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self._watch is not None and "progress" in result:
            stops = self._watch.stops(trial.config["item"].value, result["progress"])
            return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)
        return str(TrialScheduler.CONTINUE)


class _Listener(tune.Callback):
    """Hands each result to the driver's own code, and keeps the items whose workers kept dying."""

    def __init__(
        self,
        done: Callable[[Any], None] | None,
        tries: int,
        watch: Watch[Any, Any] | None,
        begun: Callable[[Any], None] | None,
        died: Callable[[Any, str], None] | None,
        patience_seconds: float,
    ) -> None:
        self._done, self._tries, self._watch, self._begun, self._died = done, tries, watch, begun, died
        self._patience_seconds, self._idle_since = patience_seconds, math.inf
        self._reports: dict[str, list[Any]] = {}  # of the trials that are running, by trial
        self._finished: set[str] = set()
        self.over = 0
        self.lost: list[tuple[Any, str]] = []
        self.stopped: StorageError | NoWorkersError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_done": None,
            "_watch": None,
            "_begun": None,
            "_died": None,
        }  # Tune pickles its callbacks beside a state that we never resume from

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        now = time.monotonic()
        is_waiting = not all(t.is_finished() for t in trials) and all(t.status != "RUNNING" for t in trials)
        self._idle_since = min(self._idle_since, now) if is_waiting else math.inf
        if now - self._idle_since > self._patience_seconds:
            self.stopped = no_workers(self._patience_seconds, f"{len(self._finished)} trials are done")
            raise self.stopped

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self._begun is not None:
            self._begun(trial.config["item"].value)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "stopped" in result:  # no other trial could keep what it computes: all end, and none is tried again
            self.stopped = StorageError(result["stopped"])
            raise self.stopped
        if "progress" in result:
            self._reports.setdefault(trial.trial_id, []).append(result["progress"])
        elif "result" in result and trial.trial_id not in self._finished and self._done is not None:
            self._finished.add(trial.trial_id)
            self._done(result["result"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._reports.pop(trial.trial_id, None)  # it begins anew
        if self._died is None or trial.trial_id in self._finished:
            return
        try:
            self._died(trial.config["item"].value, what_killed(_last_error(trial)))
        except StorageError as error:
            self.stopped = error
            raise

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.over += 1
        reports = self._reports.pop(trial.trial_id, [])
        if trial.trial_id not in self._finished and self._watch is not None:
            self._watch.stopped(trial.config["item"].value, reports)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.over += 1
        if trial.trial_id in self._finished:  # its worker died after its report
            return
        self.lost.append((trial.config["item"].value, death_reason(self._tries, _last_error(trial))))


def _last_error(trial: Any) -> str | None:
    """What Tune noted of a trial's last failure, beside the driver; None where it noted nothing."""
    try:
        noted = Path(trial.error_file).read_text(errors="replace")
    except (OSError, TypeError):  # the second: there is no file
        return None
    return noted.rpartition("Failure # ")[2].partition("\n")[2].strip() or None
