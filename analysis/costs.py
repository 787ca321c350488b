"""What it cost: the tables `costs` and `workers` summed up by campaign, and by worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

HEADINGS = ("what", "trained", "found", "per hour", "in training", "least", "outside", "device-hours", "saved")
WORKER_HEADINGS = ("worker", "models", "training s", "other s", "idle s", "in training")
_MOST_WORKERS = 16  # shown; of more, those that trained least


@dataclass
class Worker:
    """What a worker did in all stretches of a total, in seconds."""

    name: str
    models: int = 0
    training: float = 0.0
    outside: float = 0.0
    idle: float = 0.0

    @property
    def utilisation(self) -> float:
        """The share of its time in training and prediction."""
        whole = self.training + self.outside + self.idle
        return self.training / whole if whole > 0 else 0.0


@dataclass
class Total:
    """What was spent on one campaign, or on all else that commands of one recipe computed."""

    name: str
    device: str
    trained: int = 0
    found: int = 0
    span: float = 0.0  # seconds, of all stretches
    device_seconds: float = 0.0
    saved_seconds: float = 0.0
    is_campaign: bool = True
    workers: dict[str, Worker] = field(default_factory=dict)

    @property
    def per_hour(self) -> float | None:
        return 3600 * self.trained / self.span if self.span > 0 else None

    @property
    def utilisation(self) -> float | None:
        """The share of all workers' time in training and prediction."""
        busy = sum(worker.training for worker in self.workers.values())
        whole = busy + sum(worker.outside + worker.idle for worker in self.workers.values())
        return busy / whole if whole > 0 else None


def totals(costs: Iterable[Mapping[str, Any]], workers: Iterable[Mapping[str, Any]]) -> list[Total]:
    """Sum up lines of the tables: one total per campaign, and one per recipe of what belongs to none."""
    found: dict[tuple[str | None, str], Total] = {}
    by_cost: dict[str, Total] = {}
    for line in costs:
        campaign, device = line["campaign"], line["device"]
        name = f"campaign {campaign[:8]} ({line['recipe']})" if campaign else f"other work ({line['recipe']})"
        total = found.setdefault((campaign, "" if campaign else line["recipe"]), Total(name, device))
        total.is_campaign = campaign is not None
        total.device = device if device == total.device else "mixed"
        total.trained += line["models"]
        total.found += line["cached"]
        total.span += line["span_seconds"]
        total.device_seconds += line["model_seconds"] * line["devices_per_worker"]
        total.saved_seconds += (line["cached_seconds"] or 0.0) * line["devices_per_worker"]
        by_cost[line["cost"]] = total
    for line in workers:
        name = f"{line['host'] or 'never answered'} {line['worker']}"
        worker = by_cost[line["cost"]].workers.setdefault(name, Worker(name))
        worker.models += line["models"]
        worker.training += line["training_seconds"]
        worker.outside += line["outside_seconds"]
        worker.idle += line["idle_seconds"]
    return sorted(found.values(), key=lambda total: not total.is_campaign)


def cells(total: Total) -> list[str]:
    """A total as text, under `HEADINGS`."""
    share, rate = total.utilisation, total.per_hour
    workers = [w for w in total.workers.values() if total.is_campaign or w.training or w.outside]
    least = min((worker.utilisation for worker in workers), default=None)
    return [
        total.name,
        str(total.trained),
        str(total.found) if total.is_campaign else "-",
        "-" if rate is None else f"{rate:,.0f}",
        "-" if share is None else f"{share:.1%}",
        "-" if least is None else f"{least:.1%}",
        "-" if share is None else f"{1 - share:.1%}",
        f"{hours(total.device_seconds)} {total.device.upper()}",
        hours(total.saved_seconds) if total.is_campaign else "-",
    ]


def hours(seconds: float) -> str:
    """Seconds in hours, to three figures where they are few."""
    return f"{seconds / 3600:.3g}" if seconds < 3600 * 100 else f"{seconds / 3600:,.0f}"


def worker_lines(total: Total) -> list[list[str]]:
    """The workers of a total as text, under `WORKER_HEADINGS`; of many, those that trained least."""
    chosen = list(total.workers.values())
    if len(chosen) > _MOST_WORKERS:
        chosen = sorted(chosen, key=lambda worker: worker.utilisation)[:_MOST_WORKERS]
    return [
        [
            worker.name,
            str(worker.models),
            *(f"{seconds:.1f}" for seconds in (worker.training, worker.outside, worker.idle)),
            f"{worker.utilisation:.1%}",
        ]
        for worker in sorted(chosen, key=lambda worker: worker.name)
    ]


def worker_title(total: Total) -> str:
    """Which workers are shown."""
    number = len(total.workers)
    return f"workers of {total.name}" + (
        f": {_MOST_WORKERS} of {number}, those that trained least" if number > _MOST_WORKERS else ""
    )


def render(found: Iterable[Total]) -> list[Table]:
    """Terminal tables: all totals, then the workers of each campaign."""
    found = list(found)
    parts = [_table("what it cost", HEADINGS, map(cells, found))]
    parts += [
        _table(worker_title(total), WORKER_HEADINGS, worker_lines(total))
        for total in found
        if total.is_campaign and total.workers
    ]
    return parts


def _table(title: str, headings: Iterable[str], lines: Iterable[list[str]]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for place, name in enumerate(headings):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table
