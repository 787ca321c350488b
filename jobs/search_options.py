"""The options of `unlearn sweep` that say how its axes are searched and for how long; light, for the command line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from jobs.deadline import Deadline, seconds_of


def _deadline(text: str) -> Deadline:
    seconds = seconds_of(text)
    if seconds is None:
        raise typer.BadParameter(f"got {text!r}; allowed: hours above 0, or a time such as 30m, 2h or 45s")
    return Deadline(time.monotonic() + seconds)


Kind = Annotated[
    Literal["grid", "random", "optuna"] | None,
    typer.Option(
        "--search",
        help="How values of the axes are chosen. Default: random for methods with a distribution, else every one.",
    ),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Settings per cell, at random or by Optuna. Default: 10.")]
Seed = Annotated[int | None, typer.Option("--search-seed", min=0, help="Of the draws; no seed of any run. Default: 0.")]
Objective = Annotated[
    str | None,
    typer.Option(
        metavar="METRIC/SPLIT", help="What Optuna goes by, a mean over the seeds. Default: accuracy/validation."
    ),
]
Direction = Annotated[
    Literal["max", "min"] | None, typer.Option(help="Whether more or less of the objective is better.")
]
Scheduler = Annotated[
    Literal["asha", "none"] | None,
    typer.Option(help="Stop runs that fall behind the others of their cell; details by --set scheduler.FIELD=..."),
]
TimeBudget = Annotated[
    Any,
    typer.Option(parser=_deadline, metavar="HOURS|30m", help="Begin nothing after it; exit code 124 if work is left."),
]
MaxConcurrent = Annotated[int | None, typer.Option(min=1, help="Runs at once. Default: as many as there are workers.")]
Retries = Annotated[int, typer.Option(min=0, help="How often a run whose worker died is tried again.")]


_FIELDS = {
    "search": "search.kind",
    "samples": "search.samples",
    "search_seed": "search.seed",
    "objective": "search.objective",
    "direction": "search.direction",
    "scheduler": "scheduler",
}


def assignments(given: Mapping[str, Any]) -> list[str]:
    """What a command was given by its options, as --set has it, with what --set was given, in the order that holds."""
    tune = given.get("tune")
    before = {"tuning": tune} if tune == "none" else {"tuning.criterion": tune}
    after = {"campaign.models": given.get("models")} | {field: given.get(name) for name, field in _FIELDS.items()}
    return [*_texts(before), *(given.get("assignments") or ()), *_texts(after)]


def _texts(values: Mapping[str, object]) -> list[str]:
    return [f"{field}={value}" for field, value in values.items() if value is not None]
