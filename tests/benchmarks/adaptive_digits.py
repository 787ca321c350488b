"""Does an adaptive campaign pay on digits, where it also changes what the models of undecided examples see?

Pilots of 100 models are blocks of a stored balanced campaign, each continued by adaptive blocks up to 200 models; the
rest of that campaign is the truth. Two questions: is the error smaller than of as many balanced models, and are
undecided examples right as often outside an adaptive subset as outside a balanced one? (No, and so it does not pay.)
First `unlearn memorize digits --models 1000 --storage ROOT`, then
`python -m tests.benchmarks.adaptive_digits ROOT FOLDER DECISION MOST PROCESSES REPETITIONS`: FOLDER keeps what was
trained, DECISION is threshold:0.25 or top:0.05, MOST the times that an undecided example is left out of ten models.
"""

from __future__ import annotations

import math
import sys
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np

from orchestrator.arrays import unpack
from orchestrator.data import Dataset
from orchestrator.memorization import BLOCK_SIZE, Counts, count, estimate
from orchestrator.pipeline import Lab, steady, train_subset_model
from orchestrator.recipes import RECIPES
from orchestrator.seeds import generator, numpy_generator
from orchestrator.specs import CampaignSpec
from orchestrator.store import Store
from orchestrator.tasks import Task
from tests.benchmarks.adaptive import GROWTH, Decision, times_out

PILOT, TOTAL = 10, 20  # blocks
HELD_OUT, LEAST = 3, 1  # of ten models: times left out on average, and at least
SIZES = (10, 20, 30, 40)  # blocks of balanced campaigns to compare with

Arm = dict[str, np.ndarray]
"""Of a pilot's continuation: membership, correct bool [blocks, 10, n], undecided before each block [blocks, n]."""


def adaptive_block(times: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Membership bool [10, n]: example i is left out of times[i] of the ten models.

    An example's slots are neighbours on the circle of the ten models, and begin where the one before it ended, class
    by class in random order: any run of examples is left out of every model equally often within one.
    """
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    slots = np.repeat(order, times[order])
    membership = np.ones((BLOCK_SIZE, len(labels)), dtype=bool)
    membership[np.arange(len(slots)) % BLOCK_SIZE, slots] = False
    return membership


_lab: list[Lab] = []


def _start(dataset: Dataset) -> None:
    _lab.append(Lab(dataset, "cpu"))


def _correct(job: tuple[CampaignSpec, str, int, int, np.ndarray]) -> np.ndarray:
    """Train one subset model; which training examples it gets right, bool [n]."""
    spec, purpose, block, member, members = job
    setting, stream = spec.setting, generator(spec.seed, purpose, block, member)
    with steady():
        arrays = train_subset_model(
            _lab[0], setting.model, setting.training.build(), members, fraction=spec.fraction, stream=stream
        )
    return arrays["train"].argmax(axis=1) == _lab[0].dataset.split_labels("train")


def balanced_counts(store: Store, spec: CampaignSpec, labels: np.ndarray) -> list[Counts]:
    """Counts of each block of the stored campaign."""
    found: list[Counts] = []
    while store.exists(name := Task("block", spec, len(found)).object_name):
        arrays = unpack(store, name)
        found.append(count(arrays["membership"].astype(bool), arrays["train"].argmax(axis=2) == labels))
    return found


def total(parts: list[Counts]) -> Counts:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def main() -> None:
    root, folder = Store(sys.argv[1]), Path(sys.argv[2])
    kind, _, value = sys.argv[3].partition(":")
    decision = Decision(**{{"threshold": "threshold", "top": "share"}[kind]: float(value)})
    most, processes, repetitions = (int(word) for word in sys.argv[4:7])
    study = RECIPES["digits"].function()
    dataset = study.data.entry({}, study.data.options)
    spec, labels = study.campaign_spec(dataset.fingerprint), dataset.split_labels("train")
    folder.mkdir(parents=True, exist_ok=True)
    arms = []
    with get_context("spawn").Pool(processes, _start, (dataset,)) as pool:
        blocks = balanced_counts(root, spec, labels)
        for repetition in range(repetitions):
            pilot = blocks[PILOT * repetition : PILOT * (repetition + 1)]
            name = folder / f"{kind}{value}-{most}-{repetition}.npz"
            if not name.exists():
                np.savez(name, **continued(pool, spec, labels, pilot, decision, most, repetition))
                print(name.name, flush=True)
            arms.append(dict(np.load(name)))
    report(balanced_counts(root, spec, labels), arms, decision)


def continued(
    pool: Pool, spec: CampaignSpec, labels: np.ndarray, pilot: list[Counts], decision: Decision, most: int, number: int
) -> Arm:
    """Train the adaptive blocks that follow a pilot, in rounds as a growing campaign has them."""
    counts = total(pilot)
    parts: dict[str, list[np.ndarray]] = {"membership": [], "correct": [], "undecided": []}
    purpose = f"adaptive {decision.label} {most} {number}"
    while len(parts["membership"]) < TOTAL - PILOT:
        done = len(parts["membership"])
        undecided = decision.open(estimate(counts))
        jobs, designs = [], []
        for block in range(done, min(TOTAL - PILOT, done + math.ceil(GROWTH * (PILOT + done)))):
            rng = numpy_generator(spec.seed, purpose, block)
            design = adaptive_block(times_out(undecided, labels, HELD_OUT, most, LEAST, rng), labels, rng)
            designs.append(design)
            jobs += [(spec, purpose, block, member, members) for member, members in enumerate(design)]
        correct = np.stack(pool.map(_correct, jobs, chunksize=1)).reshape(len(designs), BLOCK_SIZE, -1)
        for design, right in zip(designs, correct, strict=True):
            counts = counts + count(design, right)
            parts["membership"].append(design)
            parts["correct"].append(right)
            parts["undecided"].append(undecided)
    return {name: np.stack(part) for name, part in parts.items()}


def said(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{scale * np.mean(values):.{digits}f} ± {scale * error:.{digits}f}"


def report(blocks: list[Counts], arms: list[Arm], decision: Decision) -> None:
    """Print what balanced campaigns of several sizes and the adaptive ones come to, from the same pilots.

    The truth is the balanced blocks that neither used; its own variance is taken off the squared errors.
    """
    lines: dict[str, dict[str, list[float]]] = {}
    shifts: dict[str, list[float]] = {"inside": [], "outside": []}
    pooled = np.zeros((3, len(blocks[0].out_hits)))  # outside while undecided: times, right, right as expected
    for repetition, made in enumerate(arms):
        order = [(PILOT * repetition + place) % len(blocks) for place in range(len(blocks))]
        found = {f"balanced {10 * size}": (size, [blocks[i] for i in order[:size]]) for size in SIZES}
        own = [count(m, c) for m, c in zip(made["membership"], made["correct"], strict=True)]
        found[f"adaptive {10 * TOTAL}"] = TOTAL, [blocks[i] for i in order[:PILOT]] + own
        for name, (size, parts) in found.items():
            truth = estimate(total([blocks[i] for i in order[max(size, TOTAL) :]]))
            scores, chosen = estimate(total(parts)), made["undecided"][0]
            off, noise = scores.score - truth.score, truth.standard_error**2
            z = np.abs(off) / np.hypot(scores.standard_error, truth.standard_error)
            line = lines.setdefault(name, {"error": [], "square": [], "off": [], "over": [], "out": []})
            line["error"].append(decision.error(scores.score, truth.score))
            line["square"].append(float((off**2 - noise)[chosen].mean()))
            line["off"].append(float(off[chosen].mean()))
            line["over"].append(float((z > 1.96)[chosen].mean()))
            line["out"].append(float(scores.num_out[chosen].mean()))
        rest = total([blocks[i] for i in order[PILOT:]])
        for side, expected in (("inside", rest.in_hits / rest.in_total), ("outside", rest.out_hits / rest.out_total)):
            # models trained after an example was found undecided: no shift in the mean if its chances are the same
            there = made["membership"] == (side == "inside")
            there &= made["undecided"][:, None, :]
            shifts[side].append(float((made["correct"] - expected)[there].mean()))
            if side == "outside":
                times = there.sum(axis=(0, 1))
                pooled += [times, (made["correct"] & there).sum(axis=(0, 1)), times * expected]
    share = said([float(made["undecided"][0].mean()) for made in arms], 100, 1)
    print(f"{decision.label}: {len(arms)} pilots of 100; {share} % of examples undecided after them (below: these)")
    for name, line in lines.items():
        print(
            f"  {name}: decided wrongly {said(line['error'], 100, 2)} %; left out {np.mean(line['out']):.0f} times, "
            f"score too high by {said(line['off'])}, mean square error {said(line['square'], 1e3, 2)} e-3, "
            f"|z| over 1.96 in {said(line['over'], 100, 1)} %"
        )
    for measure, scale in (("error", 100), ("square", 1e3)):
        pairs = zip(lines[f"balanced {10 * TOTAL}"][measure], lines[f"adaptive {10 * TOTAL}"][measure], strict=True)
        print(f"  {measure} x {scale:g}, balanced less adaptive, paired: {said([a - b for a, b in pairs], scale)}")
    times, right, expected = pooled[:, pooled[0] >= 100]
    shift, chance = (right - expected) / times, expected / times
    variance = chance * (1 - chance) * (1 / times + 1 / total(blocks).out_total.mean())
    deviation = math.sqrt(max(0.0, shift.var(ddof=1) - variance.mean()))
    beyond = f"deviation beyond chance {deviation:.3f}"
    print(f"  outside, {len(times)} examples left out 100 times: {said(list(shift))}, {beyond}")
    both = ", ".join(f"{side} {said(found)}" for side, found in shifts.items())
    print(f"  undecided, right more often than in balanced blocks: {both}")


if __name__ == "__main__":
    main()
