"""Runs that say how far they have come, so that they can be stopped early; what is kept of one that was."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from orchestrator.costs import Outcome
from orchestrator.results import Attempt, put_attempt
from orchestrator.sealed import unseal
from orchestrator.specs import RunSpec, key
from orchestrator.store import Store

A = TypeVar("A")
P = TypeVar("P")

STOPPED = "stopped"  # the status of an attempt that was

Heard = Callable[[int, Mapping[str, float]], None]
"""Is told the number of each epoch, from 1, and what pipeline.SERIES have of it."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: the number of epochs, its series' last values, and what it has cost."""

    epoch: int
    series: Mapping[str, float]
    outcome: Outcome


@dataclass(frozen=True)
class Watch(Generic[A, P]):
    """How trials are stopped early: functions of the driver.

    `stops(item, progress)` hears each report of a trial but its last, and says whether it is stopped; `stopped(item,
    reports)` hears of one that was, with all that it reported.
    """

    stops: Callable[[A, P], bool]
    stopped: Callable[[A, list[P]], None]


def but_last(heard: Heard, spec: object) -> Heard:
    """Tell of every epoch of a run but its last, which is over only when its row is stored.

    A method without an option `epochs` does not say which is the last: each of its epochs is told when the next ends.
    """
    last = spec.method.options.get("epochs") if isinstance(spec, RunSpec) else None
    before: list[tuple[int, Mapping[str, float]]] = []

    def tell(epoch: int, series: Mapping[str, float]) -> None:
        if last is not None:
            if epoch < last:
                heard(epoch, series)
            return
        before.append((epoch, series))
        if len(before) > 1:
            heard(*before.pop(0))

    return tell


def put_stopped(store: Store, spec: RunSpec, reports: Sequence[Progress], why: str) -> None:
    """Keep a run that was stopped early as an attempt, with the epochs that it had."""
    series = {name: [report.series[name] for report in reports] for name in (reports[-1].series if reports else ())}
    name, outcome = key(spec), reports[-1].outcome if reports else None
    provenance = {
        "host": socket.gethostname(),
        "time": time.time(),
        "kind": "run",
        "what": outcome.label if outcome else "",
        "objects": [f"rows/{name}.json"],
        "series": series,
        "seconds": outcome.seconds if outcome else 0.0,
    }
    error = f"stopped after {len(reports)} {'epoch' if len(reports) == 1 else 'epochs'} ({why})"
    put_attempt(store, Attempt(name, spec.model_dump(mode="json"), STOPPED, error, provenance))


def stopped_series(store: Store, keys: Sequence[str]) -> dict[str, Mapping[str, Sequence[float]]]:
    """Of the runs whose last attempt was stopped early, by key: the series that they had."""
    last = last_attempts(store, frozenset(keys))
    return {name: tried.provenance["series"] for name, tried in last.items() if tried.status == STOPPED}


def last_attempts(store: Store, keys: Collection[str]) -> dict[str, Attempt]:
    """The newest attempt at each of these runs that has any, by key."""
    newest: dict[str, int] = {}
    for name in store.names("attempts") if keys else ():
        run, _, number = name.removesuffix(".json").partition("/")
        if run in keys:
            newest[run] = max(int(number), newest.get(run, 0))
    return {run: Attempt(**unseal(store, f"attempts/{run}/{number}.json")) for run, number in newest.items()}
