"""Independent Python processes of one thread each, which do the same work at the same time: what the pool is measured
against, and what a core can do when the others are busy too."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch

from orchestrator.cluster import WORKER_ENVIRONMENT


class Processes:
    """`count` processes in the workers' environment; a context manager. What they run must be a module's function."""

    def __init__(self, count: int) -> None:
        os.environ.update({**WORKER_ENVIRONMENT, "KINETO_LOG_LEVEL": "9"})  # read by what is started, not by us
        spawn = multiprocessing.get_context("spawn")
        ends = [spawn.Pipe() for _ in range(count)]
        self._pipes = [ours for ours, _ in ends]
        self._started = [spawn.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in ends]
        for process in self._started:
            process.start()

    def at_once(self, function: Callable[..., Any], *arguments: Any) -> tuple[float, list[Any]]:
        """Seconds until the last has returned from `function(its place, *arguments)`, and what each returned."""
        start = time.perf_counter()
        for place, pipe in enumerate(self._pipes):
            pipe.send((function, (place, *arguments)))
        results = [pipe.recv() for pipe in self._pipes]
        return time.perf_counter() - start, results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            process.terminate()
            process.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        function, arguments = pipe.recv()
        pipe.send(function(*arguments))


def matrix_rate(place: int, seconds: float = 0.8) -> float:
    """fp32 operations per second of this core in square matrix products: the best of four sizes, of the best of each.

    A multiplication and an addition are two. Both ways that torch has are tried: `mm`, which is MKL and half as fast on
    a core that is not Intel's, and oneDNN, which does the convolutions.
    """
    best = 0.0
    for size in (256, 512, 1024, 2048):
        left, right, out = torch.rand(size, size), torch.rand(size, size), torch.empty(size, size)
        ways: list[Callable[[], object]] = [partial(torch.mm, left, right, out=out)]
        if torch.backends.mkldnn.is_available():
            ways.append(partial(torch.ops.mkldnn._linear_pointwise, left, right, None, "none", [], ""))
        for way in ways:
            until = time.perf_counter() + seconds / 4 / len(ways)
            while time.perf_counter() < until:
                start = time.perf_counter()
                way()
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
