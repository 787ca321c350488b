"""Real faults for the tests: a small disk, an S3 server behind a line in trouble, a Ray cluster that nodes leave."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from orchestrator.cluster import prepare_ray

_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes

Trouble = Literal["slow down", "no reason", "cut", "slow"]
_SLOW_SECONDS = 1.0  # before a line that is slow passes anything on

_BODY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an S3 server in a process of its own, with one bucket named `bucket`; credentials must be set."""
    port = free_port()
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for attempt in range(120):
            try:
                client: Any = boto3.client("s3", endpoint_url=url)
                client.create_bucket(Bucket="bucket")
                break
            except (BotoCoreError, ClientError):
                if server.poll() is not None or attempt == 119:
                    raise
                time.sleep(0.25)
        yield url
    finally:
        server.terminate()
        server.wait(10)


class Line:
    """A line to a server that is in trouble for as long as it is told to be. A context manager."""

    def __init__(self, endpoint: str) -> None:
        self._server = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._trouble: Trouble = "cut"
        self._until = 0.0
        self._open: set[socket.socket] = set()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.refused = self.delayed = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._hang_up()

    @property
    def is_well(self) -> bool:
        return time.monotonic() >= self._until

    def trouble(self, kind: Trouble, seconds: float) -> None:
        """From now on, and for so long: 503 SlowDown, 503 without a word, a line that goes dead, answers that tarry."""
        self._trouble, self._until = kind, time.monotonic() + seconds
        self._hang_up()

    def _hang_up(self) -> None:
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if time.monotonic() < self._until and self._trouble != "slow":
            self.refused += 1
            with client, suppress(OSError):
                self._refuse(client)
            return
        try:
            server = socket.create_connection(self._server)
        except OSError:  # the server has ended
            client.close()
            return
        self._open |= {client, server}
        for pair in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _refuse(self, client: socket.socket) -> None:
        if self._trouble == "cut":
            return
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(65536)
        body = b"" if self._trouble == "no reason" or head.startswith(b"HEAD") else _BODY
        client.sendall(b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):  # what is still on its way; closing before would take the answer back
            pass

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._trouble == "slow" and time.monotonic() < self._until:
                    self.delayed += 1
                    time.sleep(_SLOW_SECONDS)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[None]:
    """A file system of so many bytes, mounted there; the test is skipped where that is not allowed."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root on Linux")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Nodes:
    """A Ray cluster of a head without cores, which is no place for a worker, and of nodes that come and go."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self.workers: list[Any] = []

    def add(self, cores: int = 1) -> Any:
        node = self._cluster.add_node(num_cpus=cores, object_store_memory=_OBJECT_STORE_BYTES)
        self.workers.append(node)
        return node

    def lost(self) -> list[Any]:
        """The nodes whose processes have ended by themselves: on a busy machine Ray takes one for dead that is slow."""
        return [
            node for node in self.workers if any(i.process.poll() is not None for i in node.all_processes["raylet"])
        ]

    def remove(self, node: Any) -> None:
        """Kill a node's processes, its workers among them."""
        self.workers.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def machine(address: str, folder: Path, scratch: Path, cores: int = 1) -> Iterator[None]:
    """A node of a Ray cluster on what looks like another machine: its own host name, and a `folder` of its own."""
    script = f"hostname elsewhere && mount -t tmpfs tmpfs {folder} && exec ray start --block --address={address} "
    script += f"--num-cpus={cores} --object-store-memory={_OBJECT_STORE_BYTES} --disable-usage-stats"
    attempt = ["unshare", "-m", "--uts", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(attempt, capture_output=True).returncode:
        pytest.skip("another machine can only be made by root on Linux")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with open(scratch / "machine.log", "w") as log:
        process = subprocess.Popen(
            ["unshare", "-m", "--uts", "bash", "-c", script],
            env={**os.environ, "PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """A cluster on this machine with no node yet that could hold a worker."""
    scratch, handler = tempfile.mkdtemp(prefix="ray-", dir="/tmp"), signal.getsignal(signal.SIGTERM)
    os.mkdir(f"{scratch}/ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", scratch)  # where Ray notes the newest cluster of the machine, for all to use
        prepare_ray(is_client=True)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield Nodes(cluster)
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]
            signal.signal(signal.SIGTERM, handler)  # Ray sets one of its own with each node
            shutil.rmtree(scratch, ignore_errors=True)
