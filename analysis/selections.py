"""How each setting was chosen: the cells of a tuned sweep, their candidates, and how the choice held up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from rich.table import Table

from analysis.load import Tables
from analysis.names import differing, name_of
from analysis.tables import Difference, counted, half_width, of_sweep
from orchestrator import uncertainty

HEADINGS = (
    "arm",
    "budget",
    "chosen",
    "out of",
    "tuned",
    "ahead of the second",
    "confirmed",
    "change",
    "remarks",
)

_LISTED = 5  # values of an option that are listed one by one


@dataclass(frozen=True)
class Judged:
    """A criterion, or a difference of two, of which the mean is said; `sides` hold its values by run (by draw where
    there are several) and, where references add scatter of their own, by reference: as exported."""

    mean: float
    sides: tuple[np.ndarray, ...]

    @property
    def standard_error(self) -> float | None:
        """Over the seeds of runs and of references, as in the comparison tables; None of fewer than two of either."""
        found = uncertainty.of_means(*self.sides)
        return None if found is None else found.standard_error

    def minus(self, other: Judged) -> Judged:
        """The difference from one that has the same seeds and references, paired by both."""
        pairs = zip(self.sides, other.sides, strict=True)
        return Judged(self.mean - other.mean, tuple(ours - theirs for ours, theirs in pairs))


@dataclass(frozen=True)
class Choice:
    """The choice for one cell: an arm at a budget on a forget set, of a `variant` where its masks or stages differ too.

    chosen: the options of the best candidate in which candidates differ; None where none could be chosen. tried: all
    the values of these options, or how many and between what. tuned: its
    criterion over `seeds`. lead: by how much it is ahead of the second, paired by seed and by reference, since both
    have the same originals and are held against the same references. confirmed: the criterion on the runs that report
    it. edges: the options whose value is the lowest or highest that was tried. failed: the candidates that failed or
    were stopped early, and why.
    """

    forget_set: str
    arm: str
    variant: str | None
    budget: float | None
    chosen: str | None
    tried: str
    tuned: Judged | None
    lead: Judged | None
    confirmed: Judged | None
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
    settings: dict[str, list[dict[str, object]]] = {}
    for arm, setting in lines.select("arm", "setting").unique(maintain_order=True).rows():
        settings.setdefault(arm, []).append(json.loads(setting))
    groups = lines.group_by("selection", maintain_order=True)
    varying = {arm: differing(found) for arm, found in settings.items()}
    return [_choice(group.sort("candidate").to_dicts(), varying[group["arm"][0]]) for _, group in groups]


def _choice(lines: Sequence[Mapping[str, object]], varying: Sequence[str]) -> Choice:
    """The choice of a cell from its candidates; `varying`: the parts of its setting in which cells differ."""
    options = [json.loads(str(line["options"])) for line in lines]
    names = differing(options)
    first, place = lines[0], next((i for i, line in enumerate(lines) if line["chosen"]), None)
    best = None if place is None else lines[place]
    others = [line for line in lines if line is not best and line["error"] is None and line["mean"] is not None]
    second = max(others, key=lambda line: _float(line["mean"]), default=None)
    tuned, behind = (None if line is None else _judged(line) for line in (best, second))
    return Choice(
        forget_set=str(first["forget_set"]),
        arm=str(first["arm"]),
        variant=_said(json.loads(str(first["setting"])), varying) or None,
        budget=None if first["budget"] is None else _float(first["budget"]),
        chosen=None if place is None else ", ".join(f"{name}={options[place].get(name)}" for name in names),
        tried=", ".join(filter(None, (_tried(options, name) for name in names))),
        tuned=tuned,
        lead=None if tuned is None or behind is None else tuned.minus(behind),
        confirmed=None if best is None else _judged(best, "confirmed_"),
        edges=() if place is None else tuple(_edges(options, place, names)),
        failed=tuple(f"{'; '.join(settings)}: {error}" for error, settings in _failed(lines, options, names).items()),
        criterion=str(first["criterion"]),
        formula=str(first["formula"]),
        seeds=str(first["seeds"]),
        tuning_set=f"{first['tuning_set']}, draw {first['tuning_draw']}",
        num_references=int(_float(first["num_references"])),
    )


def _failed(
    lines: Sequence[Mapping[str, object]], options: Sequence[Mapping[str, object]], names: Sequence[str]
) -> dict[str, list[str]]:
    """The settings that could not be judged, by what became of them."""
    found: dict[str, list[str]] = {}
    for line, setting in zip(lines, options, strict=True):
        if line["error"]:
            found.setdefault(str(line["error"]), []).append(_said(setting, names))
    return found


def _said(options: Mapping[str, object], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={options.get(name)}" for name in names)


def _float(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _judged(line: Mapping[str, object], prefix: str = "") -> Judged | None:
    mean, by_run, by_reference = (line[f"{prefix}{name}"] for name in ("mean", "values", "by_reference"))
    found = [np.asarray(side, dtype=float) for side in (by_run, by_reference) if side is not None]
    return None if mean is None else Judged(_float(mean), tuple(found))


def _tried(options: Sequence[Mapping[str, object]], name: str) -> str:
    """The values of an option among the candidates; of many numbers how many, the lowest and the highest."""
    values = [each.get(name) for each in options]
    numbers = sorted({v for v in values if isinstance(v, int | float) and not isinstance(v, bool)})
    if len(numbers) > _LISTED:
        return f"{name}: {len(numbers)} from {numbers[0]:g} to {numbers[-1]:g}"
    listed = [f"{number:g}" for number in numbers] or list(dict.fromkeys(map(str, values)))
    return f"{name}: {' '.join(listed)}"


def _edges(options: Sequence[Mapping[str, object]], place: int, names: Sequence[str]) -> list[str]:
    """The options whose chosen value is the lowest or highest of the numbers tried."""
    found = []
    for name in names:
        tried = sorted({v for o in options if isinstance(v := o.get(name), int | float) and not isinstance(v, bool)})
        if options[place].get(name) in (tried[:1] + tried[-1:]):
            found.append(f"{name} {'lowest' if options[place][name] == tried[0] else 'highest'} of {len(tried)}")
    return found


def said(found: Difference | Judged | None, sign: str = "") -> str:
    """A value and its standard error, `n/a` where there are too few runs or references for one; `-` for no value."""
    if found is None:
        return "-"
    value = found.mean if isinstance(found, Judged) else found.value
    error = found.standard_error
    return f"{value:{sign}.3f} ± {'n/a' if error is None else f'{error:.3f}'}"


def change(found: Sequence[Choice]) -> Difference | None:
    """The criterion as confirmed minus as tuned, mean over cells of one forget set; None where a cell lacks either.

    Tuning and confirming have no seed, original or reference in common (a plan with such is refused), so the errors of
    both add up. Within either, cells share seeds, originals and references: means over cells are taken by seed and by
    reference before their scatter. Not in ±: that the tuned value is the best of several, and that the forget sets are
    other draws.
    """
    pairs = [(choice.tuned, choice.confirmed) for choice in found]
    before, after = (_mean([each for each in side if each is not None]) for side in zip(*pairs, strict=True))
    if any(None in pair for pair in pairs) or before is None or after is None:
        return None
    spread = uncertainty.of_means(*before.sides, *after.sides)
    value = after.mean - before.mean
    if spread is None:
        return Difference(value, None, None, None)
    half = half_width(spread)
    return Difference(value, spread.standard_error, value - half, value + half)


def _mean(found: Sequence[Judged]) -> Judged | None:
    """The mean over cells, by seed and by reference; without sides where cells lack different ones."""
    if not found:
        return None
    mean = float(np.mean([each.mean for each in found]))
    if len({tuple(map(len, each.sides)) for each in found}) > 1:
        return Judged(mean, (np.array([]),))
    return Judged(mean, tuple(np.mean(side, axis=0) for side in zip(*(each.sides for each in found), strict=True)))


def cells(choice: Choice) -> list[str]:
    """A choice as text, under `HEADINGS`."""
    remarks = [f"edge: {edge}" for edge in choice.edges]
    error = None if choice.lead is None else choice.lead.standard_error
    if choice.lead is not None and error is not None and choice.lead.mean < 2 * error:
        remarks.append("second is within 2 SE")
    remarks += [f"not judged: {failed}" for failed in choice.failed]
    return [
        name_of({"arm": choice.arm, "is_tuned": choice.chosen is not None, "variant": choice.variant}),
        "" if choice.budget is None else f"{choice.budget:g}",
        "not reported" if choice.chosen is None else choice.chosen,
        choice.tried,
        said(choice.tuned),
        said(choice.lead),
        said(choice.confirmed),
        said(change([choice]), "+"),
        "; ".join(remarks),
    ]


def caption(found: Sequence[Choice], runs: pl.DataFrame) -> str:
    """On what the cells of one forget set were chosen and confirmed; `runs`: those that the sweep reports."""
    first = found[0]
    took = (
        f"{first.num_references} models retrained without that set took part in the choice"
        if first.num_references
        else "no retrained model took part in the choice"
    )
    is_alike = first.tuning_set.partition(",")[0].partition("(")[0] == first.forget_set
    other = "" if is_alike else f", which stands in for {first.forget_set}, where another setting may be best"
    held = sorted(
        {len(choice.confirmed.sides[1]) for choice in found if choice.confirmed and choice.confirmed.sides[1:]}
    )
    against = f" against {counted(held)} references" if held else ""
    confirmed = _confirmed_on(first.forget_set, runs)
    return f"tuned on {first.tuning_set} (seeds {first.seeds}){other}; {took}{confirmed and confirmed + against}"


def _confirmed_on(name: str, runs: pl.DataFrame) -> str:
    """The seeds and draws that the choices of a forget set are confirmed on; empty where no run does."""
    mine = runs.filter((pl.col("forget_set") == name) & pl.col("is_tuned"))
    if not len(mine):
        return ""
    seeds, draws = (", ".join(map(str, sorted(mine[column].unique()))) for column in ("seed", "forget_draw"))
    return f"; confirmed on seeds {seeds} and draw{'s' if ',' in draws else ''} {draws}"


def summary(found: Sequence[Choice]) -> list[str]:
    """What the choices of a sweep come to, in sentences."""
    text = []
    kept = [choice for choice in found if choice.chosen is not None]
    parts = {name: [c for c in part if c.tuned and c.confirmed] for name, part in by_set(kept).items()}
    changes = [f"{_change_said(part)} on {name}" for name, part in parts.items() if part]
    if changes:
        text.append(
            f"From the tuning runs to the reported ones the criterion changes by {'; '.join(changes)}. Below zero "
            "the reported runs came out lower than the tuning runs promised: the tuned value is the best of several "
            "noisy ones, or it is of a set unlike the reported one, where the criterion may mean something else too."
        )
    edges = sum(bool(choice.edges) for choice in kept)
    if edges:
        text.append(
            f"{edges} of {len(kept)} choices lie at an edge of what was tried: a wider range might hold a better one "
            "(with two values every choice is at an edge)."
        )
    return text


def _change_said(found: Sequence[Choice]) -> str:
    """The mean change of a forget set's cells, and the lowest and highest."""
    each = [part.value for choice in found if (part := change([choice])) is not None]
    over = f"the mean of {len(each)} cells, from {min(each):+.3f} to {max(each):+.3f}" if len(each) > 1 else "one cell"
    return f"{said(change(found), '+')} ({over})"


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
    parts, runs = [], of_sweep(tables, sweep)
    for name, found in by_set(choices(tables, sweep)).items():
        table = Table(
            title=f"\n{name}: {found[0].criterion} ± standard error over the seeds of runs"
            f"{' and references' if found[0].num_references else ''}; "
            f"{caption(found, runs)}",
            title_justify="left",
            title_style="bold",
            padding=(0, 1, 0, 0),
            box=None,
        )
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in ("arm", "chosen", "out of", "remarks") else "right")
        for choice in found:
            table.add_row(*cells(choice))
        parts.append(table)
    return parts
