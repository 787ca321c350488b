"""Whole campaigns under faults, as a user runs them: they cost time, and the scores are those of an undisturbed run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from orchestrator.store import Store
from tests.commands import ROOT, command, run
from tests.faults import Line, ray_nodes, s3_server, tmpfs

pytestmark = pytest.mark.chaos

OPTIONS = ["--set", "campaign.models=20", "--set", "training.epochs=4"]
MEMORIZE = ["memorize", "digits", *OPTIONS, "--workers", "2", "--storage"]


def campaign(store: Store) -> tuple[dict[str, np.ndarray], pa.Table]:
    """All that a campaign's models came to, but the seconds they took; and its scores."""
    blocks = [name for name in store.names("campaigns") if "/blocks/" in name]
    assert len(blocks) == 2
    assert not [name for name in store.names("campaigns") if "/parts/" in name], "models are kept beside their block"
    arrays = {}
    for name in blocks:
        for part, array in safetensors.numpy.load(store.get(f"campaigns/{name}")).items():
            if part != "seconds":
                arrays[f"{name} {part}"] = array
    (scores,) = (name for name in store.names("scores") if re.fullmatch(r"[0-9a-f]+\.parquet", name))
    return arrays, pq.read_table(pa.BufferReader(store.get(f"scores/{scores}"))).replace_schema_metadata(None)


def assert_same(found: Store, whole: Store) -> None:
    arrays, scores = campaign(found)
    expected, expected_scores = campaign(whole)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.tobytes() == expected[name].tobytes(), name
    assert scores.equals(expected_scores)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of a campaign that nothing disturbed."""
    store = tmp_path_factory.mktemp("whole") / "store"
    done = run(*MEMORIZE, str(store))
    assert done.returncode == 0, done.stderr
    return Store(str(store))


def disturbed(words: list[str], stored: Callable[[], int], fault: Callable[[int], Any]) -> tuple[int, str]:
    """Run a command; tell `fault`, again and again, how many models are stored. Its exit code, and what it said."""
    process = subprocess.Popen(
        command(*words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 280
    while process.poll() is None:
        assert time.monotonic() < deadline
        fault(stored())
        time.sleep(0.05)
    said, _ = process.communicate()
    return process.returncode, said


def models_in(folder: Path) -> int:
    found = list(folder.glob("campaigns/*/*/**/*.safetensors"))
    return sum(10 if "blocks" in path.parts else 1 for path in found)


def once(number: int, *actions: Callable[[], Any]) -> Callable[[int], None]:
    """A fault that strikes when so many models are stored, and again for each further action."""
    left = list(actions)

    def fault(stored: int) -> None:
        if left and stored >= number * (1 + len(actions) - len(left)):
            left.pop(0)()

    return fault


def test_nodes_that_leave_and_come_cost_a_campaign_nothing(whole: Store, tmp_path: Path) -> None:
    with ray_nodes() as nodes:
        first, second = nodes.add(), nodes.add()
        fault = once(3, lambda: nodes.remove(first), nodes.add, lambda: nodes.remove(second))
        words = [*MEMORIZE, str(tmp_path / "store"), "--address", nodes.address]
        code, said = disturbed(words, lambda: models_in(tmp_path / "store"), fault)
        assert code == 0, said
        assert second not in nodes.workers, "the campaign ended before its nodes left"
    assert_same(Store(str(tmp_path / "store")), whole)


def test_a_killed_driver_goes_on(whole: Store, tmp_path: Path) -> None:
    words = command(*MEMORIZE, str(tmp_path / "store"))
    for models in (2, 12):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while models_in(tmp_path / "store") < models:
            assert process.poll() is None, "the command ended before it could be killed"
            time.sleep(0.02)
        process.kill()
        process.wait()
    done = run(*MEMORIZE, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert_same(Store(str(tmp_path / "store")), whole)


def test_a_full_disk_ends_the_campaign_in_one_sentence_and_room_lets_it_go_on(whole: Store, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    words = [*MEMORIZE[:-1], "--tracking-uri", "none", "--storage", str(disk)]  # a database alone needs more room
    with tmpfs(disk, "500k"):
        full = run(*words)
        assert full.returncode == 1, full.stderr
        assert "Traceback" not in full.stderr
        said = [line for line in full.stderr.splitlines() if line.startswith("unlearn: ")]
        assert len(said) == 1
        assert f"storage root '{disk}' cannot keep" in said[0]
        assert "No space left on device; make room there and give the same command again" in said[0]
        assert not list(disk.rglob("*.partial")), "half-written files keep the disk full"
        kept = models_in(disk)
        assert kept < 20
        status = run("status", "--storage", str(disk))
        assert status.returncode == 0, status.stderr
        (disk / "fill").write_bytes(b"x" * shutil.disk_usage(disk).free)
        again = run(*words)
        assert (again.returncode, "No space left" in again.stderr, "Traceback" in again.stderr) == (1, True, False)
        (disk / "fill").unlink()
        subprocess.run(["mount", "-o", "remount,size=5m", str(disk)], check=True)
        done = run(*words)
        assert done.returncode == 0, done.stderr
        assert f"{20 - kept} models trained" in done.stdout
        assert_same(Store(str(disk)), whole)


def test_a_full_disk_ends_a_sweep_too(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    words = ["sweep", "digits", "--set", "forget_sets=random", "--set", "methods=identity,finetune", "--set"]
    words += ["references=1", "--set", "seeds=0,1", "--set", "training.epochs=2", "--set", "epochs=1,2"]
    words += ["--tracking-uri", "none", "--workers", "2", "--storage"]
    prepared = run("references", *words[1:-5], "--workers", "2", "--storage", str(tmp_path / "plenty"))
    assert prepared.returncode == 0, prepared.stderr
    with tmpfs(disk, "4m"):
        shutil.copytree(tmp_path / "plenty", disk, dirs_exist_ok=True)
        (disk / "fill").write_bytes(b"x" * (shutil.disk_usage(disk).free - 60_000))
        full = run(*words, str(disk))
        assert full.returncode == 1, full.stderr
        said = [line for line in full.stderr.splitlines() if line.startswith("unlearn: ")]
        assert len(said) == 1, full.stderr
        assert "No space left on device; make room there" in said[0]
        assert not list(disk.rglob("*.partial"))
        (disk / "fill").unlink()
        done = run(*words, str(disk))
        assert done.returncode == 0, done.stderr


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in {
        "ACCESS_KEY_ID": "testing",
        "SECRET_ACCESS_KEY": "testing",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with s3_server() as url:
        yield url


def test_an_s3_in_trouble_costs_a_campaign_time_alone(
    whole: Store, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = Store("s3://bucket/runs", endpoint)
    with Line(endpoint) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.url)
        fault = once(3, lambda: line.trouble("slow down", 6.0), lambda: line.trouble("cut", 6.0))

        def stored() -> int:
            return sum(10 if "/blocks/" in name else 1 for name in direct.names("campaigns"))

        line.trouble("no reason", 3.0)  # it is busy when the command starts, too
        code, said = disturbed([*MEMORIZE, direct.root], stored, fault)
        assert code == 0, said
        assert line.refused > 10, "the trouble was not felt"
    assert_same(direct, whole)


DEADLY = """
import os
from pathlib import Path
from orchestrator import pipeline
from orchestrator.seeds import generator

train = pipeline.train_subset_model

def deadly(*arguments, stream, **more):
    if Path({marker!r}).exists() and stream.initial_seed() == generator(0, "subset model", 1, 3).initial_seed():
        os.kill(os.getpid(), 9)
    return train(*arguments, stream=stream, **more)

pipeline.train_subset_model = deadly
"""


def test_a_model_that_kills_its_workers_is_named_and_the_others_are_trained(whole: Store, tmp_path: Path) -> None:
    marker, plugin = tmp_path / "deadly", tmp_path / "plugin.py"
    marker.touch()
    plugin.write_text(DEADLY.format(marker=str(marker)))
    words = [*MEMORIZE, str(tmp_path / "store"), "--plugin", str(plugin)]
    failed = run(*words)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert re.search(r"failed model \w+ \(3 of block 1\): 3 workers died on it", " ".join(failed.stdout.split()))
    assert models_in(tmp_path / "store") == 19
    assert "3 workers died" in run("status", "--storage", str(tmp_path / "store")).stdout
    marker.unlink()
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "1 models trained" in done.stdout
    assert_same(Store(str(tmp_path / "store")), whole)
    assert os.listdir(tmp_path / "store" / "attempts"), "what was tried is kept"
