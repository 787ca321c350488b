"""From scores and a budget to a mask. Entries rank once for all budgets of a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from orchestrator.registry import Count, InputError, ProperShare
from orchestrator.training import Mask

GRANULARITIES = ("param", "channel")

TopH = Literal["released", "all"] | Count | ProperShare
"""How many of a channel's highest scores its own score is the mean of: min(max(1, int(0.1 x channels)), fan-in) as
released with DEL, all (the plain mean; a study's `released` is this for transformers, as there), a number, or a share
of the fan-in."""


@dataclass(frozen=True)
class Ranking:
    """The order in which entries are selected: per parameter their rank from 0, int32, in the parameter's shape.

    `num_own` is the strategy's own budget in entries (those with a score of 1 or more), where it has one.
    """

    ranks: Mapping[str, Tensor]
    num_own: int

    @property
    def num_entries(self) -> int:
        return sum(part.numel() for part in self.ranks.values())

    def mask(
        self,
        budget: float | None,
        *,
        head: frozenset[str],
        train_head: bool = True,
        freeze_statistics: bool = False,
    ) -> Mask:
        """Mask exactly floor(budget x entries) entries; None: as many as the strategy's own budget.

        `train_head` adds the parameters named in `head` to the trainable part whole, as released with DEL. Raises
        InputError for a budget outside (0, 1] or one that selects nothing.
        """
        if budget is None and not self.num_own:
            raise InputError("the strategy's own budget selects nothing: no forget example has a critical entry")
        count = self.num_own if budget is None else num_selected(budget, self.num_entries)
        reset = {name: part < count for name, part in self.ranks.items()}
        trainable = {
            name: torch.ones_like(part) if train_head and name in head else part for name, part in reset.items()
        }
        return Mask(reset, trainable, freeze_statistics)


def num_selected(budget: float, num_entries: int) -> int:
    """How many entries a budget selects; raises InputError for one outside (0, 1] or too small for a single entry."""
    if not 0 < budget <= 1:
        raise InputError(f"budget is {budget}; allowed: a share of the entries in (0, 1]")
    count = int(Fraction(str(budget)) * num_entries)  # exact: 0.29 x 100 is 29, not 28
    if count == 0:
        raise InputError(
            f"budget {budget} of {num_entries} entries selects nothing; allowed: {1 / num_entries:.2g} or more"
        )
    return count


def rank(scores: Mapping[str, Tensor], granularity: str, h: str | int | float = "released") -> Ranking:
    """Rank all entries, the highest score first; ties rank by position.

    `param`: by their own score. `channel`: all entries of an output channel (first axis of a tensor with two or more)
    by its mean over the `h` highest (see TopH); tensors with one axis rank by entry. Channels are ranked whole, so
    only the last one that a budget reaches is cut.
    """
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity is {granularity!r}; allowed: {', '.join(GRANULARITIES)}")
    units, sizes = [], []
    for part in scores.values():
        rows = part.flatten(1) if granularity == "channel" and part.ndim > 1 else part.reshape(-1, 1)
        units.append(_mean_of_highest(rows, h))
        sizes.append(torch.full((len(rows),), rows.shape[1]))
    order = _descending(torch.cat(units))
    starts = torch.empty(len(order), dtype=torch.int32)
    if all(int(size[0]) == 1 for size in sizes):
        starts[order] = torch.arange(len(order), dtype=torch.int32)
    else:
        ordered = torch.cat(sizes)[order]
        starts[order] = (ordered.cumsum(0) - ordered).int()
    ranks = {}
    for (name, part), start, size in zip(
        scores.items(), torch.split(starts, [len(unit) for unit in units]), sizes, strict=True
    ):
        inside = torch.arange(int(size[0]), dtype=torch.int32)
        ranks[name] = (start[:, None] + inside).view(part.shape)
    return Ranking(ranks, sum(int((part >= 1).sum()) for part in scores.values()))


def _descending(values: Tensor) -> Tensor:
    """The order of non-negative float32 values, highest first, ties by position; int64.

    The bits of such floats rise with their values, so (highest - bits, position) is one whole number, and sorting
    those is several times as fast as a stable argsort.
    """
    bits = (values + 0.0).contiguous().numpy().view(np.uint32).astype(np.uint64)  # + 0.0: one form for zero
    keys = ((np.uint64(0xFFFFFFFF) - bits) << np.uint64(32)) | np.arange(len(bits), dtype=np.uint64)
    keys.sort()
    return torch.from_numpy((keys & np.uint64(0xFFFFFFFF)).astype(np.int64))


def select(
    scores: Mapping[str, Tensor],
    budget: float | None,
    granularity: str,
    *,
    head: frozenset[str],
    train_head: bool = True,
    h: str | int | float = "released",
) -> Mask:
    """Rank and mask in one call; see `rank` and `Ranking.mask`."""
    return rank(scores, granularity, h).mask(budget, head=head, train_head=train_head)


def _mean_of_highest(rows: Tensor, h: str | int | float) -> Tensor:
    channels, fan_in = rows.shape
    if fan_in == 1:
        return rows[:, 0]
    number = fan_in
    if h == "released":  # a tenth of the channels, not of the fan-in: len() of a two-dimensional tensor
        number = int(0.1 * channels)
    elif isinstance(h, int):
        number = h
    elif isinstance(h, float):
        number = int(h * fan_in)
    number = min(max(1, number), fan_in)
    return rows.topk(number, dim=1).values.mean(dim=1)
