"""The time that a command may take: after it nothing is begun, and what is unfinished is not called finished."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

A = TypeVar("A")

OUT_OF_TIME = 124  # the exit code, as of timeout(1)
_UNITS = {"": 3600.0, "h": 3600.0, "m": 60.0, "s": 1.0}


class OutOfTimeError(RuntimeError):
    """The time that the command may take is over."""


@dataclass(frozen=True)
class Deadline:
    """A point in time (`time.monotonic`), or None."""

    at: float | None = None

    @property
    def has_passed(self) -> bool:
        return self.at is not None and time.monotonic() >= self.at

    def check(self) -> None:
        """Raise OutOfTimeError once it has passed."""
        if self.has_passed:
            raise OutOfTimeError

    def within(self, items: Iterable[A]) -> Iterator[A]:
        """The items up to the deadline; none is taken after it."""
        remaining = iter(items)
        while not self.has_passed:
            try:
                item = next(remaining)
            except StopIteration:
                return
            yield item


def seconds_of(text: str) -> float | None:
    """The seconds of `1.5` (hours), `2h`, `30m` or `45s`; None for what is none of these, or not above 0."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([hms]?)", text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    return seconds if seconds > 0 else None
