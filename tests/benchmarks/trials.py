"""Trials per second: our Tune trials against plain Tune functions at their defaults, in one run.

Prints seconds of each and their ratio, for empty trials, and for trials of 0.3 s the wall time beyond the work that a
slot spends per trial (start-up apart). `python -m tests.benchmarks.trials`.
"""

from __future__ import annotations

import os
import time

from orchestrator.pool import Cluster, ray_cluster

NUM_EMPTY, NUM_SHORT, SECONDS = 64, 120, 0.3


def make_nothing() -> None:
    return None


def pause(_: None, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def ours(cluster: Cluster, seconds: float, count: int) -> tuple[float, float]:
    """Wall seconds in all, and per trial and slot from the first result to the last."""
    from orchestrator.sweep import run_trials

    times: list[float] = []
    start = time.perf_counter()
    run_trials(
        pause,
        [seconds] * count,
        setup=make_nothing,
        inputs=(),
        workers=cluster.workers,
        gpus_per_worker=0.0,
        done=lambda _: times.append(time.perf_counter()),
    )
    assert len(times) == count
    return time.perf_counter() - start, (times[-1] - times[0]) * cluster.workers / (count - 1)


def plain(seconds: float, count: int) -> float:
    """Wall seconds of the same trials as a user of Tune writes them, at Tune's defaults."""
    from ray import tune

    ours_only = [name for name in os.environ if name.startswith("TUNE_") or name == "RAY_AIR_NEW_OUTPUT"]
    kept = {name: os.environ.pop(name) for name in ours_only}

    def trainable(config: dict[str, float]) -> None:
        time.sleep(config["seconds"])
        tune.report({"value": config["seconds"]})

    start = time.perf_counter()
    tune.Tuner(trainable, param_space={"index": tune.grid_search(list(range(count))), "seconds": seconds}).fit()
    os.environ.update(kept)
    return time.perf_counter() - start


def main() -> None:
    with ray_cluster() as cluster:
        ours(cluster, 0.0, 8)  # what is imported once is imported now
        first, _ = ours(cluster, 0.0, NUM_EMPTY)
        rival = plain(0.0, NUM_EMPTY)
        second, _ = ours(cluster, 0.0, NUM_EMPTY)
        mean = (first + second) / 2
        print(f"{NUM_EMPTY} empty trials, {cluster.workers} slots: {first:.1f} and {second:.1f} s, plain {rival:.1f} s")
        print(
            f"trials per second: ours {NUM_EMPTY / mean:.1f}, plain {NUM_EMPTY / rival:.1f}, ratio {rival / mean:.1f}"
        )
        total, per_slot = ours(cluster, SECONDS, NUM_SHORT)
        print(
            f"{NUM_SHORT} trials of {SECONDS} s: {total:.1f} s in all; per trial and slot {per_slot:.3f} s, "
            f"{per_slot - SECONDS:.3f} s beyond the work"
        )


if __name__ == "__main__":
    main()
