"""What a campaign's blocks come to: memorization scores, their summary, and pictures of the most memorized."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator import results
from orchestrator.data import Dataset
from orchestrator.experiment import Task
from orchestrator.memorization import (
    BLOCK_SIZE,
    Counts,
    Tallied,
    count,
    estimate,
    moments,
    split_half_correlation,
    top_overlap,
)
from orchestrator.proxies import log_probabilities
from orchestrator.schemas import TABLES
from orchestrator.specs import CampaignSpec, Estimator, ScoresSpec, key
from orchestrator.store import Store

NUM_PICTURES = 25  # images of the most memorized examples kept with the scores, for the report

_SCHEMAS = {name: TABLES[name].remove(0) for name in ("memorization", "examples")}


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
    name = f"scores/{key(spec)}.parquet"
    if not store.exists(name):
        return _compute_scores(store, spec, dataset)
    metadata = results.get_table(store, name).schema.metadata or {}
    if b"setting" not in metadata:  # from before scores said what they are of
        return _compute_scores(store, spec, dataset)
    return ScoresSummary(**json.loads(metadata[b"summary"]))


@dataclass
class Tally:
    """What the blocks of a campaign add up to, read one after another; even and odd ones are its halves."""

    store: Store
    campaign: CampaignSpec
    dataset: Dataset
    estimator: Estimator = "correctness"
    blocks: int = 0
    _halves: list[Tallied | None] = field(default_factory=lambda: [None, None])
    _correct: Counts | None = None
    _test: list[float] = field(default_factory=list)
    _seconds: float = 0.0

    def add(self) -> None:
        """Read the next block from the store."""
        arrays = results.unpack(self.store, Task("block", self.campaign, self.blocks).object_name)
        labels, membership = self.dataset.split_labels("train"), arrays["membership"].astype(bool)
        correct = count(membership, arrays["train"].argmax(axis=2) == labels)
        self._correct = correct if self._correct is None else self._correct + correct
        half: Any = correct
        if self.estimator == "probability":
            half = moments(membership, np.stack([_label_probabilities(part, labels) for part in arrays["train"]]))
        before: Any = self._halves[self.blocks % 2]
        self._halves[self.blocks % 2] = half if before is None else before + half
        self._test.append(float(arrays["test_accuracy"].mean()))
        self._seconds += float(arrays["seconds"].sum())
        self.blocks += 1

    @property
    def can_estimate(self) -> bool:
        """Whether every example was in and out of enough models: one each, for probabilities two."""
        held_out = BLOCK_SIZE - round(self.campaign.fraction * BLOCK_SIZE)
        fewest = self.blocks * min(held_out, BLOCK_SIZE - held_out)
        return fewest >= (2 if self.estimator == "probability" else 1)

    @property
    def seconds(self) -> float:
        """What the models took, in all."""
        return self._seconds

    @property
    def total(self) -> Tallied:
        first: Any
        second: Any
        first, second = self._halves
        assert first is not None, "no block was read"
        total: Tallied = first if second is None else first + second
        return total

    @property
    def spec(self) -> ScoresSpec:
        return ScoresSpec(campaign=self.campaign, blocks=self.blocks, estimator=self.estimator)

    def summary(self) -> ScoresSummary:
        """What the blocks read so far come to."""
        assert self._correct is not None, "no block was read"
        scores, fit, (first, second) = estimate(self.total), estimate(self._correct), self._halves
        hard = fit.out_mean < 0.5  # the gate is of accuracy, whatever the scores are made of
        return ScoresSummary(
            scores_key=key(self.spec),
            models=self.blocks * BLOCK_SIZE,
            in_accuracy=float(self._correct.in_hits.sum() / self._correct.in_total.sum()),
            hard_in_accuracy=float(fit.in_mean[hard].mean()) if hard.any() else None,
            test_accuracy=float(np.mean(self._test)),
            split_half=None if first is None or second is None else split_half_correlation(first, second),
            model_seconds=self._seconds,
            standard_error=float(scores.standard_error.mean()),
            top_overlap=None if first is None or second is None else top_overlap(first, second),
            estimator=self.estimator,
        )


def _label_probabilities(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The given label's probability, float64 [n], from logits [n, classes]."""
    found: np.ndarray = np.exp(log_probabilities(logits)[np.arange(len(labels)), labels])
    return found


def _compute_scores(store: Store, spec: ScoresSpec, dataset: Dataset) -> ScoresSummary:
    tally = Tally(store, spec.campaign, dataset, spec.estimator)
    for _ in range(spec.blocks):
        tally.add()
    return put_scores(tally)


def put_scores(tally: Tally, stopping: str | None = None) -> ScoresSummary:
    """Estimate scores from the blocks read, store them with the images of the most memorized, and sum up.

    `stopping` says which target the scores met where that ended the campaign: their intervals are then nominal.
    """
    store, dataset, summary = tally.store, tally.dataset, replace(tally.summary(), stopping=stopping)
    labels, scores = dataset.split_labels("train"), estimate(tally.total)
    true_labels = dataset.split_true_labels("train")
    columns = {"index": np.arange(len(labels)), "label": labels, "true_label": true_labels, **vars(scores)}
    table = pa.table(columns).select(_SCHEMAS["memorization"].names).cast(_SCHEMAS["memorization"])
    most = np.argsort(-scores.score, kind="stable")[:NUM_PICTURES]
    name = summary.scores_key
    results.put_table(store, f"scores/{name}.examples.parquet", _pictures(dataset, most))
    facts = {"summary": json.dumps(asdict(summary)), "setting": key(tally.campaign.setting)}
    results.put_table(store, f"scores/{name}.parquet", table, facts)
    return summary


def _pictures(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> pa.Table:
    from PIL import Image

    rows, lines = dataset.splits["train"][indices], []
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
    return pa.Table.from_pylist(lines, schema=_SCHEMAS["examples"])
