"""The pool: equal to map, whatever the number of workers, and whatever dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cluster import Cluster, fitting, ray_cluster
from orchestrator.pipeline import BrokenWorkerError
from orchestrator.pool import Pool, WorkerDeathError, ray_map
from orchestrator.registry import InputError
from orchestrator.sweep import run_trials
from tests.commands import ROOT


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(workers=4) as cluster:
        yield cluster


def square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ray_map_equals_map(cluster: Cluster, workers: int) -> None:
    numbers = list(range(25))
    assert ray_map(square, numbers, cluster=Cluster(workers, 0.0)) == list(map(square, numbers))


def refuse_seven(number: int) -> int:
    if number == 7:
        raise KeyError(number)
    return number


def test_an_exception_of_the_function_comes_out_as_map_would_raise_it(cluster: Cluster) -> None:
    with pytest.raises(KeyError):
        list(map(refuse_seven, range(10)))
    with pytest.raises(KeyError):
        ray_map(refuse_seven, range(10), cluster=Cluster(2, 0.0))


def die_once(state: Path, number: int) -> int:
    """Kill this worker the first time that anybody works on a multiple of five."""
    marker = state / str(number)
    if number % 5 == 0 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), 9)
    return square(number)


def test_killed_workers_are_replaced_and_change_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with Pool(Cluster(2, 0.0), Path, (str(tmp_path),)) as pool:
        assert pool.map(die_once, range(12)) == [square(number) for number in range(12)]
    assert pool.usage.deaths == 3


def die_on_three(state: Path, number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), 9)
    (state / str(number)).touch()
    return number


def test_an_item_that_kills_every_worker_is_given_up_by_name_after_the_others(cluster: Cluster, tmp_path: Path) -> None:
    two = Cluster(2, 0.0)
    with (
        Pool(two, Path, (str(tmp_path),)) as pool,
        pytest.raises(WorkerDeathError, match=r"3, 3 workers died on it; .* SYSTEM"),
    ):
        pool.map(die_on_three, range(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "4", "5", "6", "7"]


def spoil_its_process(state: Path, number: int) -> int:
    """Number 3 breaks the device of the first process that takes it, for all that come after."""
    if number == 3 and not (state / "spoiled").exists():
        (state / "spoiled").write_text(str(os.getpid()))
    if (state / "spoiled").exists() and (state / "spoiled").read_text() == str(os.getpid()):
        raise BrokenWorkerError("CUDA error: an illegal memory access was encountered")
    return number


def test_a_worker_whose_device_is_broken_is_replaced_and_its_item_done_by_another(
    cluster: Cluster, tmp_path: Path
) -> None:
    with Pool(Cluster(2, 0.0), Path, (str(tmp_path),)) as pool:
        assert pool.map(spoil_its_process, range(8)) == list(range(8))
        assert pool.usage.deaths == 1


def broken(path: str) -> Path:
    raise OSError(f"no driver for {path}")


@pytest.mark.chaos
def test_workers_that_cannot_start_are_not_started_for_ever(cluster: Cluster) -> None:
    from ray.exceptions import RayError

    with Pool(Cluster(2, 0.0), broken, ("the device",)) as pool, pytest.raises(RayError, match="no driver for the dev"):
        pool.map(die_on_three, range(4))


def who(_: Path, seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_no_item_waits_behind_another_while_a_worker_idles(cluster: Cluster) -> None:
    with Pool(Cluster(2, 0.0), Path, (".",)) as pool:
        workers = pool.map(who, [1.0, 0.05, 1.0, 0.05])
    assert workers[2] == workers[1] != workers[0]


def test_a_closed_pool_frees_its_cores(cluster: Cluster) -> None:
    import ray

    with Pool(cluster, Path, (".",)) as pool:
        pool.map(lambda _, number: number, range(4))
        assert ray.available_resources().get("CPU", 0) == 0
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < cluster.workers:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def thread_settings(_: int) -> tuple[str | None, int]:
    import torch

    return os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()


def test_workers_have_one_thread(cluster: Cluster) -> None:
    assert ray_map(thread_settings, [0], cluster=Cluster(1, 0.0)) == [("1", 1)]


def test_a_cluster_that_cannot_hold_a_worker_is_refused(cluster: Cluster) -> None:

    with pytest.raises(InputError, match="0 GPUs"):
        fitting({"CPU": 4}, None, 0.5)
    assert fitting({"CPU": 16, "GPU": 2}, None, 0.25) == Cluster(8, 0.25)


OWN_RAY = """
import os
from pathlib import Path

from orchestrator.cluster import ray_cluster
from orchestrator.pool import Pool

with ray_cluster(workers=1) as cluster:
    for token in ("0" * 64, "1" * 64):
        Path(os.environ["HOME"], ".ray").mkdir(exist_ok=True)
        Path(os.environ["HOME"], ".ray", "auth_token").write_text(token)
        with Pool(cluster, dict, patience_seconds=60.0) as pool:
            print(os.environ["RAY_AUTH_MODE"], pool.map(lambda _, number: number + 1, range(3)))
"""


def test_a_ray_of_our_own_does_not_hang_on_a_token_that_others_change(tmp_path: Path) -> None:
    user = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    words = [sys.executable, "-c", OWN_RAY]
    done = subprocess.run(words, cwd=ROOT, env=user, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "token [1, 2, 3]\n" * 2), done.stderr


COLLECTED_WHILE_RAY_ENDS = """
import gc

import ray._private.worker

from orchestrator.cluster import ray_cluster

gc.disable()


class Node:
    pass


class Core:
    def __init__(self, core):
        self.core = core

    def __getattr__(self, name):
        return getattr(self.core, name)

    def shutdown_driver(self):
        self.core.shutdown_driver()
        gc.collect()  # as another thread may, at this moment


with ray_cluster(workers=1):
    node = Node()
    node.itself, node.result = node, ray.put(1)
    del node
    worker = ray._private.worker.global_worker
    worker.core_worker = Core(worker.core_worker)
print("went on")
"""


def test_garbage_that_a_thread_collects_while_ray_ends_does_not_end_the_process() -> None:
    """Ray ends a process that frees a reference to one of its objects then, without a word of Python's."""
    words = [sys.executable, "-c", COLLECTED_WHILE_RAY_ENDS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def kept_then_die_once(state: Path, number: int) -> str:
    """Keep a result; the worker of number 2 dies the first time, after the result is kept and before it is heard."""
    kept = state / str(number)
    if kept.exists():
        return f"{number} found"
    kept.touch()
    if number == 2:
        os.kill(os.getpid(), 9)
    return f"{number} made"


def test_trials_start_when_the_pool_before_them_has_failed_with_all_cores_in_its_hands(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle actor that keeps its core stops Tune for good. Tune leaves nothing behind, neither here nor at home."""
    with Pool(cluster, Path, (str(tmp_path),)) as pool, pytest.raises(WorkerDeathError):
        pool.map(die_on_three, range(6))
    scratch, home = tmp_path / "scratch", tmp_path / "home"
    scratch.mkdir()
    home.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "kept").mkdir()
    heard, begun = list[str](), Counter[int]()
    run_trials(
        kept_then_die_once,
        range(5),
        setup=Path,
        inputs=(str(tmp_path / "kept"),),
        workers=2,
        gpus_per_worker=0.0,
        done=heard.append,
        begun=lambda number: begun.update([number]),
    )
    assert sorted(heard) == ["0 made", "1 made", "2 found", "3 made", "4 made"]
    assert set(begun) == set(range(5))
    assert begun[2] == 2
    assert not list(scratch.glob("tune-*"))
    assert not (home / "ray_results").exists()
