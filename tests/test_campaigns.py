"""Scores from stored blocks: whatever form they have, and whether they are read at once or as a campaign grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from analysis import influence as analysis
from analysis import load, report
from jobs import influence as job
from jobs.session import Options, make_study
from orchestrator import campaigns, export, results
from orchestrator.arrays import pack
from orchestrator.blocks import block_name, get_block
from orchestrator.data import Dataset
from orchestrator.memorization import block_membership
from orchestrator.registry import InputError
from orchestrator.specs import CampaignSpec, InfluenceSpec, Model, ScoresSpec, Setting, TrainingSpec, key
from orchestrator.store import Store
from orchestrator.subset_outputs import packed

TRAIN, TEST = 60, 40


def data(classes: int) -> Dataset:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, TRAIN + TEST)
    images = rng.integers(0, 256, (TRAIN + TEST, 4, 4, 1)).astype(np.uint8)
    splits = {"train": np.arange(TRAIN), "validation": np.arange(0), "test": np.arange(TRAIN, TRAIN + TEST)}
    return Dataset(images, labels, labels, splits, tuple(f"class {number}" for number in range(classes)))


def campaign_of(dataset: Dataset) -> CampaignSpec:
    training = TrainingSpec(learning_rate=0.1, epochs=1, batch_size=8)
    return CampaignSpec(setting=Setting(data=dataset.fingerprint, model=Model(name="small_cnn"), training=training))


def put_blocks(
    store: Store,
    dataset: Dataset,
    blocks: range,
    *,
    whole: bool = False,
    campaign: CampaignSpec | None = None,
    helpful: Sequence[int] = (),
) -> None:
    """Made blocks: logits are higher for the label, more so where an example is in the subset.

    Test example j is wrong outside, and right inside the subsets of the training example `helpful[j]`, which outside
    is wrong itself.
    """
    campaign, classes = campaign or campaign_of(dataset), dataset.num_classes
    labels = {split: dataset.split_labels(split) for split in ("train", "test")}
    for block in blocks:
        membership = block_membership(labels["train"], campaign.fraction, 0, block)
        arrays: dict[str, list[np.ndarray]] = {"in_accuracy": [], "test_accuracy": [], "seconds": []}
        for member in range(10):
            rng = np.random.default_rng([block, member])
            for split in ("train", "test"):
                logits = rng.normal(0, 1, (len(labels[split]), classes))
                lift = 2.0 + 3.0 * membership[member] if split == "train" else 2.5
                logits[np.arange(len(logits)), labels[split]] += lift
                places = np.arange(len(helpful)) if split == "test" else np.array(helpful, dtype=int)
                is_in = membership[member, np.array(helpful, dtype=int)]
                logits[places, labels[split][places]] = np.where(is_in, 50.0, -50.0)
                halves = logits.astype(np.float16)
                for name, part in ({split: halves} if whole else packed(split, halves, labels[split])).items():
                    arrays.setdefault(name, []).append(part)
            for name, value in (("in_accuracy", 0.99), ("test_accuracy", 0.5 + block / 100), ("seconds", 1.5)):
                arrays[name].append(np.array(value))
        stacked = {name: np.stack(parts) for name, parts in arrays.items()}
        content = pack({"membership": membership, **stacked}, {"host": "elsewhere", "numerics": "cpu"})
        store.put(block_name(key(campaign), block), content)


def table(store: Store, spec: ScoresSpec) -> bytes:
    return store.get(f"scores/{key(spec)}.parquet")


@pytest.mark.parametrize("estimator", ["correctness", "probability"])
def test_a_grown_campaign_reads_the_new_blocks_alone_and_ends_at_the_same_bytes(estimator: str, tmp_path: Path) -> None:
    dataset, grown, at_once = data(5), Store(str(tmp_path / "grown")), Store(str(tmp_path / "at once"))
    campaign = campaign_of(dataset)
    small, large = (ScoresSpec(campaign=campaign, blocks=blocks, estimator=estimator) for blocks in (3, 21))
    put_blocks(grown, dataset, range(3))
    campaigns.scores(grown, small, dataset)
    for block in range(3):
        grown.delete(block_name(key(campaign), block))
    put_blocks(grown, dataset, range(3, 21))
    put_blocks(at_once, dataset, range(21))
    summary = campaigns.scores(grown, large, dataset)
    assert summary == campaigns.scores(at_once, large, dataset)
    assert table(grown, large) == table(at_once, large)
    assert (summary.models, summary.model_seconds) == (210, pytest.approx(315))
    assert summary.test_accuracy == pytest.approx(0.6)
    assert campaigns.scores(at_once, small, dataset).models == 30, "what is kept of more blocks is not used for fewer"


@pytest.mark.parametrize("estimator", ["correctness", "probability"])
def test_scores_of_many_classes_are_those_of_their_logits(estimator: str, tmp_path: Path) -> None:
    dataset = data(30)
    spec = ScoresSpec(campaign=campaign_of(dataset), blocks=4, estimator=estimator)
    found = []
    for whole in (True, False):
        store = Store(str(tmp_path / str(whole)))
        put_blocks(store, dataset, range(4), whole=whole)
        campaigns.scores(store, spec, dataset)
        found.append(results.get_table(store, f"scores/{key(spec)}.parquet").column("score").to_numpy())
    assert np.ptp(found[0]) > 0.1
    assert found[1] == pytest.approx(found[0], abs=0 if estimator == "correctness" else 1e-3)


def test_a_block_from_before_models_said_where_they_were_made_is_read(tmp_path: Path) -> None:
    dataset, store = data(5), Store(str(tmp_path))
    put_blocks(store, dataset, range(1))
    block = get_block(store, key(campaign_of(dataset)), 0, dataset, ["train"])
    assert {(model.host, model.stream, model.seconds) for model in block.models} == {(None, None, 1.5)}


@pytest.mark.parametrize("length", [0, 4, 100, 9000, -1])
def test_a_block_that_is_cut_is_named(length: int, tmp_path: Path) -> None:
    dataset, store = data(5), Store(str(tmp_path))
    put_blocks(store, dataset, range(1))
    name = block_name(key(campaign_of(dataset)), 0)
    store.put(name, store.get(name)[:length] if length else b"\xff" * 9000)
    with pytest.raises(InputError, match=r"0\.safetensors is damaged"):
        get_block(store, key(campaign_of(dataset)), 0, dataset, ["train", "test"])


def _by_halves(store: Store, spec: InfluenceSpec, dataset: Dataset) -> tuple[int | None, int | None]:
    """How many pairs of at least .1 even and odd blocks find; the estimate is removed again."""
    loose = spec.model_copy(update={"threshold": 0.1, "memorization": None})
    found = campaigns.influence(store, loose, dataset)
    for ending in (".parquet", ".examples.parquet"):
        store.delete(f"influence/{key(loose)}{ending}")
    return found.first_half, found.second_half


def test_influence_goes_from_the_blocks_to_the_report(tmp_path: Path) -> None:
    """Three test examples are right only with one training example each, two of them with the same."""
    dataset, store = data(5), Store(str(tmp_path))
    put_blocks(store, dataset, range(12), helpful=[7, 9, 7])
    spec = InfluenceSpec(scores=ScoresSpec(campaign=campaign_of(dataset), blocks=12), threshold=0.6, memorization=0.9)
    summary = campaigns.influence(store, spec, dataset)
    assert (summary.num_examples, summary.num_pairs, summary.num_test, summary.num_above_zero) == (2, 3, 3, 3)
    assert (summary.first_half, summary.second_half, summary.both_halves) == (3, 3, 3)
    blocks = [get_block(store, key(campaign_of(dataset)), number, dataset, ["test"]) for number in range(12)]
    for number, count in enumerate(_by_halves(store, spec, dataset)):
        half = blocks[number::2]
        inside = np.concatenate([block.membership for block in half]).astype(float)
        right = np.concatenate([block.outputs["test"].correct for block in half]).astype(float)
        outside = 1 - inside
        differences = inside.T @ right / inside.sum(0)[:, None] - outside.T @ right / outside.sum(0)[:, None]
        assert count == (differences >= 0.1 - 1e-12).sum()
    store.delete(block_name(key(campaign_of(dataset)), 0))
    assert campaigns.influence(store, spec, dataset) == summary, "what is stored is not computed again"
    export.export(store)
    read = load.load(tmp_path / "exports")
    (line,) = read.influence.to_dicts()
    assert (line["threshold"], line["memorization"], line["scores_key"]) == (0.6, 0.9, key(spec.scores))
    pairs = read.influence_pairs.to_dicts()
    assert [(pair["train_index"], pair["test_index"]) for pair in pairs] == [(7, 0), (7, 2), (9, 1)]
    assert [pair["influence"] for pair in pairs] == [1.0] * 3
    assert [pair["memorization"] for pair in pairs] == [1.0] * 3
    assert pairs[2]["train_label"] == dataset.labels[9]
    shown = {(line["split"], line["index"]) for line in read.influence_examples.to_dicts()}
    assert shown == {("train", 7), ("train", 9), ("test", 0), ("test", 1), ("test", 2)}
    (section,) = analysis.sections(read)
    assert section["jaccard"] == 1.0
    text = report.write(tmp_path / "exports", tmp_path / "report.html").read_text()
    assert "3 pairs have an influence of at least 0.6" in text
    assert "Training images beside the test images" in text


def test_the_command_needs_every_model_and_names_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options("digits", ("campaign.models=40",), str(tmp_path), "none")
    with pytest.raises(InputError, match=r"40 subset models .* 40 are missing; `unlearn memorize digits`"):
        job.run(options, job.Bounds(0.15, 0.25))
    study = make_study(options)
    dataset = study.data.entry({}, study.data.options)
    campaign = study.campaign_spec(dataset.fingerprint)
    put_blocks(Store(str(tmp_path)), dataset, range(4), campaign=campaign, helpful=[1100, 5])
    job.run(options, job.Bounds(0.9, -1))
    said = " ".join(capsys.readouterr().out.split())
    assert "from 40 models: 2 pairs of at least 0.9 among 1200 training examples, on 2 test examples" in said
    assert "both 2 (Jaccard" in said, said
    for train, test in ((1100, 0), (5, 1)):
        labels = dataset.split_labels("train")[train], dataset.split_labels("test")[test]
        assert f"{train} {labels[0]} 1.00 {test} {labels[1]} 1.000" in said


def test_halves_that_left_an_example_out_once_have_no_correlation_of_probabilities(tmp_path: Path) -> None:
    dataset, store = data(4), Store(str(tmp_path))
    campaign = campaign_of(dataset).model_copy(update={"fraction": 0.9})
    put_blocks(store, dataset, range(4), campaign=campaign)
    found = {}
    for blocks in (2, 3, 4):
        spec = ScoresSpec(campaign=campaign, blocks=blocks, estimator="probability")
        found[blocks] = campaigns.scores(store, spec, dataset)
    assert [found[blocks].split_half is None for blocks in (2, 3, 4)] == [True, True, False]
    assert found[2].standard_error is not None
    of_counts = campaigns.scores(store, ScoresSpec(campaign=campaign, blocks=2), dataset)
    assert of_counts.split_half is not None


def test_scores_that_are_there_stay_as_they_are_and_what_they_say_of_stopping(tmp_path: Path) -> None:
    dataset = data(4)
    for first, second in (("a target", None), (None, "a target")):
        store = Store(str(tmp_path / str(first)))
        put_blocks(store, dataset, range(2))
        for stopping in (first, second):
            tally = campaigns.Tally(store, campaign_of(dataset), dataset)
            tally.add(2)
            assert campaigns.put_scores(tally, stopping).stopping == first
        assert campaigns.scores(store, tally.spec, dataset).stopping == first
