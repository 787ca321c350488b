"""What subset models say of examples: logits, or where there are many classes correctness and margin. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

MOST_CLASSES = 20  # whose logits are kept whole

_EIGHTY = 0x5500  # the bits of 80 in float16
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class SubsetOutputs:
    """Outputs of m models on n examples under their given labels, int64 [n], in either of two forms.

    `logits` float16 [m, n, classes], or `stored_correct` bool [m, n] and `stored_margin` float16 [m, n]. Who reads
    `correct`, `margin` and `probability` need not know which.
    """

    labels: np.ndarray
    logits: np.ndarray | None = None
    stored_correct: np.ndarray | None = None
    stored_margin: np.ndarray | None = None

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether the predicted class is the given label, bool [m, n]; ties go to the lower class."""
        if self.logits is None:
            assert self.stored_correct is not None
            return self.stored_correct.astype(bool, copy=False)
        return np.stack([_correct(logits, self.labels) for logits in self.logits])

    @cached_property
    def margin(self) -> np.ndarray:
        """The label's logit minus the log-sum-exp of the others, float32 [m, n]: the log-odds of its probability."""
        if self.logits is None:
            assert self.stored_margin is not None
            return self.stored_margin.astype(np.float32)
        return np.stack([_margin(logits, self.labels) for logits in self.logits])

    @cached_property
    def probability(self) -> np.ndarray:
        """The given label's probability, float32 [m, n]."""
        if self.logits is None:
            with np.errstate(over="ignore"):  # 1 / (1 + inf) is 0
                found: np.ndarray = 1 / (1 + np.exp(-self.margin))
            return found
        return np.stack([_probability(logits, self.labels) for logits in self.logits])


def packed(split: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays by name in which one model's logits float16 [n, classes] on a split are stored.

    Above 20 classes correctness and the margin in float16 (clipped to its range), as few bytes as two or three logits.
    """
    if logits.shape[1] <= MOST_CLASSES:
        return {split: logits}
    margin = np.clip(_margin(logits, labels), -_LARGEST, _LARGEST).astype(np.float16)
    return {f"{split}_correct": _correct(logits, labels), f"{split}_margin": margin}


def is_of(split: str, name: str) -> bool:
    """Whether an array of that name belongs to a split."""
    return name in (split, f"{split}_correct", f"{split}_margin")


def unpacked(split: str, arrays: Mapping[str, np.ndarray], labels: np.ndarray) -> SubsetOutputs:
    """The outputs on a split from the arrays of several models, stacked."""
    if split in arrays:
        return SubsetOutputs(labels, arrays[split])
    return SubsetOutputs(labels, None, arrays[f"{split}_correct"], arrays[f"{split}_margin"])


def _correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As `logits.argmax(axis=1) == labels` of float16 [n, classes], in whole numbers and class by class: six times
    as fast."""
    keys = np.ascontiguousarray(logits.view(np.int16).T)
    sign = keys >> 15
    keys &= 0x7FFF
    if keys.max(initial=0) > 0x7C00:  # NaN: argmax has its own rule
        slow: np.ndarray = logits.argmax(axis=1) == labels
        return slow
    keys ^= sign
    keys -= sign  # signed whole numbers in the order of the logits, one for both zeros
    best = keys.max(axis=0)
    correct: np.ndarray = _own(keys, labels) == best
    ties = np.flatnonzero((keys == best).sum(axis=0, dtype=np.int16) > 1)
    correct[ties] = keys[:, ties].argmax(axis=0) == labels[ties]
    return correct


def _margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    others = np.ascontiguousarray(logits.T).astype(np.float32)
    own = _own(others, labels)
    others[labels, np.arange(len(labels))] = -np.inf
    largest = others.max(axis=0)
    others -= largest
    np.exp(others, out=others)
    found: np.ndarray = own - largest - np.log(others.sum(axis=0))
    return found


def _probability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label's share of the exponentials, which are looked up where none of them leaves the range of float32."""
    bits = np.ascontiguousarray(logits.view(np.uint16).T)
    if (bits & 0x7FFF).max(initial=0) <= _EIGHTY:
        powers = _exponentials().take(bits, mode="wrap")
        share: np.ndarray = _own(powers, labels) / powers.sum(axis=0)
        return share
    beyond = np.ascontiguousarray(logits.T).astype(np.float32)
    beyond -= _own(beyond, labels)
    with np.errstate(over="ignore"):  # 1 / inf is 0
        np.exp(beyond, out=beyond)
        found: np.ndarray = 1 / beyond.sum(axis=0)
    return found


@cache
def _exponentials() -> np.ndarray:
    """exp of each float16 up to 80 in absolute value, by its bits; float32 [65536]."""
    values = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float64)
    found: np.ndarray = np.exp(np.clip(np.nan_to_num(values), -80, 80)).astype(np.float32)
    return found


def _own(by_class: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The given label's entry of each example, from [classes, n]."""
    found: np.ndarray = by_class.ravel().take(labels * len(labels) + np.arange(len(labels)))
    return found
