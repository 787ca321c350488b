"""Arithmetic rate of training on one core against its fp32 matrix-product rate, alone and with all cores busy.

Operations are those of convolutions and matrix products in one step, counted by torch; the time is the CPU time of the
whole step in our own loop: drawing the batch, layers without a product, the optimizer.
`python -m tests.benchmarks.arithmetic [rounds]`.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import replace
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.data import Examples
from orchestrator.models import Factory, factory
from orchestrator.seeds import generator
from orchestrator.training import Training, as_input, cross_entropy, fit
from tests.benchmarks.processes import Processes, matrix_rate

Setting = tuple[str, str, dict[str, int], tuple[int, int, int], int, int]  # label, model, options, shape, batch, steps

SETTINGS: tuple[Setting, ...] = (
    ("small_cnn of digits", "small_cnn", {}, (1, 8, 8), 64, 60),
    ("ResNet-9 of cifar10_small", "resnet9", {"width": 8}, (3, 32, 32), 128, 8),
    ("ResNet-9, stock width 64", "resnet9", {"width": 64}, (3, 32, 32), 32, 2),
)
PRODUCTS = ("aten::convolution_backward", "aten::mkldnn_convolution", "aten::addmm", "aten::mm")


def made(setting: Setting) -> tuple[Factory, Examples, Training]:
    _, name, options, shape, batch, steps = setting
    stream = generator(0, "benchmark")
    images = torch.randint(256, (steps * batch, *shape[1:], shape[0]), dtype=torch.uint8, generator=stream)
    labels = torch.randint(10, (steps * batch,), generator=stream)
    return factory(name, options, shape, 10), Examples(images, labels), Training(0.01, 1, batch)


def operations(setting: Setting) -> int:
    """Floating-point operations of one training step."""
    fresh, examples, training = made(setting)
    model = fresh(generator(0)).train()
    with FlopCounterMode(display=False) as counter:
        part = slice(0, training.batch_size)
        cross_entropy(model, as_input(examples.images[part]), examples.labels[part]).backward()
    return counter.get_total_flops()


def step_seconds(place: int, setting: Setting) -> float:
    """CPU seconds of a training step: the mean over an epoch, the best of three."""
    fresh, examples, training = made(setting)
    times = [time.process_time()]
    fit(
        fresh(generator(0)),
        examples,
        training=replace(training, epochs=3),
        generator=generator(0),
        report=lambda *_: times.append(time.process_time()),
    )
    return min(after - before for before, after in pairwise(times)) / setting[-1]


def share_in_products(place: int, setting: Setting) -> float:
    """Share of the CPU time of an epoch that is inside convolutions and matrix products."""
    fresh, examples, training = made(setting)
    model = fresh(generator(0))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        fit(model, examples, training=training, generator=generator(0))
    spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(spent.get(name, 0.0) for name in PRODUCTS) / sum(spent.values())


def main() -> None:
    rounds = int((*sys.argv[1:], "5")[0])
    for count in sorted({1, os.cpu_count() or 1}):
        with Processes(count) as processes:
            for setting in SETTINGS:
                processes.at_once(step_seconds, setting)
                shares, rates, products = [], [], []
                for _ in range(rounds):
                    product = statistics.mean(processes.at_once(matrix_rate)[1])
                    seconds = statistics.mean(processes.at_once(step_seconds, setting)[1])
                    rates.append(operations(setting) / seconds)
                    products.append(product)
                    shares.append(rates[-1] / product)
                inside = statistics.mean(processes.at_once(share_in_products, setting)[1])
                share = statistics.median(shares)
                print(
                    f"{count} at once, {setting[0]}: {operations(setting) / 1e9:.2f} GFLOP a step, "
                    f"{statistics.median(rates) / 1e9:.0f} of {statistics.median(products) / 1e9:.0f} GFLOP/s "
                    f"of a core's matrix products: {share:.0%} ({min(shares):.0%} to {max(shares):.0%}); "
                    f"{inside:.0%} of the time in products, which run at {share / inside:.0%}"
                )


if __name__ == "__main__":
    main()
