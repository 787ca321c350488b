import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from orchestrator.data import DATASETS, Dataset, SplitOutputs, stratified_split
from orchestrator.data.embedded import digits
from orchestrator.data.parquet import image_parquet
from orchestrator.registry import InputError

# ---- outputs -------------------------------------------------------------------------------------------------------


def test_probabilities_equal_those_of_torch() -> None:
    logits = np.random.default_rng(0).normal(0, 8, (50, 7)).astype(np.float16)
    labels = np.arange(50) % 7
    split = SplitOutputs(logits, labels, labels)
    expected = torch.softmax(torch.tensor(logits).double(), dim=1).numpy()
    assert np.exp(split.log_probabilities) == pytest.approx(expected, rel=1e-12)
    assert split.confidences == pytest.approx(expected[np.arange(50), labels], rel=1e-12)


def test_ties_are_predicted_as_the_lower_class() -> None:
    labels = np.zeros(2, dtype=np.int64)
    split = SplitOutputs(np.array([[1, 3, 3], [2, 2, 1]], dtype=np.float16), labels, labels)
    assert split.predictions.tolist() == [1, 0]


def test_the_largest_float16_logits_give_finite_probabilities() -> None:
    labels = np.array([0, 1])
    split = SplitOutputs(np.array([[65504, -65504], [65504, -65504]], dtype=np.float16), labels, labels)
    assert split.confidences.tolist() == [1.0, 0.0]
    assert np.isfinite(split.log_probabilities).all()


# ---- splits --------------------------------------------------------------------------------------------------------


def is_proportional(labels: np.ndarray, rows: np.ndarray) -> bool:
    """Each class within one example of its share."""
    share = len(rows) / len(labels)
    counts = np.bincount(labels[rows], minlength=labels.max() + 1)
    return bool((np.abs(counts - share * np.bincount(labels)) <= 1 + 1e-9).all())


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_are_split_as_documented(seed: int) -> None:
    dataset = digits(seed=seed)
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {"train": 1200, "validation": 197, "test": 400}
    assert sorted(np.concatenate(list(dataset.splits.values()))) == list(range(1797))
    for rows in (dataset.splits["train"], dataset.splits["test"]):
        assert (np.diff(rows) > 0).all()
        assert is_proportional(dataset.labels, rows)
    assert dataset.image_shape == (1, 8, 8)
    assert dataset.num_classes == 10


def test_digits_are_those_of_scikit_learn() -> None:
    dataset, bunch = digits(), load_digits()
    assert (dataset.labels == bunch.target).all()
    assert np.abs(dataset.images[..., 0] / 255 * 16 - bunch.images).max() <= 0.5 / 255 * 16
    assert (dataset.images.min(), dataset.images.max()) == (0, 255)
    examples = dataset.examples("test")
    assert (examples.labels.numpy() == bunch.target[dataset.splits["test"]]).all()
    assert (examples.images.numpy() == dataset.images[dataset.splits["test"]]).all()


@pytest.mark.parametrize("sizes", [{"a": 7, "b": 3, "c": 0}, {"a": 0, "b": 1}, {"a": 10}, {"a": 9, "b": 1, "c": 0}])
@pytest.mark.filterwarnings("error")
def test_splits_are_disjoint_and_as_large_as_asked(sizes: dict[str, int]) -> None:
    labels = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    splits = stratified_split(labels, sizes, np.random.default_rng(0))
    assert {name: len(rows) for name, rows in splits.items()} == sizes
    drawn = np.concatenate(list(splits.values()))
    assert len(np.unique(drawn)) == len(drawn)


@pytest.mark.parametrize("sizes", [{"a": 8, "b": 3}, {"a": -1, "b": 3}])
def test_splits_that_cannot_be_drawn_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="there are 10"):
        stratified_split(np.zeros(10, dtype=np.int64), sizes, np.random.default_rng(0))


# ---- label noise ---------------------------------------------------------------------------------------------------


def test_noise_flips_the_share_asked_in_the_training_part_only() -> None:
    clean, noisy = digits(seed=4), digits(label_noise=0.05, seed=4)
    flipped = np.flatnonzero(noisy.labels != noisy.true_labels)
    assert len(flipped) == 60  # 5 % of 1,200; every one to a wrong class, or fewer would differ
    assert np.isin(flipped, noisy.splits["train"]).all()
    assert (noisy.true_labels == clean.labels).all()
    assert set(noisy.labels[flipped]) <= set(range(10))
    assert all((noisy.splits[name] == clean.splits[name]).all() for name in clean.splits)


def test_noise_is_seeded_and_reaches_every_wrong_class() -> None:
    first, again, other = (digits(label_noise=0.5, seed=seed) for seed in (1, 1, 2))
    assert (first.labels == again.labels).all()
    assert (first.labels != other.labels).any()
    flipped = first.labels != first.true_labels
    offsets = (first.labels - first.true_labels)[flipped] % 10
    counts = np.bincount(offsets, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 0.6 * 600 / 9
    assert counts[1:].max() < 1.5 * 600 / 9


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_noise_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="label_noise"):
        digits(label_noise=fraction)


# ---- the fingerprint -----------------------------------------------------------------------------------------------


def small() -> Dataset:
    labels = np.array([0, 1, 0, 1])
    splits = {"train": np.array([0, 1]), "validation": np.array([2]), "test": np.array([3])}
    images = np.arange(16, dtype=np.uint8).reshape(4, 2, 2, 1)
    return Dataset(images, labels, labels.copy(), splits, ("a", "b"))


def test_the_fingerprint_is_stable() -> None:
    assert small().fingerprint == small().fingerprint
    # pinned: a change of the hashing would make every stored result a stranger
    assert small().fingerprint == "e08d98658bec1a1a2b662d3332ce3884038067f045a806388e14358e5dc010f8"
    fortran = replace(small(), images=np.asfortranarray(small().images))
    assert fortran.fingerprint == small().fingerprint
    assert replace(small(), class_names=("x", "y")).fingerprint == small().fingerprint


def changed(dataset: Dataset, part: str) -> Dataset:
    if part in dataset.splits:
        return replace(dataset, splits={**dataset.splits, part: dataset.splits[part][::-1] * 1 + (part != "train")})
    array = getattr(dataset, part).copy()
    array.flat[-1] ^= 1
    return replace(dataset, **{part: array})


@pytest.mark.parametrize("part", ["images", "labels", "true_labels", "train", "validation", "test"])
def test_the_fingerprint_feels_every_part(part: str) -> None:
    assert changed(small(), part).fingerprint != small().fingerprint


def test_the_fingerprint_tells_shapes_apart() -> None:
    wide = replace(small(), images=small().images.reshape(4, 1, 4, 1))
    assert wide.fingerprint != small().fingerprint


# ---- Parquet -------------------------------------------------------------------------------------------------------


def png(image: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="PNG")
    return sink.getvalue()


def pictures(count: int, seed: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write(
    path: Path,
    contents: list[Any],
    labels: list[Any],
    names: tuple[str, str] = ("image", "label"),
    metadata: dict[bytes, bytes] | None = None,
) -> str:
    cells = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]
    table = pa.table({names[0]: cells, names[1]: labels}).replace_schema_metadata(metadata)
    pq.write_table(table, path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    train = write(tmp_path / "train.parquet", [png(p) for p in pictures(30, 0)], [i % 3 for i in range(30)])
    return train, write(tmp_path / "test.parquet", [png(p) for p in pictures(12, 1)], [i % 3 for i in range(12)])


@pytest.mark.parametrize("names", [("image", "label"), ("img", "labels"), ("img", "label")])
def test_images_come_back_as_they_were_written(tmp_path: Path, names: tuple[str, str]) -> None:
    train_images, test_images = pictures(6, 0), pictures(4, 1)
    train = write(tmp_path / "a.parquet", [png(p) for p in train_images], [0, 1, 0, 1, 2, 2], names)
    test = write(tmp_path / "b.parquet", [png(p) for p in test_images], [2, 1, 0, 0], names)
    dataset = image_parquet(train=train, test=test)
    assert (dataset.images == np.concatenate([train_images, test_images])).all()
    assert dataset.labels.tolist() == [0, 1, 0, 1, 2, 2, 2, 1, 0, 0]
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {
        "train": [0, 1, 2, 3, 4, 5],
        "validation": [],
        "test": [6, 7, 8, 9],
    }
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.image_shape == (3, 4, 4)


def test_plain_bytes_and_grey_images_are_read(tmp_path: Path) -> None:
    grey = pictures(2, 0)[..., 0]
    pq.write_table(pa.table({"image": [png(p) for p in grey], "label": [0, 1]}), tmp_path / "grey.parquet")
    path = str(tmp_path / "grey.parquet")
    assert (image_parquet(train=path, test=path).images[:2] == grey[..., None].repeat(3, axis=-1)).all()


def test_class_names_are_taken_from_the_metadata(tmp_path: Path) -> None:
    published = b'{"info": {"features": {"label": {"names": ["cat", "dog", "emu"]}, "image": {}}}}'
    contents, labels = [png(p) for p in pictures(3, 0)], [0, 1, 2]
    for text, expected in ((published, ("cat", "dog", "emu")), (b"{", ("0", "1", "2")), (b"[]", ("0", "1", "2"))):
        path = write(tmp_path / "named.parquet", contents, labels, metadata={b"huggingface": text})
        assert image_parquet(train=path, test=path).class_names == expected


def test_subsets_are_stratified_seeded_and_disjoint(files: tuple[str, str]) -> None:
    sizes = {"num_train": 12, "num_validation": 6, "num_test": 6}

    def drawn(seed: int) -> Dataset:
        return image_parquet(train=files[0], test=files[1], seed=seed, **sizes)  # type: ignore[arg-type]

    first = drawn(0)
    assert first.fingerprint == drawn(0).fingerprint != drawn(1).fingerprint
    assert [len(first.splits[name]) for name in ("train", "validation", "test")] == [12, 6, 6]
    for name, per_class in (("train", 4), ("validation", 2), ("test", 2)):
        assert np.bincount(first.split_labels(name)).tolist() == [per_class] * 3
    sources = {p.tobytes(): i for i, p in enumerate(pictures(30, 0))}
    rows = [sources[image.tobytes()] for image in first.images[:18]]
    assert len(set(rows)) == 18
    assert [row % 3 for row in rows] == first.labels[:18].tolist(), "an image lost its label"


def test_all_but_the_validation_examples_are_trained_on(files: tuple[str, str]) -> None:
    dataset = image_parquet(train=files[0], test=files[1], num_validation=9, label_noise=0.2)
    assert [len(dataset.splits[name]) for name in ("train", "validation", "test")] == [21, 9, 12]
    assert np.flatnonzero(dataset.labels != dataset.true_labels).max() < 21
    assert (dataset.labels != dataset.true_labels).sum() == 4


Arguments = dict[str, Any]


def broken(tmp_path: Path, how: str) -> tuple[Arguments, str]:
    """Arguments for image_parquet that cannot work, and what the error has to name."""
    good = [png(p) for p in pictures(6, 0)]
    labels: list[Any] = [0, 1, 2, 0, 1, 2]
    whole = write(tmp_path / "whole.parquet", good, labels)
    bad = str(tmp_path / "bad.parquet")
    arguments: Arguments = {"train": bad, "test": whole}
    if how == "missing":
        return arguments, "does not exist"
    if how == "truncated":
        Path(bad).write_bytes(Path(whole).read_bytes()[:-50])
        return arguments, "not a readable Parquet file"
    if how == "not parquet":
        Path(bad).write_bytes(b"label,image\n")
        return arguments, "not a readable Parquet file"
    if how == "no rows":
        pq.write_table(pq.read_table(whole).slice(0, 0), bad)
        return arguments, "no rows"
    if how in ("no image column", "no label column"):
        names = ("picture", "label") if "image" in how else ("image", "target")
        write(Path(bad), good, labels, names)
        return arguments, r"columns (picture, label|image, target); one of (image, img|label, labels) is needed"
    if how == "undecodable":
        write(Path(bad), [*good[:4], b"no image", good[5]], labels)
        return arguments, "image 4 of .* cannot be decoded"
    if how == "cut short":
        write(Path(bad), [*good[:5], good[5][:-30]], labels)
        return arguments, "image 5 of .* cannot be decoded"
    if how == "absent bytes":
        write(Path(bad), [None, *good[1:]], labels)
        return arguments, "image 0 of .* cannot be decoded"
    if how == "mixed sizes":
        write(Path(bad), [*good[:5], png(pictures(1, 0, size=5)[0])], labels)
        return arguments, "image 5 of .* one size"
    if how == "test of another size":
        write(Path(bad), [png(p) for p in pictures(6, 0, size=5)], labels)
        return {"train": whole, "test": bad}, "one size"
    if how in ("negative labels", "null labels", "text labels"):
        given = {"negative labels": -1, "null labels": None, "text labels": "2"}[how]
        write(Path(bad), good, ["0"] * 5 + ["2"] if given == "2" else [*labels[:5], given])
        return arguments, "labels of .* allowed: whole numbers"
    if how == "too many asked":
        return {"train": whole, "test": whole, "num_train": 5, "num_validation": 2}, "there are 6"
    if how == "more validation than there is":
        return {"train": whole, "test": whole, "num_validation": 7}, "negative size"
    assert how == "no test examples"
    return {"train": whole, "test": whole, "num_test": 0}, "allowed: 1 or more"


BREAKAGES = [
    "missing",
    "truncated",
    "not parquet",
    "no rows",
    "no image column",
    "no label column",
    "undecodable",
    "cut short",
    "absent bytes",
    "mixed sizes",
    "test of another size",
    "negative labels",
    "null labels",
    "text labels",
    "too many asked",
    "more validation than there is",
    "no test examples",
]


@pytest.mark.parametrize("how", BREAKAGES)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path: Path, how: str) -> None:
    arguments, said = broken(tmp_path, how)
    with pytest.raises(InputError, match=said) as caught:
        image_parquet(**arguments)
    assert "\n" not in str(caught.value)


def test_no_damage_to_an_image_gives_another_error(tmp_path: Path) -> None:
    """Every byte of a PNG changed in turn, and every length: decoded after all, or refused in our own words."""
    content = png(pictures(1, 0)[0])
    damaged = [content[:i] for i in range(len(content))]
    damaged += [content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :] for i in range(len(content))]
    refused = 0
    for number, piece in enumerate(damaged):
        path = write(tmp_path / f"{number}.parquet", [piece], [0])
        try:
            image_parquet(train=path, test=path)
        except InputError:
            refused += 1
    assert refused > len(content)


def test_options_are_checked_as_those_of_any_entry() -> None:
    with pytest.raises(InputError, match="needs the option test"):
        DATASETS["image_parquet"].resolve({"train": "a.parquet"})


# ---- real images ---------------------------------------------------------------------------------------------------

FOLDER = Path(os.environ.get("UNLEARN_TEST_DATA") or Path(__file__).resolve().parents[1] / "../shared/data").resolve()
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.skipif(
    not (FOLDER / "cifar10-train.parquet").is_file(), reason=f"no CIFAR-10 in {FOLDER} (set UNLEARN_TEST_DATA)"
)
def test_cifar10_is_read() -> None:
    train, test = (str(FOLDER / f"cifar10-{part}.parquet") for part in ("train", "test"))
    dataset = image_parquet(train=train, test=test, num_train=5000, num_validation=500, num_test=500, label_noise=0.05)
    assert dataset.images.shape == (6000, 32, 32, 3)
    for name, per_class in (("train", 500), ("validation", 50), ("test", 50)):
        assert np.bincount(dataset.true_labels[dataset.splits[name]]).tolist() == [per_class] * 10
    assert (dataset.labels != dataset.true_labels).sum() == 250
    assert dataset.class_names in (CIFAR10, tuple(map(str, range(10))))
    channels = dataset.images.reshape(-1, 3).mean(axis=0) / 255
    assert channels == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.015)  # the published channel means
    assert len(np.unique(dataset.images.reshape(6000, -1), axis=0)) > 5990
    blue = dataset.images[..., 2].astype(float).mean(axis=(1, 2)) - dataset.images[..., 0].mean(axis=(1, 2))
    by_class = [blue[dataset.true_labels == label].mean() for label in range(10)]
    assert {int(label) for label in np.argsort(by_class)[-2:]} == {0, 8}, "sky and sea are the bluest: airplane, ship"
