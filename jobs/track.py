"""`unlearn track`: MLflow brought level with the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import typer

from jobs.ledger import artifacts
from jobs.progress import bars, console
from jobs.session import existing_store
from jobs.tracked import files
from orchestrator import costs, export, heartbeats, results, tracking
from orchestrator.contact import answering, redacted
from orchestrator.costs import Stretch
from orchestrator.outbox import RefusedError
from orchestrator.progress import stopped_series
from orchestrator.registry import InputError
from orchestrator.results import Sweep
from orchestrator.store import StorageError, Store
from orchestrator.tracking import CampaignTracker, Tracker

T = TypeVar("T")

_PAUSES = (1.0, 4.0)  # seconds before a write is tried again


def run(storage: str, tracking_uri: str | None) -> None:
    """Write every stored sweep's rows and every campaign's points that MLflow lacks; end what was left open."""
    store = existing_store(storage)
    uri = tracking.tracking_uri(store, tracking_uri)
    if uri is None:
        raise InputError("there is no MLflow to write to; give --tracking-uri, or set MLFLOW_TRACKING_URI")
    with answering(uri):
        refused = sum([_sweep(uri, store, sweep) for sweep in results.get_sweeps(store)])
        for stretches in _campaigns(store):
            _campaign(uri, store, stretches)
        if abandoned := tracking.end_abandoned(uri, store):
            console.print(f"{abandoned} runs that a killed command had left running are ended", highlight=False)
    if refused:
        raise typer.Exit(1)


def _sweep(uri: str, store: Store, sweep: Sweep) -> int:
    """Bring a sweep level; returns how many of its rows MLflow refused."""
    tracker, said = tracking.connect(uri, store, sweep), f"sweep {sweep.key[:8]} ({sweep.recipe})"
    if _is_written(store, sweep.key, tracker, said):
        return 0
    present, members = results.row_keys(store), {member.key: member for member in sweep.members}
    keys = [name for name in members if name in present]
    tracker.find(members)
    lacking = [name for name in keys if tracker.lacks(name)]
    lacking += [] if lacking or tracker.has_dataset else keys[:1]  # which brings the data set
    refused = list[str]()
    with bars({"rows": len(lacking)}) as advance:
        for name in lacking:
            row = results.get_row(store, name)
            try:
                _insistently(lambda row=row: tracker.write(row, members[row.key].arm, members[row.key].role))  # type: ignore[misc]
            except RefusedError as error:
                refused.append(f"{name[:8]}: {error}")
            advance("rows", 1)
    if lacking or not tracker.is_level(keys):
        _export(store)
        tracker.attach(files(store, sweep))
    over = present | {*(stopped_series(store, list(members)) if sweep.caution else ())}  # stopped early, as was meant
    status = "KILLED" if sweep.undecided else _status(store, members.keys() - over)
    tracker.finish(status, None if refused else keys)
    place = redacted(uri)
    console.print(f"{said}: {tracker.written} of {len(keys)} rows were new at {place}", highlight=False)
    if refused:
        console.print(f"[red]MLflow refused {len(refused)} rows[/red]; the first: {refused[0]}", highlight=False)
    return len(refused)


def _status(store: Store, missing: set[str]) -> str:
    """How a sweep stands that lacks these rows."""
    if not missing:
        return "FINISHED"
    attempts = results.get_attempts(store)
    return "FAILED" if all(name in attempts and attempts[name][-1].status == "failed" for name in missing) else "KILLED"


def _export(store: Store) -> None:
    try:
        export.ensure(store)
    except (InputError, OSError, StorageError) as error:  # damaged or read-only: what was exported before must do
        console.print(f"[yellow]the tables could not be exported anew[/yellow]: {error}", highlight=False)


def _campaign(uri: str, store: Store, stretches: list[Stretch]) -> None:
    campaign = tracking.connect_campaign(uri, store, stretches[0])
    scores = [stretch for stretch in stretches if stretch.scores_key is not None]
    last = stretches[-1]
    ended = replace(scores[-1], status=last.status, ended=last.ended) if scores else last
    said, trained = f"campaign {str(ended.campaign)[:8]} ({ended.recipe})", [part for part in stretches if part.workers]
    if _is_written(store, str(ended.campaign), campaign, said):
        return
    attached = artifacts(store, ended.scores_key) if scores else {}
    new = _insistently(lambda: tracking.replay_campaign(campaign, trained, ended, attached))
    points = sum(len(stretch.points) for stretch in trained)
    console.print(f"{said}: {new} of {points} points were new at {redacted(uri)}", highlight=False)


def _is_written(store: Store, about: str, tracker: Tracker | CampaignTracker, what: str) -> bool:
    """Whether a command is writing it just now, by its heartbeat or on this host; then it is said, and left alone."""
    if tracker.driver is None:
        return False
    if heartbeats.is_running(tracker.driver):
        who = f"process {heartbeats.process_number(tracker.driver)}, here"
    elif (command := heartbeats.worker_of(store, about)) is not None:
        who = f"{command.words} on {command.host}"
    else:
        return False
    console.print(f"{what} is being written by a command that runs ({who}): left to it", highlight=False)
    return True


def _insistently(action: Callable[[], T]) -> T:
    """Do it; what may pass is tried again after a pause, twice."""
    for pause in _PAUSES:
        try:
            return action()
        except RefusedError:
            raise
        except RuntimeError:
            time.sleep(pause)
    return action()


def _campaigns(store: Store) -> list[list[Stretch]]:
    """The stretches of each campaign that models were trained of, oldest first; the last may have found all there."""
    found: dict[str, list[Stretch]] = {}
    for stretch in costs.get_stretches(store):
        if stretch.campaign is not None:
            found.setdefault(stretch.campaign, []).append(stretch)
    return [stretches for stretches in found.values() if any(stretch.workers for stretch in stretches)]
