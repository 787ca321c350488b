"""What a criterion makes of finished runs, with all that is needed for its standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator import results, uncertainty
from orchestrator.criteria import CRITERIA, SPLITS
from orchestrator.data import Outputs
from orchestrator.store import Store


@dataclass(frozen=True)
class Judged:
    """The criterion of the runs of one setting.

    values: by run, each against all references of its draw and its own original; by draw where there are several.
    by_reference: by reference, over all runs, which are crossed with them. None where references add no scatter of
    their own: the criterion takes none, or every draw has its own, and they are within the values.
    """

    values: tuple[float, ...] = ()
    by_reference: tuple[float, ...] | None = None

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.values)) if self.values else None

    @property
    def standard_error(self) -> float | None:
        """The error of the mean over the seeds of both sides; None of fewer than two runs or references.

        It holds for the original where all runs share one, and for the draw where there is one.
        """
        found = uncertainty.of_means(*self.sides)
        return None if found is None else found.standard_error

    @property
    def sides(self) -> list[tuple[float, ...]]:
        return [self.values, *([] if self.by_reference is None else [self.by_reference])]


@dataclass(frozen=True)
class Side:
    """Runs on one draw, each with the original that it started from, and what they are held against, by key."""

    runs: Mapping[str, str | None]
    references: Sequence[str]


class Judge:
    """The criterion of runs in a store, whose test splits it never reads."""

    def __init__(self, store: Store, criterion: str) -> None:
        self._store, self._entry = store, CRITERIA[criterion]
        self._read: dict[str, Outputs] = {}  # those that many runs are held against

    def __call__(self, side: Side) -> Judged:
        """Judge the runs of one draw.

        by_reference holds jackknife pseudo-values, k T - (k - 1) T without this one: of a criterion that is a mean over
        references its value against each, and of any other those that have its jackknife variance.
        """
        given = side.references if "references" in self._entry.inputs else ()
        without = [[name for name in given if name != left] for left in given] if len(given) > 1 else []
        found = [
            [self._one(outputs, kept, original) for kept in (given, *without)]
            for run, original in side.runs.items()
            for outputs in [results.get_outputs(self._store, run, SPLITS)]
        ]
        values = tuple(each[0] for each in found)
        if "references" not in self._entry.inputs or not values:
            return Judged(values)
        count, (mean, *others) = len(given), np.mean(found, axis=0).tolist()
        return Judged(values, tuple(count * mean - (count - 1) * left for left in others or [mean]))

    def over(self, sides: Sequence[Side]) -> Judged:
        """Judge runs on one or more draws, as the comparison tables do: several draws are one value each."""
        found = [self(side) for side in sides]
        return found[0] if len(found) == 1 else Judged(tuple(each.mean for each in found if each.mean is not None))

    def judges(self, references: Sequence[str], original: str | None) -> bool:
        """Whether there is what the criterion asks for."""
        inputs = self._entry.inputs
        return ("references" not in inputs or bool(references)) and ("original" not in inputs or original is not None)

    def _one(self, outputs: Outputs, references: Sequence[str], original: str | None) -> float:
        available = {
            "outputs": outputs,
            "references": [self._kept(name) for name in references],
            "original": None if original is None else self._kept(original),
        }
        return float(self._entry(available, {}))

    def _kept(self, name: str) -> Outputs:
        if name not in self._read:
            self._read[name] = results.get_outputs(self._store, name, SPLITS)
        return self._read[name]
