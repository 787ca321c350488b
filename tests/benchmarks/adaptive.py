"""Does an adaptive campaign pay? Decision error against number of models, with fixed chances of being right.

After a pilot of balanced blocks, left-out slots go to the examples whose interval still holds the decision's cut;
subset sizes and class counts stay. Outcomes are drawn here, nothing is trained, so what a change of the other
examples' presence does to an example cannot show by itself: `tests.benchmarks.adaptive_digits` trains, and what it
found on the digits is put in as `shifted`. It does not pay (analysis/LOG.md): `unlearn memorize` has no adaptive mode.
`python -m tests.benchmarks.adaptive [scores/KEY.parquet]` (about two minutes; the file adds a distribution).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from orchestrator.memorization import BLOCK_SIZE, Counts, MemorizationScores, estimate

CHECKPOINTS = (200, 300, 400, 600, 1000)
REPETITIONS = 60
GROWTH = 0.2  # of a round, as in jobs/memorize.py
SHIFT = (-0.035, 0.05)  # mean and deviation over examples of the change in being right outside, found on the digits


@dataclass(frozen=True)
class Decision:
    """A score above a threshold, or membership of the top share; exactly one is set."""

    threshold: float | None = None
    share: float | None = None

    @property
    def label(self) -> str:
        return f"threshold:{self.threshold:g}" if self.threshold is not None else f"top:{self.share:g}"

    def cut(self, score: np.ndarray) -> float:
        """What a score must exceed: for the top share, halfway between the last inside and the first outside."""
        if self.threshold is not None:
            return self.threshold
        number = self._number(score)
        below, above = np.partition(score, [-number - 1, -number])[[-number - 1, -number]]
        return float(below + above) / 2

    def taken(self, score: np.ndarray) -> np.ndarray:
        """Which examples are decided to be memorized, bool [n]; ties by position."""
        if self.threshold is not None:
            above: np.ndarray = score > self.threshold
            return above
        chosen = np.zeros(len(score), dtype=bool)
        chosen[np.argsort(-score, kind="stable")[: self._number(score)]] = True
        return chosen

    def open(self, scores: MemorizationScores) -> np.ndarray:
        """Examples whose interval holds the cut, bool [n]."""
        cut = self.cut(scores.score)
        return (scores.low <= cut) & (cut <= scores.high)

    def error(self, score: np.ndarray, truth: np.ndarray) -> float:
        """Share decided otherwise than by the truth: of all examples, or of the top share those missed."""
        wrong = self.taken(score) != self.taken(truth)
        return float(wrong.mean()) if self.share is None else float(wrong.sum()) / 2 / self._number(score)

    def _number(self, score: np.ndarray) -> int:
        assert self.share is not None
        return max(1, round(self.share * len(score)))


def times_out(
    undecided: np.ndarray, labels: np.ndarray, held_out: int, most: int, least: int, rng: np.random.Generator
) -> np.ndarray:
    """How many of a block's ten models each example is left out of, int64 [n]; n_c * held_out in each class.

    The undecided are left out of `most` where the others can spare it, and all others of `least` or more.
    """
    times = np.full(len(labels), held_out)
    for label in np.unique(labels):
        chosen, rest = (np.flatnonzero((labels == label) & side) for side in (undecided, ~undecided))
        if len(chosen) and len(rest):
            slots = held_out * (len(chosen) + len(rest))
            given = min(most * len(chosen), slots - least * len(rest))
            _spread(times, chosen, given, rng)
            _spread(times, rest, slots - given, rng)
    return times


def _spread(times: np.ndarray, chosen: np.ndarray, slots: int, rng: np.random.Generator) -> None:
    base, more = divmod(slots, len(chosen))
    times[chosen] = base
    times[rng.permutation(chosen)[:more]] += 1


Rule = Callable[[Counts, np.random.Generator], np.ndarray]
"""How often each example is left out of the ten models of the next block."""


def simulate(
    chances: np.ndarray, rule: Rule, num_pilot: int, rng: np.random.Generator, shift: np.ndarray | float = 0.0
) -> list[MemorizationScores]:
    """Scores at each checkpoint of one campaign; chances float64 [2, n], of being right inside and outside.

    `shift` is added to the chances outside while an example is left out more often than in a balanced block.
    """
    shifted = np.clip(chances[1] + shift, 0.0, 1.0)
    blocks, counts, found = 0, Counts(*np.zeros((4, chances.shape[1]), dtype=np.int64)), []
    for models in CHECKPOINTS:
        while blocks < models // BLOCK_SIZE:
            pilot = blocks < num_pilot // BLOCK_SIZE
            number = num_pilot // BLOCK_SIZE if pilot else max(1, math.ceil(GROWTH * blocks))
            number = min(number, models // BLOCK_SIZE - blocks)
            out = number * (np.full(chances.shape[1], 3) if pilot else rule(counts, rng))
            inside, outside = number * BLOCK_SIZE - out, np.where(out > 3 * number, shifted, chances[1])
            counts += Counts(rng.binomial(inside, chances[0]), inside, rng.binomial(out, outside), out)
            blocks += number
        found.append(estimate(counts))
    return found


def balanced(held_out: int, size: int) -> Rule:
    return lambda counts, rng: np.full(size, held_out)


def adaptive(decision: Decision, size: int, most: int, least: int) -> Rule:
    labels = np.zeros(size, dtype=np.int64)
    return lambda counts, rng: times_out(decision.open(estimate(counts)), labels, 3, most, least, rng)


def cifar10_like(rng: np.random.Generator, size: int = 5000) -> np.ndarray:
    """Chances [2, n] with scores as measured on the released ones: 26.6 % below .01, 24.9 % above .5, mean .276."""
    part = rng.choice(3, size, p=[0.266, 0.485, 0.249])
    score = np.choose(
        part,
        [rng.uniform(0, 0.01, size), 0.01 + 0.49 * rng.beta(0.8, 1.3, size), 0.5 + 0.4995 * rng.beta(0.8, 1.0, size)],
    )
    return np.stack([np.full(size, 0.9995), np.maximum(0.0, 0.9995 - score)])


def digits_like(rng: np.random.Generator, size: int = 1200) -> np.ndarray:
    """Chances [2, n] for 76 % of scores below .02, a thin middle, and 5 % flipped labels."""
    part = rng.choice(3, size, p=[0.76, 0.19, 0.05])
    score = np.choose(
        part, [rng.uniform(0, 0.02, size), 0.02 + 0.9 * rng.beta(0.6, 2.0, size), rng.beta(12.0, 0.6, size)]
    )
    return np.stack([np.full(size, 0.9995), np.maximum(0.0, 0.9995 - score)])


def stored(path: str) -> np.ndarray:
    """Chances [2, n] as the means of stored scores."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return np.stack([table.column(name).to_numpy() for name in ("in_mean", "out_mean")])


def needed(models: float, error: float, curve: np.ndarray) -> float:
    """Models at which a curve of errors at CHECKPOINTS comes down to `error`, on straight lines of logarithms.

    Beyond the last checkpoint the last line goes on; nan where an error is zero.
    """
    if error <= 0 or (curve <= 0).any():
        return math.nan
    x, y = np.log(CHECKPOINTS), np.log(curve)
    slope, at = np.polyfit(x, y, 1)
    for i in range(len(x) - 1):
        if y[i + 1] <= math.log(error) <= y[i]:
            return float(np.exp(np.interp(math.log(error), [y[i + 1], y[i]], [x[i + 1], x[i]])))
    return float(np.exp((math.log(error) - at) / slope))


def compare(chances: np.ndarray, decision: Decision, num_pilot: int, seed: int) -> None:
    """Print errors and how many balanced models an adaptive campaign saves, with standard errors over repetitions."""
    size, truth = chances.shape[1], chances[0] - chances[1]
    shift = np.random.default_rng(seed).normal(*SHIFT, size)
    rules: dict[str, tuple[Rule, int, np.ndarray | float]] = {
        "balanced .7": (balanced(3, size), num_pilot, 0.0),
        "balanced .5": (balanced(5, size), 0, 0.0),
        **{f"adaptive .{most}": (adaptive(decision, size, most, 1), num_pilot, 0.0) for most in (5, 7, 9)},
        "shifted .7": (adaptive(decision, size, 7, 1), num_pilot, shift),
    }
    errors, cover, near = {}, {}, np.abs(truth - decision.cut(truth)) < 0.05
    for name, (rule, first, moved) in rules.items():
        runs = [simulate(chances, rule, first, np.random.default_rng([seed, i]), moved) for i in range(REPETITIONS)]
        errors[name] = np.array([[decision.error(scores.score, truth) for scores in run] for run in runs])
        held = np.array([(run[-1].low <= truth) & (truth <= run[-1].high) for run in runs])
        cover[name] = f"covers {held.mean():.3f}, near the cut {held[:, near].mean():.3f}"
    print(f"  pilot of {num_pilot} models, {near.mean():.1%} within .05 of the cut")
    base, boot = errors["balanced .7"], np.random.default_rng(0)
    for name, found in errors.items():
        columns = []
        for i, models in enumerate(CHECKPOINTS):
            drawn = [(part[boot.integers(0, REPETITIONS, REPETITIONS)].mean(axis=0)) for part in (found, base) * 40]
            ratios = [needed(models, a[i], b) / models for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
            deviation = found[:, i].std(ddof=1) / math.sqrt(REPETITIONS)
            ratio = needed(models, found[:, i].mean(), base.mean(axis=0)) / models
            columns.append(
                f"{100 * found[:, i].mean():.2f}±{100 * deviation:.2f} % x{ratio:.2f}±{np.nanstd(ratios):.2f}"
            )
        print(f"  {name:12} {', '.join(columns)}; {cover[name]}")


def main() -> None:
    sources = {
        "CIFAR-10-like": cifar10_like(np.random.default_rng(1)),
        "digits-like": digits_like(np.random.default_rng(2)),
    }
    for path in sys.argv[1:]:
        sources["stored scores"] = stored(path)
    for name, chances in sources.items():
        for decision in (Decision(threshold=0.25), Decision(share=0.06 if "CIFAR" in name else 0.05)):
            print(f"{name}, {decision.label}; at {', '.join(map(str, CHECKPOINTS))} models")
            for num_pilot in (100, 200):
                compare(chances, decision, num_pilot, seed=3)


if __name__ == "__main__":
    main()
