"""What commands cost: which worker did what for how long. Provenance, kept in the store; never part of a key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from orchestrator.sealed import seal, unseal
from orchestrator.store import Store

_S, _I, _F = pa.string(), pa.int64(), pa.float64()
COLUMNS: Mapping[str, list[tuple[str, pa.DataType, bool]]] = {
    "costs": [
        ("cost", _S, False),
        ("command", _S, False),
        ("recipe", _S, False),
        ("campaign", _S, True),
        ("status", _S, False),
        ("device", _S, False),
        ("devices_per_worker", _F, False),
        ("created", _F, False),
        ("startup_seconds", _F, False),
        ("span_seconds", _F, False),
        ("num_workers", _I, False),
        ("models", _I, False),
        ("model_seconds", _F, False),
        ("cached", _I, False),
        ("cached_seconds", _F, True),
    ],
    "workers": [
        ("cost", _S, False),
        ("host", _S, True),
        ("worker", _I, False),
        ("tasks", _I, False),
        ("models", _I, False),
        ("training_seconds", _F, False),
        ("outside_seconds", _F, False),
        ("idle_seconds", _F, False),
        ("cpu_seconds", _F, False),
    ],
}
"""The tables: one line per stretch of work, and one per stretch and worker, whose seconds add up to the span."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task: seconds in training and prediction, wall and CPU seconds in all, its error, its worker."""

    kind: str
    key: str
    models: int
    training_seconds: float
    seconds: float
    cpu_seconds: float
    began: float  # seconds since 1970
    error: str | None = None
    label: str = ""
    host: str = ""
    worker: str = ""  # unique to the process; empty: no worker came back with it

    @property
    def ended(self) -> float:
        return self.began + self.seconds


@dataclass(frozen=True)
class Worker:
    """What one worker did in a stretch. Numbered within its host; host None: it never came back with anything."""

    host: str | None
    number: int
    tasks: int
    models: int
    training_seconds: float  # training and prediction
    seconds: float  # all that its tasks took
    cpu_seconds: float
    ended: float | None = None  # its last task, seconds since 1970


@dataclass(frozen=True)
class Point:
    """Where a campaign stood at a moment: so many models in the store, and numbers by name."""

    time: float  # seconds since 1970
    models: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Stretch:
    """One command's work on a campaign, or on what else it computed in one go.

    models, model_seconds: those of the campaign alone, where there is one. cached: models found in the store, with the
    seconds that their training took; None where they are not known. devices_per_worker: a core, or a share of a GPU.
    """

    name: str
    command: str
    recipe: str
    data: str
    campaign: str | None
    spec: Mapping[str, Any] | None  # of the campaign
    device: str
    devices_per_worker: float
    created: float  # seconds since 1970
    status: str = "running"
    began: float = 0.0  # the first task
    ended: float = 0.0  # the last
    startup_seconds: float = 0.0
    workers: tuple[Worker, ...] = ()
    models: int = 0
    model_seconds: float = 0.0
    cached: int = 0
    cached_seconds: float | None = None
    scores_key: str | None = None
    passes_gate: bool | None = None
    points: tuple[Point, ...] = field(default=())
    git_commit: str | None = None
    ray_job: str | None = None  # submission id, where the command was a Ray job

    @property
    def span_seconds(self) -> float:
        """From the first task begun to the last returned."""
        return self.ended - self.began

    @property
    def models_per_hour(self) -> float | None:
        return 3600 * self.models / self.span_seconds if self.span_seconds > 0 else None

    @property
    def utilisations(self) -> list[float]:
        """The share of the span that each worker spent in training and prediction.

        While work goes on, the span of each ends with its last task: it is busy with another.
        """
        ends = [w.ended if self.status == "running" and w.ended else self.ended for w in self.workers]
        spans = [end - self.began for end in ends]
        return [w.training_seconds / span if span > 0 else 0.0 for w, span in zip(self.workers, spans, strict=True)]

    @property
    def device_hours(self) -> float:
        """What the models took of cores or GPUs."""
        return self.model_seconds * self.devices_per_worker / 3600

    @property
    def device_hours_saved(self) -> float:
        """What training the models that were found would have taken, by the seconds they took."""
        return (self.cached_seconds or 0.0) * self.devices_per_worker / 3600


# ---- from outcomes -------------------------------------------------------------------------------------------------


def window(outcomes: Iterable[Outcome]) -> tuple[float, float] | None:
    """When the first task began and the last ended; None where no worker came back with any."""
    done = [outcome for outcome in outcomes if outcome.worker]
    return (min(o.began for o in done), max(o.ended for o in done)) if done else None


def within(outcomes: Iterable[Outcome], began: float, ended: float) -> list[Outcome]:
    """The outcomes, as far as they fell into a window: of those that reach out of it, the share inside."""
    found = []
    for outcome in outcomes:
        inside = min(outcome.ended, ended) - max(outcome.began, began)
        if inside > 0:
            share = min(1.0, inside / outcome.seconds)
            parts = {name: share * getattr(outcome, name) for name in ("training_seconds", "cpu_seconds")}
            found.append(replace(outcome, began=max(outcome.began, began), seconds=inside, **parts))
    return found


def workers_of(outcomes: Iterable[Outcome], number: int) -> tuple[Worker, ...]:
    """What each of so many workers did. A process that took over from one that died counts as the same worker."""
    by_process: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in sorted((o for o in outcomes if o.worker), key=lambda o: o.began):
        by_process.setdefault((outcome.host, outcome.worker), []).append(outcome)
    places: list[list[Outcome]] = []
    for (at, _), done in by_process.items():
        free = [place for place in places if place[-1].ended <= done[0].began]
        if len(places) < number or not free:
            places.append(list(done))
        else:
            min(free, key=lambda place: (place[-1].host != at, place[-1].ended)).extend(done)
    hosts: dict[str | None, int] = {}
    workers = []
    for done in [*places, *([] for _ in range(number - len(places)))]:
        host = done[0].host if done else None
        place = hosts[host] = hosts.get(host, -1) + 1
        workers.append(
            Worker(
                host,
                place,
                tasks=len(done),
                models=sum(o.models for o in done),
                training_seconds=sum(o.training_seconds for o in done),
                seconds=sum(o.seconds for o in done),
                cpu_seconds=sum(o.cpu_seconds for o in done),
                ended=max((o.ended for o in done), default=None),
            )
        )
    return tuple(workers)


# ---- in the store --------------------------------------------------------------------------------------------------


def put_stretch(store: Store, stretch: Stretch) -> None:
    store.put(_object(stretch.campaign, stretch.name), seal(asdict(stretch)))


def has_stretch(store: Store, campaign: str | None, name: str) -> bool:
    return store.exists(_object(campaign, name))


def _object(campaign: str | None, name: str) -> str:
    return f"costs/{campaign or 'runs'}/{name}.json"


def get_stretches(store: Store, campaign: str | None = None) -> list[Stretch]:
    """The stretches of a campaign, or of everything, oldest first."""
    folder = f"costs/{campaign}" if campaign else "costs"

    def read(name: str) -> Stretch:
        body = unseal(store, f"{folder}/{name}", "remove it: it says what a command cost, and nothing needs it")
        workers = tuple(Worker(**worker) for worker in body.pop("workers"))
        return Stretch(**body | {"workers": workers, "points": tuple(Point(**point) for point in body["points"])})

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(read, (name for name in store.names(folder) if name.endswith(".json"))))
    return sorted(found, key=lambda stretch: (stretch.created, stretch.name))


# ---- tables --------------------------------------------------------------------------------------------------------


def cost_lines(stretches: Iterable[Stretch]) -> Iterator[dict[str, Any]]:
    """The table `costs`."""
    for stretch in stretches:
        computed = {"cost": stretch.name, "num_workers": len(stretch.workers)}
        yield {name: computed[name] if name in computed else getattr(stretch, name) for name, _, _ in COLUMNS["costs"]}


def worker_lines(stretches: Iterable[Stretch]) -> Iterator[dict[str, Any]]:
    """The table `workers`."""
    for stretch in stretches:
        for worker in stretch.workers:
            yield {
                "cost": stretch.name,
                "host": worker.host,
                "worker": worker.number,
                "tasks": worker.tasks,
                "models": worker.models,
                "training_seconds": worker.training_seconds,
                "outside_seconds": worker.seconds - worker.training_seconds,
                "idle_seconds": stretch.span_seconds - worker.seconds,
                "cpu_seconds": worker.cpu_seconds,
            }


def progress(stretch: Stretch, earlier: Sequence[Stretch]) -> dict[str, float]:
    """A campaign's cost as numbers by name: rates of this stretch, device-hours with those of the earlier ones."""
    values: dict[str, float] = {
        "cached_models": stretch.cached,
        "device_hours": sum(part.device_hours for part in (*earlier, stretch)),
        "device_hours_saved": sum(part.device_hours_saved for part in (*earlier, stretch)),
    }
    shares, rate = stretch.utilisations, stretch.models_per_hour
    if shares and rate is not None:
        mean = sum(shares) / len(shares)
        values |= {
            "models_per_hour": rate,
            "utilisation": mean,
            "utilisation_min": min(shares),
            "share_outside_training": 1 - mean,
        }
    return values
