"""A cluster whose nodes leave and come, and one that sees another file system, with real nodes."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from jobs.doctor import examined
from orchestrator.cluster import Cluster, ray_cluster
from orchestrator.data import DATASETS
from orchestrator.experiment import Context, Workspace
from orchestrator.nodes import alive, one_root
from orchestrator.pool import NoWorkersError, Pool
from orchestrator.registry import InputError, read_plugin
from orchestrator.store import Store
from orchestrator.sweep import run_trials
from tests.commands import ROOT, run
from tests.faults import Nodes, machine, ray_nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes() as nodes:
        yield nodes


def large_square(folder: Path, number: int) -> np.ndarray:
    """A result too large to travel with its call: it stays on the node that computed it until it is fetched."""
    (folder / f"{number}-{time.time_ns()}").touch()
    time.sleep(0.15)
    return np.full(50_000, number * number)


def test_a_node_that_leaves_and_one_that_comes_change_nothing(nodes: Nodes, tmp_path: Path) -> None:
    """The worker of the node that left waits for another node, and the rest goes on without it."""
    first, second = nodes.add(), nodes.add()
    taken: list[int] = []

    def done(result: np.ndarray) -> None:
        taken.append(int(result[0]))
        if len(taken) == 4:
            nodes.remove(first)
        if len(taken) == 12:
            nodes.add()

    with ray_cluster(address=nodes.address) as cluster:
        assert cluster.workers == 2
        with Pool(cluster, Path, (str(tmp_path),), patience_seconds=300.0) as pool:
            results = pool.map(large_square, range(24), done)
            assert [int(result[0]) for result in results] == [number * number for number in range(24)]
            assert all((result == result[0]).all() for result in results)
            assert pool.usage.deaths == 1
            computed = len(list(tmp_path.iterdir()))
            assert 24 <= computed <= 28, "only what the node held may be computed twice"
            assert pool.map(square, range(6)) == [number * number for number in range(6)]
    nodes.remove(second)


USER = """
import sys

from orchestrator.cluster import ray_cluster
from orchestrator.pool import Pool

with ray_cluster(address=sys.argv[1]) as cluster, Pool(cluster, dict, patience_seconds=60.0) as pool:
    print(pool.map(lambda _, number: number + 1, range(3)))
"""


def test_a_user_with_a_token_reaches_a_cluster_that_wants_none(nodes: Nodes, tmp_path: Path) -> None:
    """Any Ray of our own leaves a token in the home folder, and Ray's calls back to a driver lack it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    node = nodes.add()
    user = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}

    def reach(**more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", USER, nodes.address]
        return subprocess.run(words, cwd=ROOT, env=user | more, capture_output=True, text=True, timeout=200)

    done = reach()
    # Ray prints among the driver's lines what befell other nodes: the ones that earlier tests took away.
    assert ("[1, 2, 3]" in done.stdout.splitlines(), done.returncode) == (True, 0), done.stdout + done.stderr
    assert "RAY_AUTH_MODE is token, and the cluster was started without" in reach(RAY_AUTH_MODE="token").stderr
    nodes.remove(node)


def square(_: Path, number: int) -> int:
    return number * number


def test_a_root_that_one_node_does_not_see_is_refused_by_name_and_a_shared_one_passes(
    nodes: Nodes, tmp_path: Path
) -> None:
    private, shared = tmp_path / "private", Store(str(tmp_path / "shared"))
    private.mkdir()
    for node in list(nodes.workers):
        nodes.remove(node)
    first = nodes.add()
    with machine(nodes.address, private, tmp_path), ray_cluster(address=nodes.address):
        deadline = time.monotonic() + 120  # nodes that were killed are listed for some seconds
        while sorted(node.name.startswith("elsewhere") for node in alive() if node.cores) != [False, True]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        refused = pytest.raises(InputError, match=r"elsewhere .*: the driver's marker is not there.*s3://")
        with refused, one_root(Store(str(private)), "nodes/marker"):
            pytest.fail("nothing may be started")
        with one_root(shared, "nodes/marker"):
            assert shared.names("nodes") == ["marker"], "kept for the workers of nodes that come later"
        assert shared.names("nodes") == []
        (private / "here").touch()
        plugin = tmp_path / "mine.py"
        plugin.write_text(f"open({str(private / 'here')!r})")
        found = examined([node for node in alive() if node.cores], Store(str(private)), (read_plugin(str(plugin)),))
        failed = [(line.check, line.where.split()[0]) for line in found if line.state == "failed"]
        assert failed == [("storage", "elsewhere"), ("plugin", "elsewhere")]
    lines = run("doctor", "--address", nodes.address, "--storage", shared.root, "--tracking-uri", "none")
    assert lines.returncode == 0, lines.stdout + lines.stderr
    assert f"warning token     {nodes.address}: whoever reaches these ports" in lines.stdout
    nodes.remove(first)


def test_a_cluster_of_another_version_is_refused_in_words(nodes: Nodes) -> None:
    """The cluster's own note of its version is changed, which Ray reads before it connects."""
    from ray._raylet import GcsClient

    client = GcsClient(address=nodes.address)
    note = client.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster")
    older = json.dumps({**json.loads(note), "ray_version": "2.51.0", "python_version": "3.12.4"}).encode()
    client.internal_kv_put(b"CLUSTER_METADATA", older, True, namespace=b"cluster")
    try:
        ours = f"Ray {version('ray')} and Python {platform.python_version()}"
        said = (
            f"runs Ray 2.51.0 and Python 3.12.4, this process {ours}, and they must be equal; run this in the cluster"
        )
        with pytest.raises(InputError, match=re.escape(said)), ray_cluster(address=nodes.address):
            pytest.fail("it must not connect")
    finally:
        client.internal_kv_put(b"CLUSTER_METADATA", note, True, namespace=b"cluster")


def test_workers_may_be_asked_for_before_there_is_a_node_that_holds_them(nodes: Nodes) -> None:
    """Of a cluster that an autoscaler fills from zero, as their waiting makes it do."""
    for node in list(nodes.workers):
        nodes.remove(node)
    with ray_cluster(address=nodes.address, workers=2) as cluster, ThreadPoolExecutor(1) as beside:
        assert cluster == Cluster(2, 0.0)
        squares = beside.submit(squares_of_six, cluster)
        time.sleep(1)
        assert not squares.done()
        node = nodes.add(2)
        assert squares.result(timeout=120) == [number * number for number in range(6)]
    nodes.remove(node)


def squares_of_six(cluster: Cluster) -> list[int]:
    with Pool(cluster, Path, (".",), patience_seconds=100.0) as pool:
        return pool.map(square, range(6))


def test_a_worker_on_a_node_that_came_later_checks_the_root_itself(tmp_path: Path) -> None:
    store, dataset = Store(str(tmp_path)), DATASETS["digits"]({}, {})
    with pytest.raises(InputError, match="not that of the driver on another"):
        Workspace(dataset, Context(store, host="another", marker="nodes/marker"))
    store.put("nodes/marker", b"driver")
    Workspace(dataset, Context(store, host="another", marker="nodes/marker"))


@pytest.mark.chaos
def test_when_all_nodes_have_left_the_map_waits_and_then_says_so(nodes: Nodes, tmp_path: Path) -> None:
    for node in list(nodes.workers):
        nodes.remove(node)
    last = nodes.add()
    with (
        ray_cluster(address=nodes.address) as cluster,
        Pool(cluster, Path, (str(tmp_path),)) as pool,
    ):
        pool.patience_seconds = 4.0

        def done(result: np.ndarray) -> None:
            if int(result[0]) == 1:
                nodes.remove(last)

        with pytest.raises(NoWorkersError, match=r"room for a worker for 4 s, \d+ of 20 items are done; add nodes"):
            pool.map(large_square, range(20), done)
        nodes.add()
        pool.patience_seconds = 60.0
        assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]


def wait_and_square(_: Path, number: int) -> int:
    time.sleep(0.3)
    return number * number


@pytest.mark.chaos
def test_trials_outlive_a_time_without_nodes_and_do_not_wait_for_ever(nodes: Nodes, tmp_path: Path) -> None:
    """Tune itself waits for ever, and says nothing."""
    for node in list(nodes.workers):
        nodes.remove(node)
    nodes.add()
    heard: list[int] = []

    def done(result: int) -> None:
        heard.append(result)
        if len(heard) in (2, 5):
            nodes.remove(nodes.workers[-1])
            if len(heard) == 2:
                nodes.add()

    def trials(items: list[int], patience_seconds: float) -> None:
        run_trials(
            wait_and_square,
            items,
            setup=Path,
            inputs=(str(tmp_path),),
            workers=2,
            gpus_per_worker=0.0,
            done=done,
            patience_seconds=patience_seconds,
        )

    with ray_cluster(address=nodes.address):
        with pytest.raises(NoWorkersError, match=r"room for a worker for 40 s, 5 trials are done; add nodes"):
            trials(list(range(8)), 40.0)
        assert sorted(heard) == sorted(set(heard))
        nodes.add()
        before = len(heard)
        trials([11, 12], 120.0)
        assert heard[before:] == [121, 144] or heard[before:] == [144, 121]
