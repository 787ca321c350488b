"""Coverage of the nominal 95 % intervals where a campaign stops at a target that its own scores meet.

Rounds and targets are those of `unlearn memorize` with one worker; outcomes are drawn with fixed chances on the grid of
DESIGN.md section 10, as many examples at each point. `python -m tests.benchmarks.stopping` (two minutes) prints what
the log has; tests/test_memorize.py holds a part of it to a bound.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from scipy.signal import fftconvolve
from scipy.stats import binom

from jobs.memorize import Goal, growth
from orchestrator.campaigns import ScoresSummary
from orchestrator.memorization import BLOCK_SIZE, Counts, MemorizationScores, estimate, split_half_correlation

QS = (0.05, 0.25, 0.5, 0.75, 0.95)
GRID = np.array(list(itertools.product(QS, QS))).T  # chances of being right inside and outside
NUM_IN, NUM_OUT = 7, 3  # of a block
MOST = 100  # blocks, as --models 1000


class Coverage(NamedTuple):
    """Coverage at each point of the grid, float64 [25], and the models at which campaigns stopped."""

    points: np.ndarray
    models: np.ndarray


def _met(goal: Goal, scores: MemorizationScores, halves: list[Counts]) -> bool:
    correlation = split_half_correlation(*halves) if len(halves) == 2 and goal.split_half is not None else None
    error = float(scores.standard_error.mean())
    return goal.met(ScoresSummary("", 0, 1.0, None, 1.0, correlation, 0.0, error)) is not None


def together(goal: Goal, per_point: int, campaigns: int, seed: int) -> Coverage:
    """Campaigns of 25 x per_point examples that stop at a target of them all, drawn by a seeded generator."""
    rng, chances = np.random.default_rng(seed), np.repeat(GRID, per_point, axis=1)
    truth, ends = chances[0] - chances[1], []
    held = np.zeros(len(truth))
    totals = np.full(len(truth), NUM_IN), np.full(len(truth), NUM_OUT)
    for _ in range(campaigns):
        halves: list[Counts] = []
        blocks, met = 0, False
        while not met and blocks < MOST:
            for block in range(blocks, min(MOST, blocks + growth(blocks, 1))):
                new = Counts(rng.binomial(NUM_IN, chances[0]), totals[0], rng.binomial(NUM_OUT, chances[1]), totals[1])
                if block < 2:
                    halves.append(new)
                else:
                    halves[block % 2] += new
                blocks += 1
            scores = estimate(halves[0] + halves[1] if len(halves) == 2 else halves[0])
            met = _met(goal, scores, halves)
        held += _holds(scores, truth)
        ends.append(BLOCK_SIZE * blocks)
    return Coverage((held / campaigns).reshape(-1, per_point).mean(axis=1), np.array(ends))


def alone(target: float) -> Coverage:
    """A data set of one example, whose own standard error alone stops the campaign: exact, by summing all outcomes.

    `models` are the expected numbers at each point.
    """
    points, models = [], []
    for q_in, q_out in GRID.T:
        state, blocks, covered, expected = np.ones((1, 1)), 0, 0.0, 0.0
        while blocks < MOST and state.sum() > 1e-9:
            more = min(growth(blocks, 1), MOST - blocks)
            inside, outside = (
                binom.pmf(np.arange(num * more + 1), num * more, q) for num, q in ((NUM_IN, q_in), (NUM_OUT, q_out))
            )
            state = np.maximum(0.0, fftconvolve(state, np.outer(inside, outside)))
            blocks += more
            ins, outs = (part.ravel() for part in np.indices(state.shape))
            totals = np.full(len(ins), NUM_IN * blocks), np.full(len(ins), NUM_OUT * blocks)
            scores = estimate(Counts(ins, totals[0], outs, totals[1]))
            stops = ((scores.standard_error <= target) | (blocks == MOST)).reshape(state.shape)
            covered += float((state * stops)[_holds(scores, q_in - q_out).reshape(state.shape)].sum())
            expected += float((state * stops).sum()) * BLOCK_SIZE * blocks
            state = np.where(stops, 0.0, state)
        points.append(covered)
        models.append(expected)
    return Coverage(np.array(points), np.array(models))


def _holds(scores: MemorizationScores, truth: np.ndarray | float) -> np.ndarray:
    held: np.ndarray = (scores.low <= truth + 1e-12) & (truth - 1e-12 <= scores.high)
    return held


def main() -> None:
    def say(name: str, found: Coverage) -> None:
        worst = found.points.argmin()
        print(
            f"{name:42} mean {found.points.mean():.4f}, least {found.points[worst]:.3f} at {GRID[:, worst]}; "
            f"models {np.median(found.models):.0f} ({found.models.min():.0f} to {found.models.max():.0f})",
            flush=True,
        )

    for target in (0.15, 0.1, 0.077, 0.05):
        say(f"1 example, its standard error {target:g}", alone(target))
    for per_point, campaigns in ((1, 2000), (8, 500)):
        for error in (0.1, 0.077, 0.05):
            goal = Goal(standard_error=error)
            say(f"{25 * per_point} examples, standard error {error:g}", together(goal, per_point, campaigns, 0))
        for halves in (0.8, 0.9, 0.95):
            goal = Goal(split_half=halves)
            say(f"{25 * per_point} examples, split-half {halves:g}", together(goal, per_point, campaigns, 0))


if __name__ == "__main__":
    main()
