"""Real faults for the tests: an S3 server, and a line to it that answers 503 or cuts connections for a while."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, Literal

import boto3
from botocore.exceptions import BotoCoreError, ClientError

Trouble = Literal["slow down", "no reason", "cut"]

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
        self.refused = 0

    def __enter__(self) -> Line:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._hang_up()

    def trouble(self, kind: Trouble, seconds: float) -> None:
        """From now on, and for so long: 503 SlowDown, 503 without a word, or a line that goes dead at once."""
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
        if time.monotonic() < self._until:
            self.refused += 1
            with client, suppress(OSError):
                self._refuse(client)
            return
        server = socket.create_connection(self._server)
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
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)
