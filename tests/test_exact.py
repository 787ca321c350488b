"""Exact scores: worked by hand on a learner that knows an example or does not; nothing is trained twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from jobs import exact as job
from jobs.memorize import Goal
from jobs.session import Options
from orchestrator import exact, pipeline, results
from orchestrator.arrays import unpack
from orchestrator.data import Dataset
from orchestrator.experiment import Context, Workspace
from orchestrator.models import MODELS
from orchestrator.pipeline import Lab
from orchestrator.recipes import RECIPES
from orchestrator.registry import Chosen, InputError
from orchestrator.specs import ExactSpec, Model, Setting, SingleSpec, TrainingSpec, key
from orchestrator.store import Store
from orchestrator.tasks import Task
from orchestrator.training import Training
from tests import golden
from tests.commands import run

SIZE, CLASSES = 12, 3
GIVEN: list[list[int]] = []  # the examples of every batch that was trained on
STARTS: list[float] = []  # what the first weight was in that batch


class Table(nn.Module):
    """One weight per pixel and class. Image i is black but for pixel i, so only example i moves the weights of its
    pixel: what it never saw it knows nothing of."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(spread * torch.randn(SIZE, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1)
        if self.training:
            GIVEN.append(sorted(pixels.argmax(dim=1).tolist()))
            STARTS.append(float(self.weight[0, 0].detach()))
        return pixels @ self.weight


def pixel_table(image_shape: tuple[int, int, int], num_classes: int, *, spread: float = 0.0) -> nn.Module:
    """A table that starts at zero, or at random."""
    return Table(spread)


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    MODELS(pixel_table)
    GIVEN.clear()
    STARTS.clear()
    yield
    del MODELS._entries["pixel_table"]


@pytest.fixture
def dataset() -> Dataset:
    """Twelve images of one bright pixel each (of 7: a dim one); labels go round, 4 has a wrong one. Two are a test."""
    brightness = np.where(np.arange(SIZE) == 7, 51, 255).astype(np.uint8)
    images = np.diag(brightness).reshape(SIZE, 3, 4, 1)
    true = np.arange(SIZE) % CLASSES
    labels = np.where(np.arange(SIZE) == 4, 2, true)
    splits = {"train": np.arange(SIZE), "validation": np.arange(0), "test": np.arange(2)}
    return Dataset(images, labels, true, splits, ("a", "b", "c"))


def setting(dataset: Dataset, **training: float) -> Setting:
    recipe = TrainingSpec(**{"learning_rate": 12.0, "epochs": 1, "batch_size": SIZE, "momentum": 0.0, **training})
    return Setting(data=dataset.fingerprint, model=Model(name="pixel_table"), training=recipe)


def trained(dataset: Dataset, store: Store, singles: Sequence[SingleSpec]) -> list[str | None]:
    workspace = Workspace(dataset, Context(store))
    return [workspace.perform(Task("single", single)).error for single in singles]


def test_exact_scores_equal_a_case_worked_by_hand(dataset: Dataset, tmp_path: Path) -> None:
    """One step of rate 12 over 12 examples moves the weights of an example's pixel by its gradient, 2/3 up for its
    label and 1/3 down for the others: e / (e + 2) of probability, where the unseen example keeps 1/3. Example 7 is a
    fifth as bright, so its logits are 1/25 as far apart. Of equal logits the lower class wins, so the unseen are right
    where their label is 0."""
    spec, store = ExactSpec(setting=setting(dataset), indices=(7, 4, 0), seeds=4), Store(str(tmp_path))
    assert trained(dataset, store, spec.singles) == [None] * 16
    name = exact.put_scores(store, spec, dataset, "top:3")
    lines = results.get_table(store, f"{exact.TABLES_FOLDER}/{name}.parquet").to_pylist()
    assert [(line["estimator"], line["index"]) for line in lines] == [
        (estimator, index) for estimator in ("correctness", "probability") for index in (0, 4, 7)
    ]
    assert [(line["label"], line["true_label"]) for line in lines[:3]] == [(0, 0), (2, 1), (1, 1)]
    assert [line["score"] for line in lines[:3]] == [0.0, 1.0, 1.0]
    assert [(line["in_mean"], line["out_mean"]) for line in lines[:2]] == [(1.0, 1.0), (1.0, 0.0)]
    assert {(line["num_in"], line["num_out"]) for line in lines} == {(4, 4)}
    for line in lines[3:]:
        odds = math.exp(1 / 25 if line["index"] == 7 else 1)
        assert line["in_mean"] == pytest.approx(odds / (odds + 2), abs=1e-3)
        assert line["out_mean"] == pytest.approx(1 / 3, abs=1e-6)
        assert line["high"] - line["low"] == pytest.approx(0, abs=1e-6)
    assert all(line["low"] <= line["score"] <= line["high"] for line in lines)
    # models with all examples know all; those without one know the other eleven
    single = unpack(store, exact.single_object(key(SingleSpec(setting=spec.setting, left_out=4, seed=1))))
    assert (single["accuracy"], single["correct"].tolist()) == (1.0, [False])
    assert single["test_accuracy"] == 1.0
    both = unpack(store, exact.single_object(key(SingleSpec(setting=spec.setting, left_out=None, seed=1))))
    assert both["correct"].all()
    assert both["probability"].shape == (SIZE,)


@pytest.mark.parametrize("batch_size", [12, 5, 4, 1])
def test_a_model_without_an_example_never_sees_it_and_both_sides_take_the_same_steps(
    dataset: Dataset, batch_size: int
) -> None:
    lab, training = Lab(dataset), Training(0.1, 30, batch_size)
    steps = []
    for left_out in (None, 0, 7, 11):
        GIVEN.clear()
        pipeline.train_single(lab, Chosen("pixel_table", {}), training, left_out, 3)
        everyone = set(range(SIZE)) - {left_out}
        assert {index for batch in GIVEN for index in batch} == everyone
        steps.append(len(GIVEN))
    assert steps == [30 * max(1, (SIZE - 1) // batch_size)] * 4


def test_no_two_trainings_start_alike(dataset: Dataset) -> None:
    lab, training, random = Lab(dataset), Training(0.1, 1, SIZE), Chosen("pixel_table", {"spread": 1.0})
    for left_out in (None, 0, 5):
        for seed in (0, 1):
            pipeline.train_single(lab, random, training, left_out, seed)
    pipeline.train_original(lab, random, training, 0)
    everyone = np.ones(SIZE, dtype=bool)
    pipeline.train_subset_model(
        lab, random, training, everyone, fraction=1.0, stream=pipeline.generator(0, "subset model", 0, 0)
    )
    assert len(set(STARTS)) == len(STARTS) == 8
    again = STARTS[0]
    pipeline.train_single(lab, random, training, None, 0)
    assert STARTS[-1] == again


def test_more_seeds_or_examples_reuse_what_is_there_and_equal_having_asked_at_once(
    dataset: Dataset, tmp_path: Path
) -> None:
    few = ExactSpec(setting=setting(dataset), indices=(3, 7), seeds=2)
    more = ExactSpec(setting=setting(dataset), indices=(7, 9, 3), seeds=3)
    assert len(few.singles) == 2 * 3
    assert {key(single) for single in few.singles} < {key(single) for single in more.singles}
    grown, whole = Store(str(tmp_path / "grown")), Store(str(tmp_path / "whole"))
    trained(dataset, grown, few.singles)
    missing = [single for single in more.singles if not grown.exists(exact.single_object(key(single)))]
    assert len(missing) == 3 * 4 - 2 * 3
    trained(dataset, grown, missing[::-1])
    trained(dataset, whole, more.singles)
    names = {exact.put_scores(store, more, dataset) for store in (grown, whole)}
    (name,) = names
    tables = [results.get_table(store, f"{exact.TABLES_FOLDER}/{name}.parquet") for store in (grown, whole)]
    assert tables[0].equals(tables[1])
    assert tables[0].num_rows == 6


def test_the_key_of_a_training_holds() -> None:
    """A key that changes makes every stored training a stranger."""
    setting = RECIPES["digits"].function().setting(golden.FINGERPRINT)
    assert key(SingleSpec(setting=setting, left_out=None, seed=0)) == "f08184c67c07b139e4f03d14e77a303b"
    assert key(SingleSpec(setting=setting, left_out=7, seed=1)) == "c941980660056ac1cf3c0d693bee4eb5"


def test_a_training_that_fails_is_an_attempt_that_says_which(dataset: Dataset, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    single = SingleSpec(setting=setting(dataset, learning_rate=1e30, epochs=9, weight_decay=1.0), left_out=3, seed=1)
    outcome = Workspace(dataset, Context(store)).perform(Task("single", single))
    assert outcome.label == "without example 3, seed 1"
    assert "try a smaller one" in str(outcome.error)
    (attempt,) = results.get_attempts(store)[key(single)]
    assert attempt.provenance["objects"] == [exact.single_object(key(single))]
    assert not store.exists(exact.single_object(key(single)))


# ---- which examples ------------------------------------------------------------------------------------------------

SCORES = np.array([0.0, 1.0, 0.1, 0.8, 0.1, 0.05, 0.45, 0.0])  # by rank: 1 3 6 2 4 5 0 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", (5,)),
        ("6,2, 0", (0, 2, 6)),
        ("top:3", (1, 3, 6)),
        ("top:4", (1, 2, 3, 6)),
        ("spread:2", (1, 7)),
        ("spread:3", (1, 4, 7)),  # ranks 0, 3.5 and 7; halves go to the even rank
        ("range:2", (0, 1)),
        ("range:3", (0, 1, 6)),
        ("range:5", (0, 1, 2, 3, 6)),  # .25 is as near to the first .1 as nothing else
    ],
)
def test_examples_are_chosen_as_by_hand(text: str, expected: tuple[int, ...]) -> None:
    assert exact.select(text, 8, lambda: SCORES) == expected


def test_equal_scores_give_distinct_examples() -> None:
    for rule in exact.RULES:
        assert len(set(exact.select(f"{rule}:5", 8, lambda: np.zeros(8)))) == 5


@pytest.mark.parametrize(("name", "text"), [("mine.txt", "6\n2 0"), ("mine.csv", "index\n6\n2\n0\n")])
def test_a_file_of_indices_is_read(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert exact.select(str(path), 8, lambda: SCORES) == (0, 2, 6)


def test_bad_indices_are_refused_in_a_sentence_before_scores_are_asked_for(tmp_path: Path) -> None:
    def none() -> np.ndarray:
        raise AssertionError

    words = tmp_path / "words.txt"
    words.write_text("one two")
    for text, said in (
        ("3,3", "index 3 twice"),
        ("2,8", "has the index 8; allowed: 0 to 7"),
        ("-1", "has the index -1"),
        ("1-3", "allowed: training indices such as"),
        ("", "allowed: training indices such as"),
        (",", "has 0 indices"),
        ("top:0", "top:N with N from 1 to 7"),
        ("spread:8", "spread:N with N from 1 to 7"),
        ("range:many", "range:N with N from 1 to 7"),
        ("best:3", "a file of them, top:N, spread:N, range:N"),
        ("/nowhere.txt", "a file of them"),
        (str(words), "'one' is not a whole number"),
    ):
        with pytest.raises(InputError) as refused:
            exact.select(text, 8, none)
        assert said in str(refused.value), text
        assert "\n" not in str(refused.value)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_stores_exports_and_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "training.epochs=1", "--storage", str(tmp_path)]
    done = run("memorize", "digits", *words, "--exact", "3,57", "--exact-seeds", "2", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 models trained" in done.stdout
    assert "2 examples: 2 models trained with all examples, and 2 without each one" in done.stdout
    lines = pq.read_table(tmp_path / "exports" / "exact.parquet").to_pylist()
    assert [(line["index"], line["num_in"], line["num_out"], line["selection"]) for line in lines] == [
        (index, 2, 2, "given") for _ in range(2) for index in (3, 57)
    ]
    options = Options("digits", ["training.epochs=1"], str(tmp_path), "none")
    capsys.readouterr()
    job.run(replace(options, dry_run=True), "3,57,99", 3, Goal())
    assert "6 in the store, 6 to train" in capsys.readouterr().out
    job.run(options, "3,57", 2, Goal())
    assert "0 models trained" in capsys.readouterr().out
    for asked, goal, said in (
        ("top:3", Goal(), "200 subset models are missing; `unlearn memorize digits`"),
        ("1200", Goal(), "allowed: 0 to 1199"),
        ("3", Goal(standard_error=0.1), "leave out --target-se"),
    ):
        with pytest.raises(InputError, match=said):
            job.run(options, asked, 2, goal)
    damaged = next((tmp_path / "exact" / "models").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:99])
    with pytest.raises(InputError, match=f"{damaged.name} is damaged"):
        job.run(options, "3,57", 3, Goal())
