"""Seconds per subset model on one accelerator: ours against the same recipe in plain PyTorch with a DataLoader.

In one run: ours eager, compiled, and in several processes at once; the rival as research scripts have it (a data set
that converts each image, a DataLoader with workers and pinned memory, copies that do not block, autocast if ours has
it). Both train on 70 % and predict every training and test example. Prints what a model takes, the ratio, accuracies,
and the share of the measured rate of a matrix product. Needs torch and numpy (and pyarrow for --data; else the images
are random). From the root of the repository:

    python tests/benchmarks/gpu.py --data cifar10-train.parquet --test cifar10-test.parquet --device cuda
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, by machines that have not installed it

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.data import DATASETS, Dataset
from orchestrator.models import factory
from orchestrator.pipeline import Lab, steady, train_subset_model
from orchestrator.registry import Chosen
from orchestrator.seeds import generator, numpy_generator
from orchestrator.training import Training, autocast_of, rate_factor

FRACTION = 0.7


@dataclass(frozen=True)
class Timed:
    """What trainings took: seconds per model, seconds before the first, mean accuracy on the subsets."""

    seconds: float
    startup: float
    accuracy: float


def random_images(count: int) -> Dataset:
    """Random images and labels in the shape of CIFAR-10, one in six of them for the test."""
    rng = numpy_generator(0, "benchmark")
    images, labels = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10
    splits = {"train": np.arange(count - count // 6), "test": np.arange(count - count // 6, count)}
    return Dataset(images, labels, labels, splits, tuple("abcdefghij"))


def read(given: argparse.Namespace) -> Dataset:
    if given.data is None:
        return random_images(given.limit or 60_000)
    entry = DATASETS["image_parquet"]
    options = {"train": given.data, "test": given.test, **({"num_train": given.limit} if given.limit else {})}
    dataset: Dataset = entry({}, entry.resolve(options))
    return dataset


def members_of(dataset: Dataset, number: int) -> np.ndarray:
    size = len(dataset.splits["train"])
    chosen: np.ndarray = numpy_generator(number, "members").permutation(size) < int(FRACTION * size)
    return chosen


# ---- ours ----------------------------------------------------------------------------------------------------------


def ours(dataset: Dataset, given: argparse.Namespace, compiled: bool, barrier: Any = None) -> Timed:
    """Subset models one after another, as a worker trains them; the first, of one epoch, is start-up."""
    lab, model, training = Lab(dataset, given.device, compiled), Chosen(given.model, {}), training_of(given)
    with steady(given.device):
        begin = time.perf_counter()
        one(lab, model, Training(**{**asdict(training), "epochs": 1}), 0)
        if compiled and not lab.subset_numerics.endswith("compiled"):
            print("compiling failed: what follows is eager", flush=True)
        if barrier is not None:
            barrier.wait()
        start = time.perf_counter()
        accuracies = [one(lab, model, training, number) for number in range(given.models)]
        end = time.perf_counter()
    return Timed((end - start) / given.models, start - begin, float(np.mean(accuracies)))


def one(lab: Lab, model: Chosen, training: Training, number: int) -> float:
    stream = generator(number, "subset model")
    members = members_of(lab.dataset, number)
    found = train_subset_model(lab, model, training, members, fraction=FRACTION, stream=stream)
    return float(found["in_accuracy"])


def _process(given: argparse.Namespace, compiled: bool, barrier: Any, queue: Any) -> None:
    queue.put(ours(read(given), given, compiled, barrier))


def together(given: argparse.Namespace, count: int, compiled: bool) -> Timed:
    """Several processes on one device, all beginning at once; seconds per model of all of them together."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_process, args=(given, compiled, barrier, queue)) for _ in range(count)]
    for process in processes:
        process.start()
    found: list[Timed] = [queue.get(timeout=3600) for _ in processes]
    for process in processes:
        process.join()
    slowest = max(part.seconds for part in found)
    return Timed(slowest / count, max(part.startup for part in found), found[0].accuracy)


# ---- the rival -----------------------------------------------------------------------------------------------------


class Converted(TensorDataset):
    """Images uint8 that are converted one by one, as ToTensor does."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image.permute(2, 0, 1).float().div(255), label


def plain(dataset: Dataset, given: argparse.Namespace) -> Timed:
    """One subset model as a research script trains it, `rival_epochs` of them measured and the rest reckoned."""
    device, training = torch.device(given.device), training_of(given)
    options: dict[str, Any] = {
        "batch_size": training.batch_size,
        "num_workers": given.loader_workers,
        "pin_memory": given.device == "cuda",
        "persistent_workers": given.loader_workers > 0,
    }
    whole = [
        Converted(torch.from_numpy(dataset.images[rows]), torch.from_numpy(dataset.labels[rows]))
        for rows in (dataset.splits["train"], dataset.splits["test"])
    ]
    chosen = np.flatnonzero(members_of(dataset, 0))
    subset = torch.utils.data.Subset(whole[0], chosen.tolist())
    begin = time.perf_counter()
    net = factory(given.model, {}, dataset.image_shape, dataset.num_classes)(generator(0)).to(device)
    net = net.to(memory_format=torch.contiguous_format)
    loader = DataLoader(subset, shuffle=True, drop_last=True, **options)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
    )
    steps = len(loader) * training.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(min(step, steps - 1), steps, training.warmup, training.final)
    )
    autocast = autocast_of(device, training.precision)
    startup, epochs = time.perf_counter() - begin, []
    for _ in range(given.rival_epochs or training.epochs):
        start = time.perf_counter()
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            with autocast():
                loss = functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
        if given.device == "cuda":
            torch.cuda.synchronize()
        epochs.append(time.perf_counter() - start)
    start = time.perf_counter()
    logits = [predicted(net, DataLoader(part, **options), device) for part in whole]
    seconds = sum(epochs) / len(epochs) * training.epochs + time.perf_counter() - start
    right = logits[0].argmax(1) == dataset.labels[dataset.splits["train"]]
    return Timed(seconds, startup, float(right[chosen].mean()))


@torch.no_grad()
def predicted(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> np.ndarray:
    net.eval()
    found: np.ndarray = torch.cat([net(images.to(device, non_blocking=True)).cpu() for images, _ in loader]).numpy()
    return found


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def operations(dataset: Dataset, given: argparse.Namespace) -> float:
    """Floating-point operations of one subset model: its training, and its predictions."""
    net = factory(given.model, {}, dataset.image_shape, dataset.num_classes)(generator(0))
    images = torch.rand(2, *dataset.image_shape)
    with FlopCounterMode(display=False) as counted:
        loss = net(images).sum()
        forward = counted.get_total_flops()
        loss.backward()
    size, test = len(dataset.splits["train"]), len(dataset.splits["test"])
    batch = min(given.batch_size, int(FRACTION * size))
    trained = given.epochs * max(1, int(FRACTION * size) // given.batch_size) * batch
    return (counted.get_total_flops() * trained + forward * (size + test)) / 2


def product_rate(device: str) -> float:
    """Operations per second of a matrix product, the best of several: bf16 on cuda, fp32 in one thread on a CPU."""
    side, kind = (8192, torch.bfloat16) if device == "cuda" else (768, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    with steady(device):
        for _ in range(20):
            start = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def training_of(given: argparse.Namespace) -> Training:
    precision = "bf16" if given.device == "cuda" else "fp32"
    return Training(given.lr, given.epochs, given.batch_size, weight_decay=5e-4, precision=precision)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", help="Parquet of training images; without it, random ones")
    parser.add_argument("--test", help="Parquet of test images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rival-epochs", type=int, help="epochs of the rival that are measured; default: all")
    parser.add_argument("--models", type=int, default=3, help="of ours, each way and each process")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--limit", type=int, help="so many training images (of random ones: in all)")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 3, 4], help="of ours at once on the device")
    parser.add_argument("--loader-workers", type=int, default=4, help="of the rival's DataLoader")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="measure ours eagerly alone")
    given = parser.parse_args(arguments)
    if (given.data is None) != (given.test is None):
        parser.error("--data and --test go together")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = parsed(arguments)
    dataset = read(given)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "one core of a CPU"
    kind = training_of(given).precision
    rate, work = product_rate(given.device), operations(dataset, given)
    print(
        f"{name}, torch {torch.__version__}: {given.model}, {given.epochs} epochs of "
        f"{int(FRACTION * len(dataset.splits['train']))} images in batches of {given.batch_size}, {kind}; "
        f"{work / 1e12:.2f} Tflop a model; a {kind} matrix product: {rate / 1e12:.3f} Tflop/s",
        flush=True,
    )

    def say(what: str, found: Timed) -> None:
        print(
            f"{what}: {found.seconds:.2f} s a model, {work / found.seconds / rate:.1%} of the product's rate; "
            f"{found.startup:.1f} s before the first; accuracy on the subset {found.accuracy:.4f}",
            flush=True,
        )

    best = ours(dataset, given, compiled=False)
    say("ours, eager", best)
    pays = False
    if given.compile:
        compiled = ours(dataset, given, compiled=True)
        say("ours, compiled", compiled)
        pays = compiled.seconds < best.seconds
        best = compiled if pays else best
    for count in given.processes:
        found = together(given, count, compiled=pays)
        say(f"ours, {'compiled' if pays else 'eager'}, {count} processes at once", found)
        best = min(best, found, key=lambda timed: timed.seconds)
    rival = plain(dataset, given)
    say(f"plain PyTorch, {kind}, DataLoader with {given.loader_workers} workers", rival)
    print(f"ratio {rival.seconds / best.seconds:.2f}")


if __name__ == "__main__":
    main()
