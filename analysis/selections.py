"""How each setting was chosen: the cells of a tuned sweep, their candidates, and how the choice held up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from rich.table import Table

from analysis.load import Tables

HEADINGS = (
    "arm",
    "budget",
    "chosen",
    "of",
    "tuned",
    "ahead of the second",
    "confirmed",
    "change",
    "remarks",
)


@dataclass(frozen=True)
class Choice:
    """The choice for one cell.

    chosen: the options of the best candidate in which candidates differ; None where none could be chosen. tuned: its
    criterion, mean and standard error over `seeds`. lead, lead_error: by how much it is ahead of the second, paired by
    seed. confirmed: the criterion on the runs that report it. edges: the options whose value is the lowest or highest
    that was tried. failed: the candidates that failed, and why.
    """

    forget_set: str
    arm: str
    budget: float | None
    chosen: str | None
    num_candidates: int
    tuned: tuple[float, float | None] | None
    lead: tuple[float, float | None] | None
    confirmed: tuple[float, float | None] | None
    edges: tuple[str, ...]
    failed: tuple[str, ...]
    criterion: str
    formula: str
    seeds: str
    tuning_set: str
    num_references: int


def choices(tables: Tables, sweep: str) -> list[Choice]:
    """The choice of every cell of a sweep, in its order; none of a sweep that was not tuned."""
    lines = tables.selections.filter(pl.col("sweep") == sweep)
    groups = lines.group_by("selection", maintain_order=True)
    return [_choice(group.sort("candidate").to_dicts()) for _, group in groups]


def _choice(lines: Sequence[Mapping[str, object]]) -> Choice:
    options = [json.loads(str(line["options"])) for line in lines]
    names = sorted({name for each in options for name in each if len({json.dumps(o.get(name)) for o in options}) > 1})
    first, place = lines[0], next((i for i, line in enumerate(lines) if line["chosen"]), None)
    best = None if place is None else lines[place]
    others = [line for line in lines if line is not best and line["error"] is None and line["mean"] is not None]
    second = max(others, key=lambda line: _float(line["mean"]), default=None)
    return Choice(
        forget_set=str(first["forget_set"]),
        arm=str(first["arm"]),
        budget=None if first["budget"] is None else _float(first["budget"]),
        chosen=None if place is None else ", ".join(f"{name}={options[place].get(name)}" for name in names),
        num_candidates=len(lines),
        tuned=None if best is None else _with_error(best, ""),
        lead=None if best is None or second is None else _lead(best["values"], second["values"]),
        confirmed=None if best is None else _with_error(best, "confirmed_"),
        edges=() if place is None else tuple(_edges(options, place, names)),
        failed=tuple(
            f"{_said(o, names)}: {line['error']}" for o, line in zip(options, lines, strict=True) if line["error"]
        ),
        criterion=str(first["criterion"]),
        formula=str(first["formula"]),
        seeds=str(first["seeds"]),
        tuning_set=f"{first['tuning_set']}, draw {first['tuning_draw']}",
        num_references=int(_float(first["num_references"])),
    )


def _said(options: Mapping[str, object], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={options.get(name)}" for name in names)


def _float(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _with_error(line: Mapping[str, object], prefix: str) -> tuple[float, float | None] | None:
    mean, error = line[f"{prefix}mean"], line[f"{prefix}standard_error"]
    return None if mean is None else (_float(mean), None if error is None else _float(error))


def _lead(best: object, second: object) -> tuple[float, float | None]:
    """Mean and standard error of the differences, seed by seed."""
    gaps = np.asarray(best) - np.asarray(second)
    return float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else None


def _edges(options: Sequence[Mapping[str, object]], place: int, names: Sequence[str]) -> list[str]:
    """The options whose chosen value is the lowest or highest of the numbers tried."""
    found = []
    for name in names:
        tried = sorted({v for o in options if isinstance(v := o.get(name), int | float) and not isinstance(v, bool)})
        if options[place].get(name) in (tried[:1] + tried[-1:]):
            found.append(f"{name} {'lowest' if options[place][name] == tried[0] else 'highest'} of {len(tried)}")
    return found


def said(found: tuple[float, float | None] | None, sign: str = "") -> str:
    """A mean and its standard error; `-` for what is absent."""
    if found is None:
        return "-"
    return f"{found[0]:{sign}.3f}" + ("" if found[1] is None else f" ±{found[1]:.3f}")


def change(choice: Choice) -> tuple[float, float | None] | None:
    """The criterion as confirmed minus as tuned, with the standard error of the difference."""
    if choice.tuned is None or choice.confirmed is None:
        return None
    (before, error), (after, other) = choice.tuned, choice.confirmed
    return after - before, None if error is None or other is None else math.hypot(error, other)


def cells(choice: Choice) -> list[str]:
    """A choice as text, under `HEADINGS`."""
    remarks = [f"edge: {edge}" for edge in choice.edges]
    if choice.lead is not None and choice.lead[1] is not None and choice.lead[0] < 2 * choice.lead[1]:
        remarks.append("second is within 2 SE")
    remarks += [f"failed: {failed}" for failed in choice.failed]
    return [
        choice.arm,
        "" if choice.budget is None else f"{choice.budget:g}",
        "not reported" if choice.chosen is None else choice.chosen,
        str(choice.num_candidates),
        said(choice.tuned),
        said(choice.lead),
        said(choice.confirmed),
        said(change(choice), "+"),
        "; ".join(remarks),
    ]


def caption(found: Sequence[Choice]) -> str:
    """How the cells of one forget set were chosen."""
    first = found[0]
    took = (
        f"{first.num_references} models retrained without it took part in the choice, and what they scatter moves all "
        "cells of the set together and is not in ±, which is over the seeds of the runs alone"
        if first.num_references
        else "no retrained model took part in the choice"
    )
    is_alike = first.tuning_set.partition(",")[0].partition("(")[0] == first.forget_set
    other = "" if is_alike else f"; it stands in for {first.forget_set}, where another setting may be best"
    return f"tuned on {first.tuning_set} (seeds {first.seeds}){other}; {took}"


def summary(found: Sequence[Choice]) -> list[str]:
    """What the choices of a sweep come to, in sentences."""
    text = []
    kept = [choice for choice in found if choice.chosen is not None]
    changes = [pair[0] for choice in kept if (pair := change(choice)) is not None]
    if changes:
        text.append(
            f"From the tuning runs to the reported ones the criterion changes by {np.mean(changes):+.3f}, the mean "
            f"over {len(changes)} cells (from {min(changes):+.3f} to {max(changes):+.3f}). Below zero a choice looked "
            "better than it turned out: the best of several noisy values, or on a set unlike the reported one; or the "
            "few references of the two sets differ, by which all cells move together."
        )
    edges = sum(bool(choice.edges) for choice in kept)
    if edges:
        text.append(
            f"{edges} of {len(kept)} choices lie at an edge of what was tried: a wider range might hold a better one "
            "(with two values every choice is at an edge)."
        )
    return text


def by_set(found: Sequence[Choice]) -> dict[str, list[Choice]]:
    """Choices by reported forget set."""
    parts: dict[str, list[Choice]] = {}
    for choice in found:
        parts.setdefault(choice.forget_set, []).append(choice)
    return parts


def untuned(tables: Tables, sweep: str) -> list[str]:
    """The arms of a sweep that had nothing to choose."""
    members = tables.members.filter((pl.col("sweep") == sweep) & (pl.col("role") == "reported"))
    tuned = {choice.arm for choice in choices(tables, sweep)}
    return [arm for arm in members["arm"].unique(maintain_order=True) if arm != "reference" and arm not in tuned]


def render(tables: Tables, sweep: str) -> list[Table]:
    """Terminal tables: the choices, one table per forget set."""
    parts = []
    for name, found in by_set(choices(tables, sweep)).items():
        table = Table(
            title=f"\n{name}: {found[0].criterion}, {caption(found)}",
            title_justify="left",
            title_style="bold",
            padding=(0, 1, 0, 0),
            box=None,
        )
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in ("arm", "chosen", "remarks") else "right")
        for choice in found:
            table.add_row(*cells(choice))
        parts.append(table)
    return parts
