"""Published data sets in torchvision's own formats, image folders, and the cache of decoded images."""

import pickle
import resource
import signal
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io
import torchvision
from PIL import Image
from torchvision import transforms

from orchestrator.data import DATASETS, Dataset
from orchestrator.registry import InputError
from tests.test_data import pictures, png, small, write

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


def write_fashion(root: Path) -> np.ndarray:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = RNG.integers(0, 256, (2, 20, 28, 28), dtype=np.uint8)
    for part, pixels in zip(("train", "t10k"), images, strict=True):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 20, 28, 28) + pixels.tobytes())
        labels = (np.arange(20) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 20) + labels.tobytes())
    return images.reshape(-1, 28, 28)


def test_fashion_mnist_has_one_channel(tmp_path: Path) -> None:
    images = write_fashion(tmp_path)
    dataset = load("fashion_mnist", root=str(tmp_path), download=False)
    assert dataset.image_shape == (1, 28, 28)
    assert np.array_equal(dataset.images[..., 0], images)
    assert dataset.labels.tolist() == [i % 10 for i in range(20)] * 2
    assert dataset.class_names == tuple(torchvision.datasets.FashionMNIST.classes)


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_files_that_are_there_need_no_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", reached)
    if name == "cifar10":
        write_cifar(tmp_path, torchvision.datasets.CIFAR10, "labels", monkeypatch)
    else:
        write_fashion(tmp_path)
    assert len(load(name, root=str(tmp_path), download=True).images)
    assert capsys.readouterr() == ("", "")


FILES = {
    "cifar10": ("cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]),
    "cifar100": ("cifar-100-python", ["train", "test", "meta"]),
    "svhn": ("", ["train_32x32.mat", "test_32x32.mat"]),
    "fashion_mnist": (
        "FashionMNIST/raw",
        [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")],
    ),
}


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_what_is_not_there_is_asked_for_by_name(
    name: str, download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody is there: no network
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    folder, files = FILES[name]
    with pytest.raises(InputError, match="data=image_parquet") as caught:
        load(name, root=str(tmp_path), download=download)
    said = str(caught.value)
    assert f"is not whole in {str(tmp_path / folder)!r}: missing or damaged {', '.join(files)} (" in said
    assert ("download is false" in said) is not download
    assert ("download: " in said) is download
    assert "\n" not in said
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == download


def test_only_the_files_that_are_damaged_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR10
    write_cifar(tmp_path, kind, "labels", monkeypatch)
    with (tmp_path / kind.base_folder / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"missing or damaged data_batch_3 \(download is false\)"):
        load("cifar10", root=str(tmp_path), download=False)


@pytest.mark.parametrize("damage", ["empty", "cut", "fewer labels"])
def test_damage_without_a_checksum_is_said(damage: str, tmp_path: Path) -> None:
    write_fashion(tmp_path)
    labels = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    fewer = struct.pack(">II", 0x801, 19) + bytes(19)
    labels.write_bytes({"empty": b"", "cut": labels.read_bytes()[:-3], "fewer labels": fewer}[damage])
    with pytest.raises(InputError, match=r"not whole in .*raw': one of .*train-labels.* \(reading: ") as caught:
        load("fashion_mnist", root=str(tmp_path))
    assert "\n" not in str(caught.value)


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


def test_a_fingerprint_is_remembered_for_whole_files_of_the_cache_only(tmp_path: Path) -> None:
    write_folder(tmp_path)
    dataset = load("image_folder", root=str(tmp_path))
    assert dataset.fingerprint == replace(dataset).fingerprint
    (kept,) = (tmp_path / ".unlearn").glob("*.fingerprint")
    kept.write_text("x" * 64)
    assert replace(dataset).fingerprint == "x" * 64, "read, not computed"
    for part in (dataset.images[::-1], dataset.images[:, :3], dataset.images[1:], dataset.images.reshape(10, 3, 12, 3)):
        assert replace(dataset, images=part).fingerprint == replace(dataset, images=np.array(part)).fingerprint
    kept.write_text("cut")
    assert replace(dataset).fingerprint == replace(dataset, images=np.array(dataset.images)).fingerprint


def test_the_fingerprint_of_a_users_mapped_file_follows_its_content(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    dataset = load("image_folder", root=str(tmp_path / "images"))
    found = set()
    for value in (0, 1):
        np.save(tmp_path / "mine.npy", np.full((10, 6, 6, 3), value, dtype=np.uint8))
        found.add(replace(dataset, images=np.load(tmp_path / "mine.npy", mmap_mode="r")).fingerprint)
    assert len(found) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "mine.npy"], "a file was left beside it"


@pytest.mark.parametrize("size", [1, 13, 10**9])
def test_the_fingerprint_does_not_depend_on_its_parts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = small().fingerprint
    monkeypatch.setattr("orchestrator.data.base._DIGEST_BYTES", size)
    assert small().fingerprint == expected
    assert replace(small(), images=np.asfortranarray(small().images)).fingerprint == expected


def test_examples_are_copies_of_their_own_rows(tmp_path: Path) -> None:
    written = write_folder(tmp_path)
    examples = load("image_folder", root=str(tmp_path), num_train=4).examples("test")
    assert examples.images.is_contiguous()
    assert examples.images.untyped_storage().nbytes() == written[6:].nbytes
    examples.images.zero_()
    assert np.array_equal(load("image_folder", root=str(tmp_path)).images, written)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: .*set data\.cache to"):
        load("image_folder", root=str(tmp_path), cache=str(tmp_path / "taken"))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path, side=64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file beyond the limit is then EFBIG, as a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written: .*has room"):
            load("image_folder", root=str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / ".unlearn").iterdir())


def test_progress_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.data.cache.SECONDS_BETWEEN_LINES", -1.0)
    write_folder(tmp_path)
    load("image_folder", root=str(tmp_path))
    said = capsys.readouterr()
    assert said.out == ""
    assert "10/10" in said.err
    load("image_folder", root=str(tmp_path))
    assert capsys.readouterr().err == "", "decoded again"


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
    with pytest.raises(InputError, match=r"b/x\.png' has shape .* one size, which data\.resize and data\.crop give"):
        load("image_folder", root=str(tmp_path))
    dataset = load("image_folder", root=str(tmp_path), resize=10, crop=8)
    assert dataset.images.shape == (4, 8, 8, 3)
    assert (dataset.images == 255).all(), "the middle is kept"
    with pytest.raises(InputError, match=r"x\.png is 10x10|data\.crop=12 needs data\.resize=12"):
        load("image_folder", root=str(tmp_path), resize=10, crop=12)
    assert not list((tmp_path / ".unlearn").glob("*.partial"))


@pytest.mark.parametrize(("resize", "crop"), [(17, 14), (16, None), (None, 15), (40, 40), (160, 128)])
def test_sizes_are_those_of_torchvision(resize: int | None, crop: int | None, tmp_path: Path) -> None:
    steps = [transforms.Resize(resize)] if resize else []
    steps += [transforms.CenterCrop(crop)] if crop else []
    expected = []
    for number, (height, width) in enumerate([(23, 31), (23, 31), (31, 23), (37, 29)] if crop else [(33, 49)]):
        picture = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for part in ("train", "test"):
            (tmp_path / part / "one").mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / part / "one" / f"{number}.png")
        expected.append(np.asarray(transforms.Compose(steps)(picture)))
    dataset = load("image_folder", root=str(tmp_path), resize=resize, crop=crop)
    assert np.array_equal(dataset.examples("train").images, np.stack(expected))


def test_order_and_labels_are_those_of_torchvision(tmp_path: Path) -> None:
    for name in ("train/b/10.png", "train/b/9.png", "train/B/x.PNG", "train/a/z.bmp", "train/a/A.png", "train/a/k.jpg"):
        for path in (tmp_path / name, tmp_path / name.replace("train", "test")):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(RNG.integers(0, 256, (5, 5, 3), dtype=np.uint8)).save(path)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    dataset, theirs = load("image_folder", root=str(tmp_path)), torchvision.datasets.ImageFolder(tmp_path / "train")
    assert dataset.class_names == tuple(theirs.classes)
    assert dataset.split_labels("train").tolist() == theirs.targets
    assert np.array_equal(dataset.examples("train").images, np.stack([np.asarray(image) for image, _ in theirs]))


def test_hidden_files_and_a_test_part_without_classes_are_passed_over(tmp_path: Path) -> None:
    written = write_folder(tmp_path, test="val")
    (tmp_path / "train/ant/._0.png").write_bytes(b"of another system")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/1.png").write_bytes(b"unlabelled")
    assert np.array_equal(load("image_folder", root=str(tmp_path)).images, written)


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


def parquet(folder: Path, row_group_size: int = 6, count: int = 20) -> dict[str, str]:
    """Training and test files in several row groups."""
    files = {}
    for seed, name in enumerate(("train", "test")):
        files[name] = str(folder / f"{name}.parquet")
        write(Path(files[name]), [png(image) for image in pictures(count, seed)], [i % 4 for i in range(count)])
        pq.write_table(pq.read_table(files[name]), files[name], row_group_size=row_group_size)
    return files


@pytest.mark.parametrize(
    "sizes", [{}, {"num_validation": 4}, {"num_train": 12, "num_validation": 4, "label_noise": 0.25}, {"num_test": 5}]
)
def test_a_cache_never_changes_the_data(sizes: dict[str, float], tmp_path: Path) -> None:
    files = parquet(tmp_path)
    plain = load("image_parquet", **files, **sizes)
    for _ in range(2):
        cached = load("image_parquet", **files, **sizes, cache=str(tmp_path / "cache"))
        assert isinstance(cached.images, np.memmap)
        assert np.array_equal(cached.images, plain.images)
        assert cached.fingerprint == plain.fingerprint
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


@pytest.mark.parametrize("row_group_size", [1, 7, 600])
def test_row_groups_do_not_matter(row_group_size: int, tmp_path: Path) -> None:
    dataset = load("image_parquet", **parquet(tmp_path, row_group_size, count=600), num_train=3, num_validation=400)
    sources = {picture.tobytes(): i for i, picture in enumerate(pictures(600, 0))}
    rows = [sources[image.tobytes()] for image in dataset.images[:403]]
    assert len(set(rows)) == 403
    assert [row % 4 for row in rows] == dataset.labels[:403].tolist()
    assert np.array_equal(dataset.images[403:], pictures(600, 1))


def test_parquet_images_are_resized_cropped_and_decoded_anew_when_the_file_changes(tmp_path: Path) -> None:
    files, cache = parquet(tmp_path), str(tmp_path / "cache")
    small_ones = load("image_parquet", **files, resize=8, crop=4, cache=cache)
    assert small_ones.image_shape == (3, 4, 4)
    assert small_ones.fingerprint == load("image_parquet", **files, resize=8, crop=4).fingerprint
    assert np.array_equal(load("image_parquet", **files, cache=cache).images[:20], pictures(20, 0))
    write(Path(files["train"]), [png(image) for image in pictures(20, 7)], [i % 4 for i in range(20)])
    assert np.array_equal(load("image_parquet", **files, cache=cache).images[:20], pictures(20, 7))


@pytest.mark.parametrize("cached", [False, True])
def test_a_damaged_page_of_images_is_said(cached: bool, tmp_path: Path) -> None:
    files = parquet(tmp_path)
    content = bytearray(Path(files["train"]).read_bytes())
    content[4:60] = b"\xff" * 56
    Path(files["train"]).write_bytes(content)
    with pytest.raises(InputError, match="not a readable Parquet file") as caught:
        load("image_parquet", **files, cache=str(tmp_path / "cache") if cached else None)
    assert "\n" not in str(caught.value)
