"""A campaign and a sweep on a cluster, an S3 and an MLflow server, struck again and again by a seeded schedule.

Every row is there once and equal to that of an undisturbed run in all but provenance, and MLflow is level afterwards.
`UNLEARN_CHAOS_SEED` picks the schedule; what is struck when, and the totals, are printed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from orchestrator import results
from orchestrator.store import Store
from tests.commands import ROOT, command, run
from tests.faults import Line, Nodes, free_port, ray_nodes, s3_server

pytestmark = pytest.mark.chaos

SETTINGS = ["campaign.models=200", "training.epochs=2", "references=5", "seeds=0,1,2,3,4", "epochs=1"]
SETTINGS += ["forget_sets=random,most_memorized", "methods=identity,finetune,random_labels,del,random_within_tensor"]
SETTINGS += ["budget=0.05,0.1,0.2,0.3", "lr=0.03,0.1"]
SWEEP = ["sweep", "digits", *[word for setting in SETTINGS for word in ("--set", setting)]]
NUM_MODELS, NUM_TRIALS, NUM_REFERENCES = 200, 2 * 5 * 21, 10
NUM_STRIKES = {"worker": 9, "node": 4, "all nodes": 1, "driver": 3, "stop": 2, "tracking": 4, "storage": 4}
MINUTES = 25


def bodies(store: Store) -> dict[str, Any]:
    """Rows by key, without provenance; and each run's outputs, the campaign's models and its scores."""
    found: dict[str, Any] = {}
    for name in sorted(results.row_keys(store)):
        row = vars(results.get_row(store, name))
        found[name] = {part: value for part, value in row.items() if part != "provenance"}
        found[f"outputs of {name}"] = store.get(f"outputs/{name}.safetensors")
    for name in store.names("campaigns"):
        arrays = safetensors.numpy.load(store.get(f"campaigns/{name}"))
        found[name] = {part: array.tobytes() for part, array in arrays.items() if part != "seconds"}
    (scores,) = (name for name in store.names("scores") if re.fullmatch(r"[0-9a-f]+\.parquet", name))
    table = pq.read_table(pa.BufferReader(store.get(f"scores/{scores}")))
    found["scores"] = {column: np.asarray(table[column]).tobytes() for column in table.column_names}
    return found


class Tracking:
    """An `mlflow server` that can be killed and started anew on its port, behind a line that can be cut."""

    def __init__(self, folder: Path) -> None:
        self._port, self._folder = free_port(), folder
        self._process: subprocess.Popen[bytes] | None = None
        self.line = Line(f"http://127.0.0.1:{self._port}")

    def start(self) -> None:
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        words += ["--artifacts-destination", str(self._folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(
            words,
            env={**os.environ, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def tracking_server(folder: Path) -> Iterator[Tracking]:
    server = Tracking(folder)
    server.start()
    try:
        with server.line:
            yield server
    finally:
        server.kill()


def workers_of(nodes: Nodes) -> list[int]:
    """The processes on our nodes that are at work for a driver."""
    raylets = {str(info.process.pid) for node in nodes.workers for info in node.all_processes.get("raylet", [])}
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            if folder.name.isdigit() and (folder / "stat").read_text().rpartition(")")[2].split()[1] in raylets:
                words = (folder / "cmdline").read_bytes().decode()
                if words.startswith(("ray::_Worker", "ray::ImplicitFunc")):  # not Ray's own, without which a node ends
                    found.append(int(folder.name))
    return sorted(found)


@dataclass
class Chaos:
    """What strikes, and what was struck."""

    nodes: Nodes
    store: Store  # past the line that is in trouble
    storage: Line
    tracking: Tracking
    words: list[str]
    log: Path
    seed: int
    driver: subprocess.Popen[bytes] | None = None
    later: list[tuple[float, Callable[[], Any]]] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)

    def schedule(self) -> list[tuple[int, str, random.Random]]:
        """How many models and rows must be stored for each strike, in order; each has its own chance."""
        chance = random.Random(self.seed)
        kinds = [kind for kind, number in NUM_STRIKES.items() for _ in range(number)]
        chance.shuffle(kinds)
        places = sorted(chance.randint(5, NUM_MODELS + NUM_TRIALS * 3 // 4) for _ in kinds)
        return [(place, kind, random.Random(chance.random())) for place, kind in zip(places, kinds, strict=True)]

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def progress(self) -> int:
        models = sum(10 if "/blocks/" in name else 1 for name in self.store.names("campaigns"))
        return models + len(self.store.names("rows"))

    def _worker(self, chance: random.Random) -> str | None:
        workers = workers_of(self.nodes)
        if not workers:
            return None
        with suppress(ProcessLookupError):
            os.kill(chance.choice(workers), signal.SIGKILL)
        return f"one of {len(workers)}"

    def _node(self, chance: random.Random) -> str | None:
        if not self.nodes.workers:
            return None
        self.nodes.remove(chance.choice(self.nodes.workers))
        self._after(chance.uniform(1, 8), self.nodes.add)
        return f"{len(self.nodes.workers)} are left"

    def _all_nodes(self, chance: random.Random) -> str:
        for node in list(self.nodes.workers):
            self.nodes.remove(node)
            self._after(chance.uniform(4, 12), self.nodes.add)
        return "for a while"

    def _driver(self, chance: random.Random) -> str | None:
        return self._signal(signal.SIGKILL)

    def _stop(self, chance: random.Random) -> str | None:
        """As `ray job stop` does: SIGTERM, and SIGKILL three seconds later."""
        self._after(3.0, lambda: self._signal(signal.SIGKILL))
        return self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> str | None:
        if self.driver is None or self.driver.poll() is not None:
            return None
        self.driver.send_signal(number)
        return f"process {self.driver.pid}"

    def _tracking(self, chance: random.Random) -> str:
        if chance.random() < 0.5:
            self.tracking.kill()
            self._after(chance.uniform(1, 10), self.tracking.start)
            return "killed"
        kind = chance.choice(["cut", "no reason"])
        self.tracking.line.trouble(kind, chance.uniform(2, 15))
        return kind

    def _storage(self, chance: random.Random) -> str:
        kind = chance.choice(["cut", "no reason", "slow down", "slow"])
        self.storage.trouble(kind, chance.uniform(2, 10))
        return kind

    def _after(self, seconds: float, action: Callable[[], Any]) -> None:
        self.later.append((time.monotonic() + seconds, action))

    def _due(self) -> None:
        for node in self.nodes.lost():
            self.say("a node was lost that nobody struck, and another comes")
            self.struck["lost by itself"] += 1
            self.nodes.remove(node)
            self.nodes.add()
        for moment, action in list(self.later):
            if time.monotonic() >= moment:
                self.later.remove((moment, action))
                action()

    def run(self) -> None:
        """Give the command again and again until it has come to its end and nothing is left to strike."""
        strikes = self.schedule()
        for place, kind, _ in strikes:
            self.say(f"planned at {place}: {kind}")
        self.began = time.monotonic()
        while not self.ends[0]:
            assert time.monotonic() - self.began < 60 * MINUTES, "it takes too long"
            if self.driver is None:
                self.driver = subprocess.Popen(
                    command(*self.words), cwd=ROOT, stdout=self.log.open("ab"), stderr=subprocess.STDOUT
                )
                self.say(f"command {1 + self.ends.total()} is process {self.driver.pid}")
            self._due()
            done = self.progress()
            if strikes and done >= strikes[0][0] and (how := self._strike(strikes[0])):
                _, kind, _ = strikes.pop(0)
                self.struck[kind] += 1
                self.say(f"{done} stored: {kind}, {how}")
            if (code := self.driver.poll()) is not None:
                self.ends[code] += 1
                self.say(f"{done} stored: process {self.driver.pid} ended with {code}")
                early = -signal.SIGTERM  # stopped before Python could take a signal
                assert code in (0, 1, 2, 130, early, -signal.SIGKILL), self.log.read_text()[-5000:]
                self.driver = None
            time.sleep(0.2)
        for _, action in self.later:
            action()
        self.later.clear()
        assert sum(self.struck[kind] for kind in NUM_STRIKES) >= 20, (
            f"the command has ended before {len(strikes)} strikes"
        )

    def _strike(self, strike: tuple[int, str, random.Random]) -> str | None:
        _, kind, chance = strike
        how: str | None = getattr(self, f"_{kind.replace(' ', '_')}")(chance)
        return how


@pytest.fixture
def chaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chaos]:
    keys = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1"}
    for name, value in keys.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with s3_server() as url, Line(url) as line, tracking_server(tmp_path) as tracking:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.url)
        with ray_nodes() as nodes:
            for _ in range(3):
                nodes.add()
            store = Store("s3://bucket/runs", url)
            words = [*SWEEP, "--storage", store.root, "--address", nodes.address, "--tracking-uri", tracking.line.url]
            seed = int(os.environ.get("UNLEARN_CHAOS_SEED", "0"))
            made = Chaos(nodes, store, line, tracking, words, tmp_path / "log", seed)
            try:
                yield made
            finally:
                if made.driver is not None:
                    made.driver.kill()
                    made.driver.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run of the same command stores."""
    root = os.environ.get("UNLEARN_CHAOS_WHOLE") or str(tmp_path_factory.mktemp("whole") / "store")
    process = subprocess.run(
        command(*SWEEP, "--storage", root, "--tracking-uri", "none"), cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return bodies(Store(root))


def test_whatever_is_struck_every_row_is_there_once_and_mlflow_is_level(
    whole: dict[str, Any], chaos: Chaos, capfd: pytest.CaptureFixture[str]
) -> None:
    with capfd.disabled():
        print(f"\nUNLEARN_CHAOS_SEED={chaos.seed}")
        chaos.run()
        found = bodies(chaos.store)
        assert [name for name in whole if name not in found or found[name] != whole[name]] == []
        assert sorted(found.keys() - whole.keys()) == [], "a block's models are kept beside it"
        assert len(results.row_keys(chaos.store)) == NUM_TRIALS + NUM_REFERENCES
        time.sleep(15 if chaos.tracking.line.refused else 0)
        tracked = run("track", "--storage", chaos.store.root, "--tracking-uri", chaos.tracking.line.url)
        assert tracked.returncode == 0, tracked.stdout + tracked.stderr
        runs = mlflow_runs(chaos.tracking.line.url)
        kinds = Counter((run.data.tags["unlearn.kind"], run.info.status) for run in runs)
        assert kinds == {
            ("run", "FINISHED"): NUM_TRIALS + NUM_REFERENCES,
            ("sweep", "FINISHED"): 1,
            ("campaign", "FINISHED"): 1,
        }
        keys = [run.data.tags["unlearn.key"] for run in runs if run.data.tags["unlearn.kind"] == "run"]
        assert sorted(keys) == sorted(results.row_keys(chaos.store))
        attempts = Counter(a.status for tries in results.get_attempts(chaos.store).values() for a in tries)
        chaos.say(
            f"{chaos.struck.total()} strikes: {dict(chaos.struck)}; commands by exit code {dict(chaos.ends)}; "
            f"{chaos.storage.refused} requests refused by S3, {chaos.tracking.line.refused} by MLflow; "
            f"attempts {dict(attempts)}; {len(found)} rows, outputs, blocks and scores equal; MLflow {len(runs)} runs"
        )


def mlflow_runs(uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client, found, token = MlflowClient(tracking_uri=uri), [], None
    while True:
        page = client.search_runs(["1"], max_results=500, page_token=token)
        found += page
        if not (token := page.token):
            return found
