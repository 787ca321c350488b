"""Choices of settings: which options a cell is reported with, by a criterion of tuning runs; stored as records.

A *cell* is everything of a run but its method's options and its seed; its *candidates* are the options.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator import results
from orchestrator.arms import CAMPAIGN, Arm
from orchestrator.axes import Distribution
from orchestrator.judging import Judge, Judged, Side
from orchestrator.registry import InputError, canonical_json
from orchestrator.results import Row
from orchestrator.sealed import seal, unseal
from orchestrator.specs import ForgetSet, MaskSpec, RunSpec, ScoresSpec, StageSpec, key
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.tuning import FIRST_REFERENCE, Tuning

_START = "original (tuning)"  # the arm of the originals that a criterion compares with


@dataclass(frozen=True)
class Cell:
    """What is tuned as one: an arm under one mask on one forget set."""

    arm: str
    rule: ForgetSet
    mask: MaskSpec | None
    scores: str | None
    stages: tuple[StageSpec, ...]

    @property
    def label(self) -> str:
        """The cell in a few words."""
        budget = (
            "" if self.mask is None else f" at {'its own budget' if self.mask.budget is None else self.mask.budget}"
        )
        return f"{self.arm}{budget} on {self.rule.name}"


def cell_of(arm: str, run: RunSpec) -> Cell:
    by = run.memorization
    scores = None if by is None else CAMPAIGN if isinstance(by, ScoresSpec) else by.proxy.name
    return Cell(arm, run.forget.rule, run.mask, scores, run.stages)


Cells = Mapping[Cell, Mapping[str, list[RunSpec]]]
"""The runs of each cell by candidate (the key of its method), in the order of the grid."""


def cells(runs: Iterable[tuple[str, RunSpec]]) -> Cells:
    """Group a study's runs by cell and candidate."""
    found: dict[Cell, dict[str, list[RunSpec]]] = {}
    for arm, run in runs:
        found.setdefault(cell_of(arm, run), {}).setdefault(key(run.method), []).append(run)
    return found


@dataclass(frozen=True)
class Candidate:
    """One setting of a cell on the tuning runs.

    keys: its tuning runs, in the order of the tuning seeds. values, by_reference: the criterion of those that finished,
    as in `Judged`. error: what became of one that did not; such a candidate is not chosen.
    """

    options: Mapping[str, Any]
    keys: tuple[str, ...]
    values: tuple[float, ...]
    error: str | None = None
    by_reference: tuple[float, ...] | None = None

    @property
    def judged(self) -> Judged:
        return Judged(self.values, self.by_reference)


@dataclass(frozen=True)
class Selection:
    """The choice of one cell's options.

    spec: a tuning run of the cell, which says all of it but the options. forget_set: the name of the reported set.
    references: the tuning references that the criterion was given. chosen: the place of the best candidate, the first
    of those that tie; None where none can be chosen.
    """

    key: str
    arm: str
    forget_set: str
    spec: Mapping[str, Any]
    criterion: str
    criterion_version: str
    formula: str
    seeds: tuple[int, ...]
    tuning_set: str
    draw: int
    references: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    chosen: int | None

    @property
    def reason(self) -> str:
        """Why there is no choice."""
        errors = dict.fromkeys(candidate.error for candidate in self.candidates if candidate.error)
        return f"none of {len(self.candidates)} settings could be judged: {'; '.join(map(str, errors))}"


# ---- what is tuned -------------------------------------------------------------------------------------------------


def stand_in(tuning: Tuning, rule: ForgetSet, size: int, total: int) -> ForgetSet:
    """The rule that a forget set of so many of the training examples is tuned on."""
    if rule.name in tuning.forget_sets:
        return tuning.forget_sets[rule.name]
    if "rng" not in rule.entry.inputs:  # a rule that draws nothing is the same set again
        return ForgetSet(name="random", options={"fraction": size / total})
    redrawn = {"as_released": False} if rule.options.get("as_released") else {}  # what is released is one draw
    return ForgetSet(name=rule.name, options={**rule.options, **redrawn})


def tuning_study(study: Study, stand_ins: Mapping[str, ForgetSet]) -> Study:
    """The study that settings are chosen on: other seeds, other originals, another draw of other forget sets.

    It is not checked as users' are: stand-ins may share a name, and there are no references that nobody asks for.
    """
    tuning = study.tuning
    assert tuning is not None
    start = {_START: Arm(method="identity")} if "original" in tuning.entry.inputs else {}
    return study.model_copy(
        update={
            "tuning": None,
            "protocol": "paired",
            "seeds": tuning.seeds,
            "forget_draw": tuning.draw,
            "forget_sets": tuple(dict.fromkeys(stand_ins[rule.name] for rule in study.forget_sets)),
            "references": tuning.references if tuning.uses_references else 0,
            "first_reference": FIRST_REFERENCE,
            "methods": {**study.methods, **start},
        }
    )


def check(study: Study) -> None:
    """Raise InputError where what tuning goes by is reported too."""
    tuning = study.tuning
    assert tuning is not None
    reported = {*study.seeds, *({study.original_seed} if study.protocol == "del" else ())}
    if shared := sorted(reported & {*tuning.seeds}):
        raise InputError(
            f"tuning.seeds has {', '.join(map(str, shared))}, which the study reports; allowed: seeds other than "
            f"{', '.join(map(str, sorted(reported)))}"
        )
    draws = {study.draw_of(seed) for seed in study.seeds}
    if tuning.draw in draws:
        raise InputError(
            f"tuning.draw is {tuning.draw}, which the study reports; allowed: draws other than "
            f"{', '.join(map(str, sorted(draws)))}"
        )
    _check_axes(study)
    if "original" in tuning.entry.inputs and not any(arm.method == "identity" for arm in study.methods.values()):
        raise InputError(
            f"criterion {tuning.criterion} holds a run against the original, which the method identity reports, "
            "and the study has none; add identity to methods"
        )
    names = [rule.name for rule in study.forget_sets]
    for name in tuning.forget_sets:
        if name not in names:
            raise InputError(f"tuning.forget_sets names {name}; allowed: forget sets of the study: {', '.join(names)}")


def _check_axes(study: Study) -> None:
    """Raise InputError where the settings of a cell are not all known before the first is tried, or are cells."""
    if study.searched():
        raise InputError("Optuna chooses settings by the runs that are reported; to tune them, use --search random")
    for name, arm in study.methods.items():
        if isinstance(arm.budget, Distribution):
            raise InputError(
                f"methods.{name} has a budget drawn at random, of which each draw is a cell of its own; "
                "list values to tune the other options at each, or set tuning=none"
            )
        for place, stage in enumerate(arm.stages, 1):
            if several := [
                option for option, axis in stage.axes().items() if isinstance(axis, Distribution) or len(axis) > 1
            ]:
                raise InputError(
                    f"methods.{name}.stages.{place} has several values of {', '.join(several)}, and the options of "
                    "stages are not tuned; give each one value, or set tuning=none to report them side by side"
                )


def tuned_runs(runs: Iterable[tuple[str, RunSpec]]) -> frozenset[str]:
    """The keys of a tuning study's runs that a choice needs: cells with several candidates, and originals."""
    return frozenset(
        key(run)
        for cell, candidates in cells(runs).items()
        if len(candidates) > 1 or cell.arm == _START
        for found in candidates.values()
        for run in found
    )


# ---- the choice ----------------------------------------------------------------------------------------------------


def select(
    study: Study, tuning: Study, stand_ins: Mapping[str, ForgetSet], fingerprint: str, store: Store
) -> Selections:
    """Choose the options of every cell of a study that has several, from the rows of its tuning study."""
    assert study.tuning is not None
    judge, present = Judge(store, study.tuning.criterion), results.row_keys(store)
    grid = cells(tuning.runs(fingerprint))
    references: dict[ForgetSet, list[str]] = {}
    for run in tuning.reference_runs(fingerprint):
        if key(run) in present:
            references.setdefault(run.forget.rule, []).append(key(run))
    found: dict[Cell, Selection] = {}
    for cell, candidates in cells(study.runs(fingerprint)).items():
        if len(candidates) < 2:
            continue
        stand = stand_ins[cell.rule.name]
        runs = grid[replace(cell, rule=stand)]
        assert list(runs) == list(candidates), "tuning runs and reported ones have the same candidates"
        start = grid.get(Cell(_START, stand, None, None, ()), {})
        originals = {run.seed: key(run) for each in start.values() for run in each if key(run) in present}
        found[cell] = _select(cell, list(runs.values()), references.get(stand, []), originals, judge, study, store)
    return found


Selections = Mapping[Cell, Selection]


def _select(
    cell: Cell,
    candidates: Sequence[Sequence[RunSpec]],
    references: Sequence[str],
    originals: Mapping[int, str],
    judge: Judge,
    study: Study,
    store: Store,
) -> Selection:
    """The choice of one cell: as stored, or made and stored."""
    tuning, first = study.tuning, candidates[0][0]
    assert tuning is not None
    keys = [[key(run) for run in runs] for runs in candidates]
    there = {name for name in (name for names in keys for name in names) if store.exists(f"rows/{name}.json")}
    given = list(references) if tuning.uses_references else []
    parts = [cell.arm, cell.rule.name, tuning.criterion, tuning.entry.version, keys, sorted(there), given, originals]
    name = hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]
    if (stored := get_selection(store, name)) is not None:
        return stored
    judged = []
    for runs, names in zip(candidates, keys, strict=True):
        pairs = [(run, originals.get(run_spec.seed)) for run_spec, run in zip(runs, names, strict=True) if run in there]
        error = _error(store, [run for run in names if run not in there])
        if any(not judge.judges(given, original) for _, original in pairs):
            error = error or "there is nothing to hold it against: the tuning references or originals failed"
            pairs = []
        made = judge(Side(dict(pairs), given))
        judged.append(Candidate(dict(runs[0].method.options), tuple(names), made.values, error, made.by_reference))
    means = [candidate.judged.mean if candidate.error is None else None for candidate in judged]
    best = max((mean for mean in means if mean is not None), default=None)
    selection = Selection(
        key=name,
        arm=cell.arm,
        forget_set=cell.rule.name,
        spec=first.model_dump(mode="json"),
        criterion=tuning.criterion,
        criterion_version=tuning.entry.version,
        formula=tuning.entry.summary,
        seeds=tuning.seeds,
        tuning_set=first.forget.rule.label,
        draw=first.forget.draw,
        references=tuple(given),
        candidates=tuple(judged),
        chosen=None if best is None else means.index(best),
    )
    store.put(f"selections/{name}.json", seal(asdict(selection)))
    return selection


def _error(store: Store, missing: Sequence[str]) -> str | None:
    """What became of runs that have no row; None where there are none such."""
    if not missing:
        return None
    for name in missing:
        if tries := sorted(store.names(f"attempts/{name}")):
            return str(unseal(store, f"attempts/{name}/{tries[-1]}").get("error"))
    return "it was not run: what it needs has failed"


def get_selection(store: Store, name: str) -> Selection | None:
    """A stored choice; None where there is none."""
    try:
        body = unseal(store, f"selections/{name}.json")
    except FileNotFoundError:
        return None
    seeds, references = tuple(body.pop("seeds")), tuple(body.pop("references"))
    unknown = () if references else None  # of a choice from before it was kept
    candidates = tuple(
        Candidate(
            each["options"],
            tuple(each["keys"]),
            tuple(each["values"]),
            each["error"],
            None if (found := each.get("by_reference", unknown)) is None else tuple(found),
        )
        for each in body.pop("candidates")
    )
    return Selection(**body, seeds=seeds, references=references, candidates=candidates)


def settled(selections: Selections, runs: Iterable[tuple[str, RunSpec]]) -> dict[str, list[str]]:
    """The keys of the runs that report each choice, by its key; none where nothing could be chosen."""
    found: dict[str, list[str]] = {selection.key: [] for selection in selections.values()}
    if not found:
        return found
    for cell, candidates in cells(runs).items():
        if cell in selections and (place := selections[cell].chosen) is not None:
            found[selections[cell].key] += [key(run) for run in list(candidates.values())[place]]
    return found


def confirmed(
    store: Store, criterion: str, chosen: Mapping[str, Sequence[str]], rows: Sequence[Row]
) -> dict[str, Judged]:
    """The criterion on the runs that report each choice, against the references and originals among the reported rows.

    For the report alone: nothing is chosen by it. Empty where the criterion has nothing to hold a run against.
    """
    judge, groups = Judge(store, criterion), {row.key: row.comparable_with for row in rows}
    references: dict[str, list[str]] = {}
    originals: dict[tuple[str, int], str] = {}
    for row in rows:
        if row.is_reference:
            references.setdefault(groups[row.key], []).append(row.key)
        elif row.spec["method"]["name"] == "identity":
            originals[groups[row.key], row.spec["original_seed"]] = row.key
    found: dict[str, Judged] = {}
    seeds = {row.key: row.spec["original_seed"] for row in rows}
    for name, keys in chosen.items():
        draws: dict[str, dict[str, str | None]] = {}
        for run in (run for run in keys if run in groups):
            start = originals.get((groups[run], seeds[run]))
            if judge.judges(references.get(groups[run], []), start):
                draws.setdefault(groups[run], {})[run] = start
        found[name] = judge.over([Side(runs, references.get(group, [])) for group, runs in draws.items()])
    return found


def require_disjoint(tuning: Iterable[str], reported: Iterable[str]) -> None:
    """Raise InputError where a run would be both chosen by and reported."""
    if shared := {*tuning} & {*reported}:
        raise InputError(
            f"{len(shared)} tuning runs are among the reported ones; set tuning.seeds, tuning.draw or "
            "tuning.forget_sets to what the study does not report"
        )
