"""Real servers for the tests of tracking: MLflow, PostgreSQL, and a proxy that counts, refuses and hangs."""

from __future__ import annotations

import http.client
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import pytest

from tests.faults import free_port


class MlflowServer:
    """`mlflow server` in processes of its own, that can be killed and started again at the same place."""

    def __init__(
        self, backend: str, artifacts: str, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--workers", "1", "--backend-store-uri", backend, "--artifacts-destination", artifacts, *options]
        self._words = [word.format(port=self.port) for word in words]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._environment = {**os.environ, **quiet, **(environment or {})}
        self._folder = tempfile.mkdtemp(prefix="mlflow-")  # where it keeps its users
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        log = Path(self._folder, "log")
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                self._words, env=self._environment, cwd=self._folder, stdout=sink, stderr=sink, start_new_session=True
            )
        for _ in range(1200):
            with suppress(OSError, http.client.HTTPException):
                line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                line.request("GET", "/health")
                if line.getresponse().status == 200:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"mlflow server did not start: {log.read_text()[-3000:]}")

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def clean(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def mlflow_server(
    backend: str, artifacts: str, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[MlflowServer]:
    server = MlflowServer(backend, artifacts, options, environment)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        server.clean()


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL for this test; skipped where it is not installed, or root has no one to be it."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL is not installed (initdb and pg_ctl are not on PATH)")
    prefix = []
    if os.geteuid() == 0:  # which it refuses to be run by
        users = [user.pw_name for user in pwd.getpwall() if user.pw_name in ("postgres", "nobody")]
        if not users or shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody to run it")
        prefix = ["runuser", "-u", sorted(users)[-1], "--"]
    folder, port = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp")), free_port()
    if prefix:
        shutil.chown(folder, prefix[2])
    data = str(folder / "data")
    server = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        for words in (
            ["initdb", "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync"],
            ["pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", server, "start"],
        ):
            subprocess.run([*prefix, *words], check=True, capture_output=True, cwd=folder)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*prefix, "pg_ctl", "-D", data, "-m", "immediate", "stop"], capture_output=True, cwd=folder)
        shutil.rmtree(folder, ignore_errors=True)


class Proxy:
    """An HTTP proxy to a server: counts requests, and for as long as it is told to answers a status, or not at all."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition("//")[2].partition(":")
        self.target = (host, int(port))
        self.status: int | None = None
        self.hangs = False
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            place = self.path.partition("?")[0]
            proxy.requests.append(f"{self.command} {place.rpartition('mlflow/')[2]}")
            while proxy.hangs:
                time.sleep(0.05)
            if proxy.status is not None:
                return self._send(proxy.status, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}', {})
            line = http.client.HTTPConnection(*proxy.target, timeout=60)
            try:
                line.request(self.command, self.path, body, dict(self.headers))
                answer = line.getresponse()
                self._send(answer.status, answer.read(), dict(answer.headers))
            except OSError:
                self._send(502, b"", {})
            finally:
                line.close()

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            with suppress(OSError):
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return Handler
