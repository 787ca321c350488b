"""Ray: a map over long-lived actors, which survives workers that die and nodes that leave."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from orchestrator.cluster import Cluster
from orchestrator.pipeline import BrokenWorkerError

S = TypeVar("S")
A = TypeVar("A")
R = TypeVar("R")

MAX_TRIES = 3  # workers that one item may lose before it is given up
PATIENCE_SECONDS = 1800.0  # without a single worker, until a map gives up
_START_SECONDS = 60.0  # for all workers to start; those that come later join in
_PAUSE_SECONDS = 0.5  # before a worker is started again that the cluster did not let start


class WorkerDeathError(RuntimeError):
    """Items that were given up because every worker that took them died, each with the last reason."""

    def __init__(self, lost: Sequence[tuple[Any, str]], total: int) -> None:
        self.lost = tuple(lost)
        super().__init__(f"{len(lost)} of {total} items were given up: {lost[0][0]}, {lost[0][1]}")


class NoWorkersError(RuntimeError):
    """No node had room for a worker for so long that a map was given up."""


def no_workers(seconds: float, state: str) -> NoWorkersError:
    """What is said after so many seconds without a worker."""
    return NoWorkersError(
        f"no node had room for a worker for {seconds:g} s, {state}; add nodes, or end what holds "
        "their cores, and give the same command again: what is finished is kept"
    )


def death_reason(tries: int, error: object) -> str:
    """One line on workers that died, with what Ray says of the last, if it says anything."""
    said = what_killed(error)
    return f"{tries} workers died on it" + (f"; the last: {said}" if said else "")


def what_killed(error: object) -> str:
    """What Ray says of a worker that died, in one line; empty where it says nothing."""
    text = "" if error is None else " ".join(str(error).split())
    known = re.search(r"Worker exit type: (\w+) Worker exit detail: (.*?)(?: Some common causes|$)", text)
    return f"{known[1]}, {known[2]}" if known else text[:200]


class _Worker(Generic[A, R]):
    """The actor: makes its state once, then answers calls."""

    def __init__(self, setup: Callable[..., S], *inputs: Any) -> None:
        self._state = setup(*inputs)

    def ready(self) -> None:
        """Answer once the state is made."""

    def call(self, function: Callable[[Any, A], R], item: A) -> R:
        return function(self._state, item)


@dataclass
class Usage:
    """Worker-seconds of a pool: `span` from the first item handed out to the last returned, times its workers."""

    workers: int
    startup_seconds: float = 0.0
    span_seconds: float = 0.0
    deaths: int = 0

    @property
    def worker_seconds(self) -> float:
        return self.workers * self.span_seconds


@dataclass
class Pool(Generic[S]):
    """Long-lived actors that each hold `setup(*inputs)`; a context manager, and a map over their states.

    `inputs` travel once through the object store (numpy arrays live once per node); they are kept on the driver's
    node, so that no other node takes them with it when it leaves. An actor that cannot be placed yet gets no items:
    it joins in once there is room, and after `patience_seconds` without any worker NoWorkersError is raised.
    """

    cluster: Cluster
    setup: Callable[..., S]
    inputs: tuple[Any, ...] = ()
    patience_seconds: float = PATIENCE_SECONDS
    usage: Usage = field(init=False)
    _actors: dict[int, Any] = field(default_factory=dict)
    _starting: dict[Any, int] = field(default_factory=dict)  # call that answers once the actor is ready -> actor
    _failed_starts: Counter[int] = field(default_factory=Counter)
    _failing_since: dict[int, float] = field(default_factory=dict)
    _references: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.usage = Usage(self.cluster.workers)

    def __enter__(self) -> Self:
        import ray

        start = time.perf_counter()
        self._references = [ray.put(value) for value in self.inputs]
        for actor in range(self.cluster.workers):
            self._start(actor)
        try:
            short = min(_START_SECONDS, self.patience_seconds)
            ready, late = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=short)
            if not ready:
                ready, _ = ray.wait(late, timeout=self.patience_seconds - short)
            if not ready:
                raise self.no_workers("nothing was started")
            for call in ready:
                self.settle(call)
        except BaseException:
            self.close()
            raise
        self.usage.startup_seconds = time.perf_counter() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, so that nothing holds their cores."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._starting = {}, {}

    def _start(self, actor: int) -> None:
        import ray

        options = ray.remote(_Worker).options(num_cpus=1, num_gpus=self.cluster.gpus_per_worker)
        self._actors[actor] = options.remote(self.setup, *self._references)
        self._starting[self._actors[actor].ready.remote()] = actor

    def settle(self, call: Any) -> None:
        """Take a worker that has started into service, or start it anew.

        A setup that raises is tried MAX_TRIES times; what the cluster did to a worker that was starting (its node left,
        say) is tried for as long as patience lasts. The last worker to be given up raises, NoWorkersError in that case.
        """
        import ray
        from ray.exceptions import RayError

        actor = self._starting.pop(call)
        try:
            ray.get(call)
        except RayError as error:
            self._failed_starts[actor] += 1
            began = self._failing_since.setdefault(actor, time.monotonic())
            raised = getattr(error, "actor_init_failed", False)
            if self._failed_starts[actor] < MAX_TRIES or (
                not raised and time.monotonic() - began < self.patience_seconds
            ):
                time.sleep(0 if raised else _PAUSE_SECONDS)
                self._start(actor)
                return
            del self._actors[actor]
            if not self._actors:
                if raised:
                    raise
                raise self.no_workers(
                    f"no worker could start; the last: {' '.join(str(error).split())[:200]}"
                ) from None
        else:
            self._failed_starts[actor] = 0
            self._failing_since.pop(actor, None)

    def replace(self, actor: int) -> None:
        """Start a new worker in the place of one that died, or that cannot be reached any more."""
        import ray

        self.usage.deaths += 1
        ray.kill(self._actors[actor])
        self._start(actor)

    @property
    def ready(self) -> list[int]:
        """The workers that can be given work."""
        return [actor for actor in self._actors if actor not in self._starting.values()]

    def no_workers(self, state: str) -> NoWorkersError:
        return no_workers(self.patience_seconds, state)

    def map(
        self,
        function: Callable[[S, A], R],
        items: Iterable[A],
        done: Callable[[R], None] | None = None,
        begun: Callable[[A], None] | None = None,
    ) -> list[R]:
        """`[function(state, item) for item in items]`, in order; `done` hears of each result as it comes.

        `begun` hears of each item that a worker turns to.

        Items whose worker dies are given to another, at most MAX_TRIES times; then WorkerDeathError is raised,
        after all the others are done. An exception of `function` ends the map and is raised as it is.
        """
        return _Mapping(self, function, list(items), done, begun).run()


class _Mapping(Generic[S, A, R]):
    """One call of Pool.map: what waits, what runs where, what came back."""

    def __init__(
        self,
        pool: Pool[S],
        function: Callable[[S, A], R],
        items: list[A],
        done: Callable[[R], None] | None,
        begun: Callable[[A], None] | None,
    ) -> None:
        self.pool, self.items, self.done, self.begun = pool, items, done, begun
        self.function = function
        self.waiting = deque(range(len(items)))
        self.running: dict[Any, tuple[int, int]] = {}  # call -> (item, actor), in the order handed out
        self.load = Counter[int]()  # calls of each actor
        self.tries = [0] * len(items)
        self.results: dict[int, R] = {}
        self.lost: list[tuple[A, str]] = []

    def run(self) -> list[R]:
        import ray

        start = time.perf_counter()
        function = ray.put(self.function)
        self._deal(function)
        while self.waiting or self.running:
            patience = None if self.running else self.pool.patience_seconds
            finished, _ = ray.wait([*self.running, *self.pool._starting], num_returns=1, timeout=patience)
            if not finished:
                raise self.pool.no_workers(f"{len(self.results)} of {len(self.items)} items are done")
            if finished[0] in self.running:
                self._take(self.running[finished[0]][1])
            else:
                self.pool.settle(finished[0])
            self._deal(function)
        self.pool.usage.span_seconds += time.perf_counter() - start
        if self.lost:
            raise WorkerDeathError(self.lost, len(self.items))
        return [self.results[i] for i in range(len(self.items))]

    def _deal(self, function: Any) -> None:
        """Give each ready worker an item to work on, and one to queue behind it while there are enough for all.

        A queued item spares a worker the way to the driver and back; once fewer wait than there are workers, it
        would only wait behind another while somebody idles.
        """
        ready = self.pool.ready
        for queued in (0, 1):
            for actor in ready:
                if self.load[actor] == queued and len(self.waiting) > queued * len(ready):
                    item = self.waiting.popleft()
                    call = self.pool._actors[actor].call.remote(function, self.items[item])
                    self.running[call] = (item, actor)
                    self.load[actor] += 1
                    if queued == 0:
                        self._begin(item)

    def _begin(self, item: int) -> None:
        if self.begun is not None:
            self.begun(self.items[item])

    def _take(self, actor: int) -> None:
        """Take the result of a worker's first call, which ends before the one behind it; or what became of it."""
        import ray
        from ray.exceptions import ObjectLostError, RayError, RayTaskError

        call, item = next((call, item) for call, (item, where) in self.running.items() if where == actor)
        try:
            result = ray.get(call)
        except RayTaskError as error:
            if not isinstance(error.cause, BrokenWorkerError):
                raise error.cause from error
            self._lose(actor, error.cause)
        except ObjectLostError as error:  # computed, and gone with its node before it was fetched
            self._drop(call)
            self._retry(item, error)
        except RayError as error:  # of the worker: died, out of memory, out of reach, its node gone
            self._lose(actor, error)
        else:
            self._drop(call)
            self.results[item] = result
            if (behind := next((item for item, where in self.running.values() if where == actor), None)) is not None:
                self._begin(behind)
            if self.done is not None:
                self.done(result)

    def _lose(self, actor: int, error: Exception) -> None:
        """Give a worker up for lost: the call that it was working on has used up a try, those behind it none."""
        first, *behind = [self._drop(c) for c in [c for c, (_, where) in self.running.items() if where == actor]]
        self.waiting.extendleft(reversed(behind))
        self._retry(first, error)
        self.pool.replace(actor)

    def _drop(self, call: Any) -> int:
        item, actor = self.running.pop(call)
        self.load[actor] -= 1
        return item

    def _retry(self, item: int, error: Exception) -> None:
        """Put an item back to the front of the queue, or give it up when it has cost enough workers."""
        self.tries[item] += 1
        if self.tries[item] < MAX_TRIES:
            self.waiting.appendleft(item)
        else:
            self.lost.append((self.items[item], death_reason(MAX_TRIES, error)))


def ray_map(function: Callable[[A], R], items: Iterable[A], *, cluster: Cluster) -> list[R]:
    """`list(map(function, items))` over a pool of the cluster's workers."""
    with Pool(cluster, _function_as_state, (function,)) as pool:
        return pool.map(_apply, items)


def _function_as_state(function: Callable[[A], R]) -> Callable[[A], R]:
    return function


def _apply(function: Callable[[A], R], item: A) -> R:
    return function(item)
