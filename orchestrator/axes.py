"""Distributions that an axis may be in place of a list: uniform, loguniform and choice, as objects and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from orchestrator.registry import InputError, coerce, suggest

Kind = Literal["uniform", "loguniform", "choice"]
DIGITS = 4  # significant ones of a drawn number, so that options and tables read well


@dataclass(frozen=True)
class Distribution:
    """What values of an axis are drawn from; `values` are low and high, or those to choose from."""

    kind: Kind
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.values))})"

    @property
    def is_whole(self) -> bool:
        """Whether it is a range of whole numbers, both ends included."""
        return self.kind != "choice" and all(isinstance(value, int) for value in self.values)

    @property
    def size(self) -> float:
        """How many values there are; infinity for a range of real numbers."""
        if self.kind == "choice":
            return float(len(self.values))
        return float(self.values[1] - self.values[0] + 1) if self.is_whole else math.inf

    def at(self, share: float) -> Any:
        """The value below which a share in [0, 1) of the distribution lies; real numbers to DIGITS digits.

        A whole number stands for the interval of half a unit around it, on the scale of the distribution.
        """
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        half = 0.5 if self.is_whole else 0.0
        first, last = low - half, high + half
        if self.kind == "loguniform":
            found = math.exp(math.log(first) + share * (math.log(last) - math.log(first)))
        else:
            found = first + share * (last - first)
        return self.rounded(found)

    def rounded(self, number: float) -> float:
        """A number of a range in its canonical form: to the whole, or to DIGITS digits; never outside the range."""
        low, high = self.values
        nearest = math.floor(number + 0.5) if self.is_whole else float(f"{number:.{DIGITS}g}")
        return float(min(max(nearest, low), high)) if not self.is_whole else int(min(max(nearest, low), high))


Axis = tuple[Any, ...] | Distribution
"""The values of an axis: a list for a grid, or what they are drawn from."""


def uniform(low: float, high: float) -> Distribution:
    """Evenly between two numbers; between whole numbers, on an option that is one, whole ones, both ends included."""
    return Distribution("uniform", (low, high))


def loguniform(low: float, high: float) -> Distribution:
    """Evenly in the logarithm between two positive numbers; whole ones as for `uniform`."""
    return Distribution("loguniform", (low, high))


def choice(*values: Any) -> Distribution:
    """Each of the values as often."""
    return Distribution("choice", values)


def parse(text: str) -> Distribution | None:
    """The distribution that a text such as `loguniform(1e-3, 1e-1)` spells; None where it spells none."""
    found = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*\((.*)\)\s*", text, re.DOTALL)
    if found is None:
        return None
    name, inside = found[1], found[2].strip()
    kinds: Mapping[str, Kind] = {kind: kind for kind in get_args(Kind)}
    if name not in kinds:
        raise InputError(f"{text.strip()!r} is no distribution; {suggest(name, kinds)}, each with (values)")
    return Distribution(kinds[name], tuple(part.strip() for part in inside.split(",")) if inside else ())


def fitted(distribution: Distribution, annotation: Any, what: str) -> Distribution:
    """The distribution with its values as an option of this annotation has them; InputError where they do not fit."""
    said = f"{what} is {distribution}"
    if distribution.kind == "choice":
        if not distribution.values:
            raise InputError(f"{said}; allowed: choice of one or more values")
        values = tuple(coerce(value, annotation, what) for value in distribution.values)
        if len(set(values)) < len(values):
            raise InputError(f"{said}; allowed: distinct values")
        if any(isinstance(value, tuple) or re.search(r"[(),]", str(value)) for value in values):
            raise InputError(f"{said}; allowed: values that are not lists themselves; give a list of them")
        return Distribution("choice", values)
    if len(distribution.values) != 2:
        raise InputError(f"{said}; allowed: {distribution.kind}(low, high)")
    low, high = (coerce(value, annotation, what) for value in distribution.values)
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise InputError(f"{said}; allowed: choice(...), since it is not a number")
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    if low >= high:
        raise InputError(f"{said}; allowed: low below high")
    if distribution.kind == "loguniform" and low <= 0:
        raise InputError(f"{said}; allowed: low above 0, since its logarithm is drawn")
    return Distribution(distribution.kind, (low, high))
