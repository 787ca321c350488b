"""A campaign at scale: reading it, scores, influence, growth, and how soon a finished one answers, in one run.

Makes a campaign of random logits in a temporary folder (about 5 GB at full size, removed at the end) and prints
seconds, ratios and peak memory. Each measurement is a process of its own, so that its peak is its own.
`python -m tests.benchmarks.campaigns [--models 4000] [--train 50000] [--test 10000] [--folder FOLDER]`
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jobs.session import Options, make_study
from orchestrator import campaigns
from orchestrator.arrays import pack
from orchestrator.blocks import block_name
from orchestrator.data import Dataset
from orchestrator.memorization import BLOCK_SIZE, block_membership
from orchestrator.specs import InfluenceSpec, ScoresSpec, key
from orchestrator.store import Store
from orchestrator.study import Study

CLASSES = 10

PLUGIN = '''
"""Random images and labels."""

import numpy as np

from orchestrator.data import DATASETS, Dataset


@DATASETS
def noise(*, train: int = 50000, test: int = 10000) -> Dataset:
    """Random 32x32 images of ten classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (train + test, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, train + test)
    splits = {"train": np.arange(train), "validation": np.arange(0), "test": np.arange(train, train + test)}
    return Dataset(images, labels, labels, splits, tuple(map(str, range(10))))
'''


def options(folder: Path, models: int, train: int, test: int) -> Options:
    """The command line that the campaign is of."""
    sizes = [f"data.train={train}", f"data.test={test}", f"campaign.models={models}"]
    words = ["data=noise", *sizes, "model=resnet18", "forget_sets=random"]
    return Options("digits", words, str(folder), "none", plugins=(str(folder / "noise.py"),))


def opened(given: Options) -> tuple[Study, Dataset, Store]:
    from jobs.session import load_plugins

    load_plugins(given.plugins)
    study = make_study(given)
    return study, study.data.entry({}, study.data.options), Store(given.storage)


def make(given: Options) -> None:
    """Logits are higher for the given label: by 4, for one example in 20 only inside its subsets."""
    study, dataset, store = opened(given)
    campaign = study.campaign_spec(dataset.fingerprint)
    labels = {split: dataset.split_labels(split) for split in ("train", "test")}
    noise = np.random.default_rng(0).normal(0, 1.5, 2**22).astype(np.float16)
    memorized = np.arange(len(labels["train"])) % 20 == 0

    def put(block: int) -> None:
        membership = block_membership(labels["train"], campaign.fraction, campaign.seed, block)
        lifts = {"train": np.where(memorized & ~membership, 0.0, 4.0), "test": np.full((BLOCK_SIZE, 1), 3.0)}
        arrays = {}
        for split, given_labels in labels.items():
            size = BLOCK_SIZE * len(given_labels) * CLASSES
            start = (block * 7919) % 65536
            logits = np.resize(noise[start:], size).reshape(BLOCK_SIZE, len(given_labels), CLASSES)
            logits[:, np.arange(len(given_labels)), given_labels] += lifts[split].astype(np.float16)
            arrays[split] = logits
        numbers = {name: np.full(BLOCK_SIZE, 1.0) for name in ("in_accuracy", "test_accuracy", "seconds")}
        store.put(block_name(key(campaign), block), pack({"membership": membership, **arrays, **numbers}))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(put, range(study.campaign.blocks)))


def read_once(given: Options) -> float:
    """Seconds of reading every block, one after another, doing nothing with it."""
    study, dataset, store = opened(given)
    campaign = key(study.campaign_spec(dataset.fingerprint))
    return _seconds(lambda: [len(store.get(block_name(campaign, n))) for n in range(study.campaign.blocks)])


def scores(given: Options, estimator: str) -> float:
    """Seconds of scores from the blocks, stored."""
    study, dataset, store = opened(given)
    campaign = study.campaign_spec(dataset.fingerprint)
    spec = ScoresSpec(campaign=campaign, blocks=study.campaign.blocks, estimator=estimator)
    return _seconds(lambda: campaigns.scores(store, spec, dataset))


def influence(given: Options, memorization: float | None) -> float:
    """Seconds of all pairs above .15, stored."""
    study, dataset, store = opened(given)
    scores_spec = study.scores_spec(dataset.fingerprint)
    spec = InfluenceSpec(scores=scores_spec, memorization=memorization)
    return _seconds(lambda: print(f"  {campaigns.influence(store, spec, dataset).num_pairs} pairs", flush=True))


def products(given: Options) -> float:
    """Seconds that the matrix products of all pairs would take at the rate of one product of a tile's size."""
    study, dataset, _ = opened(given)
    models, side = study.campaign.models, 4000
    left, right = (np.ones((models, side), dtype=np.float32) for _ in range(2))
    once = min(_seconds(lambda: left.T @ right) for _ in range(2))
    return once * len(dataset.splits["train"]) * len(dataset.splits["test"]) / side**2


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


PARTS: dict[str, Callable[[Options], float]] = {
    "read": read_once,
    "scores": lambda given: scores(given, "correctness"),
    "probability": lambda given: scores(given, "probability"),
    "influence": lambda given: influence(given, 0.25),
    "influence of all": lambda given: influence(given, None),
    "products": products,
}


def measured(part: str, words: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak GiB of a part, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.campaigns", *words, "--part", part]
    *said, last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    print("\n".join(said), end="\n" if said else "")
    seconds, cpu, peak = map(float, last.split())
    return seconds, cpu, peak


def answers(words: list[str], label: str, limit: float | None = None) -> None:
    """Print how long a command of the CLI takes, its start included."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "jobs", *words], check=True, stdout=subprocess.PIPE, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{label}: {seconds:.1f} s, {cpu:.1f} CPU s" + ("" if limit is None else f" (aim: under {limit:g})"))
    print("  " + done.stdout.splitlines()[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, size in (("models", 4000), ("train", 50000), ("test", 10000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    parser.add_argument("--part", choices=list(PARTS), default=None)
    asked = parser.parse_args()
    if asked.part is not None:
        given = options(asked.folder, asked.models, asked.train, asked.test)
        before = time.process_time()
        seconds = PARTS[asked.part](given)
        print(seconds, time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        (folder / "noise.py").write_text(PLUGIN)
        given = options(folder, asked.models, asked.train, asked.test)
        start = time.perf_counter()
        make(given)
        print(
            f"{asked.models} models x ({asked.train} + {asked.test}) examples x {CLASSES} classes: made in "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        words = [f"--{part}={getattr(asked, part)}" for part in ("models", "train", "test")] + [f"--folder={folder}"]
        reading, cpu, _ = measured("read", words)
        print(f"reading the blocks once: {reading:.1f} s, {cpu:.1f} CPU s", flush=True)
        for part, most in (("scores", 4), ("probability", 4), ("influence", 8), ("influence of all", 8)):
            seconds, cpu, peak = measured(part, words)
            print(
                f"{part}: {seconds:.1f} s, {cpu:.1f} CPU s, {seconds / reading:.2f} times the reading; "
                f"peak {peak:.2f} GiB (aim: under {most})",
                flush=True,
            )
        product, *_ = measured("products", words)
        print(
            f"influence of all: {seconds / product:.2f} times its matrix products alone ({product:.1f} s)", flush=True
        )
        common = [word for text in given.assignments if "models" not in text for word in ("--set", text)]
        common += ["--storage", given.storage, "--plugin", given.plugins[0]]
        answers(["memorize", "digits", "--models", str(asked.models), *common], "a finished campaign answers", 5)
        study, dataset, store = opened(given)
        campaign = study.campaign_spec(dataset.fingerprint)
        for block in range(study.campaign.blocks):  # one more block; the others are not read again
            if block:
                store.delete(block_name(key(campaign), block))
        last = block_name(key(campaign), study.campaign.blocks)
        store.put(last, store.get(block_name(key(campaign), 0)))
        spec = ScoresSpec(campaign=campaign, blocks=study.campaign.blocks + 1)
        print(f"ten models more: {_seconds(lambda: campaigns.scores(store, spec, dataset)):.2f} s", flush=True)


if __name__ == "__main__":
    main()
