"""What a campaign's blocks come to: memorization scores and influence, their summaries, and pictures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator import results
from orchestrator.arrays import pack, unpack
from orchestrator.blocks import SubsetModel, get_block
from orchestrator.data import Dataset
from orchestrator.experiment import memorization_scores
from orchestrator.influence_pairs import InfluencePairs, influence_pairs
from orchestrator.memorization import (
    BLOCK_SIZE,
    Counts,
    Moments,
    Tallied,
    can_estimate,
    count,
    estimate,
    moments,
    split_half_correlation,
    top_overlap,
)
from orchestrator.schemas import TABLES
from orchestrator.specs import CampaignSpec, Estimator, InfluenceSpec, ScoresSpec, key
from orchestrator.store import Store

NUM_PICTURES = 25  # images of the most memorized examples kept with the scores, for the report
NUM_PAIRS_SHOWN = 12  # pairs with the strongest influence whose images are kept, for the report

_THREADS = min(8, os.cpu_count() or 1)

_STORED = ("memorization", "examples", "influence_pairs", "influence_examples")
_SCHEMAS = {name: TABLES[name].remove(0) for name in _STORED}


@dataclass(frozen=True)
class ScoresSummary:
    """What a campaign came to: its scores key, fit, and reliability (rank correlation between its halves)."""

    scores_key: str
    models: int
    in_accuracy: float
    hard_in_accuracy: float | None  # None: no example is mostly wrong outside its subsets
    test_accuracy: float
    split_half: float | None  # None: a single block has no halves
    model_seconds: float
    standard_error: float | None = None  # mean over examples; None: from before it was kept
    top_overlap: float | None = None  # of the 5 % most memorized by either half
    estimator: str = "correctness"
    stopping: str | None = None  # the target that the scores met, at which the campaign stopped; None: no such look

    @property
    def passes_gate(self) -> bool:
        """In-subset accuracy 99.5 % overall, and 97 % on examples with an out-accuracy below one half."""
        return self.in_accuracy >= 0.995 and (self.hard_in_accuracy is None or self.hard_in_accuracy >= 0.97)


def scores(store: Store, spec: ScoresSpec, dataset: Dataset) -> ScoresSummary:
    """The stored summary of these scores; scores that are not there are estimated from the campaign's blocks."""
    return _stored_summary(store, spec) or _compute_scores(store, spec, dataset)


def _stored_summary(store: Store, spec: ScoresSpec) -> ScoresSummary | None:
    name = f"scores/{key(spec)}.parquet"
    if not store.exists(name):
        return None
    metadata = results.get_table(store, name).schema.metadata or {}
    if b"setting" not in metadata:  # from before scores said what they are of
        return None
    return ScoresSummary(**json.loads(metadata[b"summary"]))


@dataclass(frozen=True)
class _Sums:
    """What some blocks of one half of a campaign add up to."""

    counts: Counts
    moments: Moments | None  # only where scores are of the probability

    def __add__(self, other: _Sums) -> _Sums:
        both = None if self.moments is None or other.moments is None else self.moments + other.moments
        return _Sums(self.counts + other.counts, both)

    @property
    def tallied(self) -> Tallied:
        return self.counts if self.moments is None else self.moments


@dataclass
class Tally:
    """What the blocks of a campaign add up to, one after another; even and odd ones are its halves."""

    store: Store
    campaign: CampaignSpec
    dataset: Dataset
    estimator: Estimator = "correctness"
    blocks: int = 0
    _halves: list[_Sums | None] = field(default_factory=lambda: [None, None])
    _test: list[float] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)

    def add(self, number: int = 1) -> None:
        """Read the next blocks from the store: several at a time, added in their order."""
        end, name = self.blocks + number, key(self.campaign)
        with ThreadPoolExecutor(_THREADS) as threads:
            for start in range(self.blocks, end, 2 * _THREADS):  # no more of them in memory
                places = range(start, min(start + 2 * _THREADS, end))
                for sums, models in threads.map(partial(self._read, name), places):
                    before = self._halves[self.blocks % 2]
                    self._halves[self.blocks % 2] = sums if before is None else before + sums
                    self._test.append(float(np.mean([model.test_accuracy for model in models])))
                    self._seconds.append(sum(model.seconds for model in models))
                    self.blocks += 1

    def _read(self, campaign: str, place: int) -> tuple[_Sums, tuple[SubsetModel, ...]]:
        block = get_block(self.store, campaign, place, self.dataset, ["train"])
        membership, said = block.membership, block.outputs["train"]
        spread = moments(membership, said.probability.astype(np.float64)) if self.estimator == "probability" else None
        return _Sums(count(membership, said.correct), spread), block.models

    def resume(self, most: int) -> None:
        """Take up the sums of as many blocks as were kept, `most` at most, so that those need not be read again."""
        folder = self._folder
        kept = [name.removesuffix(".safetensors") for name in self.store.names(folder)]
        blocks = max((int(name) for name in kept if name.isdigit() and int(name) <= most), default=0)
        if not blocks:
            return
        arrays = unpack(self.store, f"{folder}/{blocks}.safetensors")
        for half in range(min(2, blocks)):
            kinds = [
                {name.split(".")[2]: array for name, array in arrays.items() if name.startswith(f"{half}.{kind}.")}
                for kind in ("counts", "moments")
            ]
            self._halves[half] = _Sums(Counts(**kinds[0]), Moments(**kinds[1]) if kinds[1] else None)
        self._test, self._seconds, self.blocks = arrays["test"].tolist(), arrays["seconds"].tolist(), blocks

    def keep(self) -> None:
        """Put the sums into the store, for when the campaign has grown."""
        arrays = {"test": np.array(self._test), "seconds": np.array(self._seconds)}
        for place, half in enumerate(self._halves):
            for kind, sums in vars(half).items() if half is not None else ():
                arrays |= {f"{place}.{kind}.{name}": array for name, array in vars(sums).items()} if sums else {}
        self.store.put(f"{self._folder}/{self.blocks}.safetensors", pack(arrays))

    @property
    def _folder(self) -> str:
        return f"sums/{key(self.campaign)}/{self.estimator}"

    @property
    def can_estimate(self) -> bool:
        """Whether every example was in and out of enough models: one each, for probabilities two."""
        held_out = BLOCK_SIZE - round(self.campaign.fraction * BLOCK_SIZE)
        fewest = self.blocks * min(held_out, BLOCK_SIZE - held_out)
        return fewest >= (2 if self.estimator == "probability" else 1)

    @property
    def seconds(self) -> float:
        """What the models took, in all."""
        return sum(self._seconds)

    @property
    def _total(self) -> _Sums:
        first, second = self._halves
        assert first is not None, "no block was read"
        return first if second is None else first + second

    @property
    def total(self) -> Tallied:
        return self._total.tallied

    @property
    def spec(self) -> ScoresSpec:
        return ScoresSpec(campaign=self.campaign, blocks=self.blocks, estimator=self.estimator)

    def summary(self) -> ScoresSummary:
        """What the blocks read so far come to."""
        total, (first, second) = self._total, self._halves
        scores, fit = estimate(total.tallied), estimate(total.counts)
        halves = None if first is None or second is None else (first.tallied, second.tallied)
        if halves is not None and not all(map(can_estimate, halves)):
            halves = None  # a single model left each example out, and probabilities need two
        hard = fit.out_mean < 0.5  # the gate is of accuracy, whatever the scores are made of
        return ScoresSummary(
            scores_key=key(self.spec),
            models=self.blocks * BLOCK_SIZE,
            in_accuracy=float(total.counts.in_hits.sum() / total.counts.in_total.sum()),
            hard_in_accuracy=float(fit.in_mean[hard].mean()) if hard.any() else None,
            test_accuracy=float(np.mean(self._test)),
            split_half=None if halves is None else split_half_correlation(*halves),
            model_seconds=self.seconds,
            standard_error=float(scores.standard_error.mean()),
            top_overlap=None if halves is None else top_overlap(*halves),
            estimator=self.estimator,
        )


def _compute_scores(store: Store, spec: ScoresSpec, dataset: Dataset) -> ScoresSummary:
    tally = Tally(store, spec.campaign, dataset, spec.estimator)
    tally.resume(spec.blocks)
    tally.add(spec.blocks - tally.blocks)
    return put_scores(tally)


def put_scores(tally: Tally, stopping: str | None = None) -> ScoresSummary:
    """Estimate scores from the blocks read, store them with the images of the most memorized, and sum up.

    `stopping` says which target the scores met where that ended the campaign: their intervals are then nominal. Scores
    that are there already stay as they are, and what they say of stopping too.
    """
    if (stored := _stored_summary(tally.store, tally.spec)) is not None:
        tally.keep()
        return stored
    store, dataset, summary = tally.store, tally.dataset, replace(tally.summary(), stopping=stopping)
    labels, scores = dataset.split_labels("train"), estimate(tally.total)
    true_labels = dataset.split_true_labels("train")
    columns = {"index": np.arange(len(labels)), "label": labels, "true_label": true_labels, **vars(scores)}
    table = pa.table(columns).select(_SCHEMAS["memorization"].names).cast(_SCHEMAS["memorization"])
    most = np.argsort(-scores.score, kind="stable")[:NUM_PICTURES]
    name = summary.scores_key
    pictures = pa.Table.from_pylist(_pictures(dataset, "train", most), schema=_SCHEMAS["examples"])
    results.put_table(store, f"scores/{name}.examples.parquet", pictures)
    facts = {"summary": json.dumps(asdict(summary)), "setting": key(tally.campaign.setting)}
    tally.keep()
    results.put_table(store, f"scores/{name}.parquet", table, facts)
    return summary


def _pictures(dataset: Dataset, split: str, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """Images with the names of their labels, as lines of a table."""
    from PIL import Image

    rows, lines = dataset.splits[split][indices], []
    for index, row in zip(indices, rows, strict=True):
        image = dataset.images[row]
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
        lines.append(
            {
                "index": int(index),
                "label_name": dataset.class_names[dataset.labels[row]],
                "true_label_name": dataset.class_names[dataset.true_labels[row]],
                "png": buffer.getvalue(),
            }
        )
    return lines


# ---- influence -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InfluenceSummary:
    """What an estimate of influence came to: how many pairs, on how many test examples, and how stable they are."""

    influence_key: str
    scores_key: str
    models: int
    threshold: float
    memorization: float | None
    num_examples: int  # training examples looked at
    num_pairs: int
    num_test: int  # distinct test examples in the pairs
    num_above_zero: int  # pairs whose interval is above zero
    first_half: int | None  # pairs that half of the models find by themselves; None: too few models
    second_half: int | None
    both_halves: int | None


def influence(store: Store, spec: InfluenceSpec, dataset: Dataset) -> InfluenceSummary:
    """The stored summary of these pairs; pairs that are not there are found from the campaign's blocks."""
    name = f"influence/{key(spec)}.parquet"
    if store.exists(name):
        metadata = results.get_table(store, name).schema.metadata
        return InfluenceSummary(**json.loads(metadata[b"summary"]))
    scores(store, spec.scores, dataset)
    memorized = memorization_scores(store, spec.scores)
    examples = np.flatnonzero(memorized >= (-np.inf if spec.memorization is None else spec.memorization))
    membership, correct = _test_outcomes(store, spec.scores, dataset)
    is_first = np.arange(len(membership)) // BLOCK_SIZE % 2 == 0
    pairs = influence_pairs(membership, correct, is_first, examples=examples, threshold=spec.threshold)
    summary = InfluenceSummary(
        influence_key=key(spec),
        scores_key=key(spec.scores),
        models=len(membership),
        threshold=spec.threshold,
        memorization=spec.memorization,
        num_examples=len(examples),
        num_pairs=len(pairs.train),
        num_test=len(np.unique(pairs.test)),
        num_above_zero=int((pairs.estimates.low > 0).sum()),
        first_half=None if pairs.halves is None else pairs.halves.first,
        second_half=None if pairs.halves is None else pairs.halves.second,
        both_halves=None if pairs.halves is None else pairs.halves.both,
    )
    _put_pairs(store, summary, pairs, memorized, dataset)
    return summary


def _test_outcomes(store: Store, spec: ScoresSpec, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Membership bool [models, n], and correctness on test bool [models, m]."""
    name, models = key(spec.campaign), spec.blocks * BLOCK_SIZE
    membership = np.empty((models, len(dataset.splits["train"])), dtype=bool)
    correct = np.empty((models, len(dataset.splits["test"])), dtype=bool)

    def read(place: int) -> None:
        block = get_block(store, name, place, dataset, ["test"])
        rows = slice(place * BLOCK_SIZE, (place + 1) * BLOCK_SIZE)
        membership[rows], correct[rows] = block.membership, block.outputs["test"].correct

    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(read, range(spec.blocks)):
            pass
    return membership, correct


def _put_pairs(
    store: Store, summary: InfluenceSummary, pairs: InfluencePairs, memorized: np.ndarray, dataset: Dataset
) -> None:
    """Store the pairs, and the images of the strongest."""
    columns = {
        "train_index": pairs.train,
        "test_index": pairs.test,
        "train_label": dataset.split_labels("train")[pairs.train],
        "test_label": dataset.split_labels("test")[pairs.test],
        "influence": pairs.estimates.score,
        **{name: getattr(pairs.estimates, name) for name in ("standard_error", "low", "high")},
        "memorization": memorized[pairs.train],
    }
    lines = []
    for split, indices in (("train", pairs.train), ("test", pairs.test)):
        shown = list(dict.fromkeys(indices[:NUM_PAIRS_SHOWN].tolist()))
        lines += [{"split": split, **line} for line in _pictures(dataset, split, shown)]
    pictures = pa.Table.from_pylist(lines, schema=_SCHEMAS["influence_examples"])
    results.put_table(store, f"influence/{summary.influence_key}.examples.parquet", pictures)
    table = pa.table(columns).select(_SCHEMAS["influence_pairs"].names).cast(_SCHEMAS["influence_pairs"])
    facts = {"summary": json.dumps(asdict(summary))}
    results.put_table(store, f"influence/{summary.influence_key}.parquet", table, facts)
