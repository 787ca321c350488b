"""Submission to a real Ray with token authentication: our command, Ray's own, and what both refuse."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.pool import _wants_token

ROOT = Path(__file__).parent.parent
TINY = ["--set", "campaign.models=10", "--set", "training.epochs=1"]


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def environment(home: Path) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), "PATH": f"{binaries}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head started as the README says, with a token made first; its address and the environment of its user."""
    home = tmp_path_factory.mktemp("home")
    user = environment(home)
    subprocess.run(["ray", "get-auth-token", "--generate"], env=user, check=True, capture_output=True, timeout=60)
    port, dashboard, agent, client = free_ports(4)
    scratch = tempfile.mkdtemp(prefix="ray-")
    words = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    words += [f"--temp-dir={scratch}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    process = subprocess.Popen(
        words,
        env={**user, "RAY_AUTH_MODE": "token"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", dashboard), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert _wants_token(f"127.0.0.1:{port}") is True
    yield f"http://127.0.0.1:{dashboard}", user
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def submit(words: list[str], user: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", "submit", *words]
    return subprocess.run(command, cwd=ROOT, env=user, capture_output=True, text=True, timeout=240)


def test_a_submitted_command_runs_there_and_its_logs_and_exit_code_come_back(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, user = cluster
    store = tmp_path / "store"
    done = submit(["--address", address, "--", "memorize", "digits", *TINY, "--storage", str(store)], user)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 models trained" in done.stdout
    assert len(list(store.glob("campaigns/*/blocks/0.safetensors"))) == 1
    bad = submit(["--address", address, "--", "memorize", "digit", "--storage", str(store)], user)
    assert bad.returncode == 2, bad.stdout + bad.stderr
    assert "unknown recipe 'digit'" in bad.stdout


def test_rays_own_submission_works_and_a_relative_root_is_refused_there(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, user = cluster
    store = tmp_path / "store"
    ray_submit = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--"]
    few = ["references=2", "seeds=0", "forget_sets=random", "methods=identity,del", "budget=0.3", "lr=0.1", "epochs=1"]
    words = ["python", "-m", "jobs", "sweep", "digits", *TINY, *[word for part in few for word in ("--set", part)]]
    user = {**user, "RAY_AUTH_MODE": "token"}

    def ray_job(*storage: str) -> subprocess.CompletedProcess[str]:
        command = [*ray_submit, *words, *storage]
        return subprocess.run(command, cwd=ROOT, env=user, capture_output=True, text=True, timeout=240)

    done = ray_job("--storage", str(store))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((store / "rows").glob("*.json"))) == 4
    refused = ray_job()
    assert refused.returncode == 1
    assert "absolute path" in refused.stdout


def test_without_the_token_nothing_runs(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, _ = cluster
    stranger = environment(tmp_path)
    refused = submit(["--address", address, "--", "memorize", "digits", "--storage", str(tmp_path / "store")], stranger)
    assert refused.returncode == 2
    assert "token" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "store").exists()
