"""Published data sets in torchvision's own formats, image folders, and the cache of decoded images."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

from orchestrator.data import DATASETS, Dataset
from orchestrator.registry import InputError
from tests.test_data import pictures, png, write

RNG = np.random.default_rng(0)


def load(name: str, **options: object) -> Dataset:
    dataset: Dataset = DATASETS[name]({}, DATASETS[name].resolve(options))
    return dataset


def md5(path: Path) -> str:
    found: str = torchvision.datasets.utils.calculate_md5(str(path))
    return found


# ---- made files in the formats of the published sets ---------------------------------------------------------------


def write_cifar(root: Path, kind: Any, label: str, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Files as CIFAR comes; the checksums, which made files cannot have, are those of the made files."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    images, labels, lists = [], [], []
    for name, _ in (*kind.train_list, *kind.test_list):
        part, classes = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8), RNG.permutation(12) % 10
        (folder / name).write_bytes(pickle.dumps({"data": part.reshape(12, -1), label: classes.tolist()}))
        images.append(part.transpose(0, 2, 3, 1))
        labels.append(classes)
        lists.append([name, md5(folder / name)])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: list("abcdefghij")}))
    monkeypatch.setattr(kind, "train_list", lists[: len(kind.train_list)])
    monkeypatch.setattr(kind, "test_list", lists[len(kind.train_list) :])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize(
    ("name", "kind", "label"), [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine_labels")]
)
def test_cifar_comes_whole_and_in_its_own_order(
    name: str, kind: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = write_cifar(tmp_path, getattr(torchvision.datasets, kind), label, monkeypatch)
    dataset = load(name, root=str(tmp_path), download=False)
    assert np.array_equal(dataset.images, images)
    assert np.array_equal(dataset.labels, labels)
    assert dataset.splits["train"].tolist() == list(range(len(images) - 12))
    assert dataset.splits["test"].tolist() == list(range(len(images) - 12, len(images)))
    assert dataset.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    some = load(name, root=str(tmp_path), num_train=6, num_validation=2, num_test=5, label_noise=0.5)
    assert {part: len(rows) for part, rows in some.splits.items()} == {"train": 6, "validation": 2, "test": 5}
    assert (some.split_labels("train") != some.split_true_labels("train")).sum() == 3


def test_svhn_has_its_axes_turned_and_its_noughts_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, lists = {}, {}
    for part in ("train", "test"):
        x, y = RNG.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8), np.arange(20) % 10 + 1
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": y[:, None]})
        parts[part] = x
        lists[part] = ["nowhere", f"{part}_32x32.mat", md5(tmp_path / f"{part}_32x32.mat")]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)
    dataset = load("svhn", root=str(tmp_path), download=False)
    assert np.array_equal(dataset.images[3], parts["train"][..., 3])
    assert np.array_equal(dataset.images[20 + 7], parts["test"][..., 7])
    assert dataset.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 4


def test_fashion_mnist_has_one_channel(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = RNG.integers(0, 256, (2, 20, 28, 28), dtype=np.uint8)
    for part, pixels in zip(("train", "t10k"), images, strict=True):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 20, 28, 28) + pixels.tobytes())
        labels = (np.arange(20) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 20) + labels.tobytes())
        (raw / f"{part}.gz").write_bytes(gzip.compress(b""))
    dataset = load("fashion_mnist", root=str(tmp_path), download=False)
    assert dataset.image_shape == (1, 28, 28)
    assert np.array_equal(dataset.images[..., 0], images.reshape(-1, 28, 28))
    assert dataset.class_names[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", "batches.meta"),
        ("cifar100", "train, test and meta"),
        ("svhn", "train_32x32.mat"),
        ("fashion_mnist", "idx3"),
    ],
)
def test_what_is_not_there_is_asked_for_by_name(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"download is false; put there .*{words}.*data=image_parquet") as caught:
        load(name, root=str(tmp_path), download=False)
    assert str(tmp_path) in str(caught.value)


# ---- image folders -------------------------------------------------------------------------------------------------


def write_folder(root: Path, side: int = 6, test: str = "test") -> np.ndarray:
    """Two classes, three training and two test images each; the images in the order of paths."""
    written = []
    for part, count in (("train", 3), (test, 2)):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
                written.append(pixels)
    return np.stack(written)


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_of_images_by_class(test: str, tmp_path: Path) -> None:
    written = write_folder(tmp_path, test=test)
    dataset = load("image_folder", root=str(tmp_path))
    assert np.array_equal(dataset.images, written)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert dataset.class_names == ("ant", "bee")
    assert dataset.splits["train"].tolist() == list(range(6))
    assert dataset.splits["test"].tolist() == [6, 7, 8, 9]


def test_images_are_decoded_once_and_anew_when_a_file_changes(tmp_path: Path) -> None:
    written = write_folder(tmp_path)
    first = load("image_folder", root=str(tmp_path))
    (cache,) = (tmp_path / ".unlearn").glob("*.npy")
    before = cache.stat().st_mtime_ns
    again = load("image_folder", root=str(tmp_path))
    assert cache.stat().st_mtime_ns == before
    assert first.fingerprint == again.fingerprint
    pixels = np.zeros((6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "train" / "ant" / "1.png")
    changed = load("image_folder", root=str(tmp_path))
    assert not changed.images[1].any()
    assert np.array_equal(changed.images[2:], written[2:])
    assert changed.fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_cache_that_is_not_whole_is_made_anew(damage: bytes | None, tmp_path: Path) -> None:
    written = write_folder(tmp_path)
    load("image_folder", root=str(tmp_path))
    (cache,) = (tmp_path / ".unlearn").glob("*.npy")
    cache.write_bytes(cache.read_bytes()[:-40] if damage is None else damage)
    assert np.array_equal(load("image_folder", root=str(tmp_path)).images, written)


def test_a_mapped_data_set_is_the_plain_one_and_travels_as_such(tmp_path: Path) -> None:
    write_folder(tmp_path)
    mapped = load("image_folder", root=str(tmp_path), label_noise=0.34)
    assert isinstance(mapped.images, np.memmap)
    plain = Dataset(np.array(mapped.images), mapped.labels, mapped.true_labels, mapped.splits, mapped.class_names)
    assert (
        mapped.fingerprint
        == plain.fingerprint
        == load("image_folder", root=str(tmp_path), label_noise=0.34).fingerprint
    )
    assert load("image_folder", root=str(tmp_path)).fingerprint != plain.fingerprint
    sent = pickle.loads(pickle.dumps(mapped, protocol=5))
    assert type(sent.images) is np.ndarray
    assert sent.fingerprint == plain.fingerprint


def test_the_cache_can_be_elsewhere(tmp_path: Path) -> None:
    written = write_folder(tmp_path / "images")
    elsewhere = str(tmp_path / "cache")
    dataset = load("image_folder", root=str(tmp_path / "images"), cache=elsewhere)
    assert not (tmp_path / "images" / ".unlearn").exists()
    assert np.array_equal(dataset.images, written)


def test_images_of_several_sizes_are_resized_and_cropped(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for number, (width, height) in enumerate([(20, 10), (10, 30)]):
            folder = tmp_path / part / "abc"[number]
            folder.mkdir(parents=True)
            picture = np.zeros((height, width, 3), dtype=np.uint8)
            picture[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = 255
            Image.fromarray(picture).save(folder / "x.png")
    with pytest.raises(InputError, match=r"one size, which data\.resize and data\.crop give"):
        load("image_folder", root=str(tmp_path))
    dataset = load("image_folder", root=str(tmp_path), resize=10, crop=8)
    assert dataset.images.shape == (4, 8, 8, 3)
    assert (dataset.images == 255).all(), "the middle is kept"
    with pytest.raises(InputError, match=r"x\.png is 10x10|data\.crop=12 needs data\.resize=12"):
        load("image_folder", root=str(tmp_path), resize=10, crop=12)
    assert not list((tmp_path / ".unlearn").glob("*.partial"))


def broken_folder(root: Path, how: str) -> None:
    write_folder(root)
    if how == "empty class":
        for path in (root / "train" / "ant").iterdir():
            path.unlink()
    elif how == "one part only":
        (root / "test" / "cow").mkdir()
        Image.new("RGB", (6, 6)).save(root / "test" / "cow" / "0.png")
    elif how == "corrupt":
        (root / "train" / "bee" / "1.png").write_bytes(b"no image")
    elif how == "no test part":
        (root / "test").rename(root / "other")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("empty class", "holds no images; allowed: .bmp"),
        ("one part only", "class 'cow' is in one part"),
        ("corrupt", "bee/1.png' cannot be decoded"),
        ("no test part", "does not exist; set data.root"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(how: str, words: str, tmp_path: Path) -> None:
    broken_folder(tmp_path, how)
    with pytest.raises(InputError, match=words) as caught:
        load("image_folder", root=str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".unlearn/*"))


@pytest.mark.parametrize("options", [{"num_train": 7}, {"num_test": 5}, {"num_validation": 7}, {"crop": 0}])
def test_sizes_beyond_what_there_is_are_refused(options: dict[str, int], tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(InputError, match=r"examples|allowed"):
        load("image_folder", root=str(tmp_path), **options)


# ---- Parquet through the cache -------------------------------------------------------------------------------------


def test_parquet_through_the_cache_holds_the_same_examples(tmp_path: Path) -> None:
    files = []
    for seed, name in enumerate(("train", "test")):
        files.append(tmp_path / f"{name}.parquet")
        write(files[-1], [png(image) for image in pictures(20, seed)], [i % 4 for i in range(20)])
    options = {"train": str(files[0]), "test": str(files[1]), "num_train": 12, "num_validation": 4, "label_noise": 0.25}
    plain = load("image_parquet", **options)
    cached = load("image_parquet", **options, cache=str(tmp_path / "cache"))
    assert isinstance(cached.images, np.memmap)
    for split in ("train", "validation", "test"):
        ours, theirs = cached.examples(split), plain.examples(split)
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(cached.split_true_labels(split), plain.split_true_labels(split))
    smaller = load("image_parquet", **options, resize=8, crop=4, cache=str(tmp_path / "cache"))
    assert smaller.image_shape == (3, 4, 4)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
