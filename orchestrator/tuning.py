"""How the settings of a study are chosen before they are reported: by which criterion, on which seeds and sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import Field, field_validator

from orchestrator.criteria import CRITERIA
from orchestrator.registry import Entry, InputError
from orchestrator.specs import ForgetSet, Spec

FIRST_REFERENCE = 10_000  # seed of the first tuning reference, so that none starts as a reported one does


class Tuning(Spec):
    """Each cell's options are chosen by `criterion`, in the mean over `seeds`, and reported on the study's own.

    `draw`: the forget draw of tuning. `references`: models retrained without a tuning set, where the criterion asks for
    any. `forget_sets`: which rule stands in for a reported one by name; where none is given, a rule that draws is drawn
    anew, and one that draws nothing is stood in for by a random set of the same size.
    """

    criterion: str
    seeds: tuple[int, ...] = (100, 101, 102)
    draw: int = Field(default=100, ge=0)
    references: int = Field(default=3, ge=1)
    forget_sets: Mapping[str, ForgetSet] = Field(default_factory=dict)

    @field_validator("criterion")
    @classmethod
    def _known(cls, criterion: str) -> str:
        return CRITERIA[criterion].name

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            got = ",".join(map(str, seeds)) or "none"
            raise InputError(f"tuning.seeds are {got}; allowed: distinct whole numbers from 0")
        return seeds

    @property
    def entry(self) -> Entry[Callable[..., float]]:
        return CRITERIA[self.criterion]

    @property
    def uses_references(self) -> bool:
        return "references" in self.entry.inputs
