"""Who drives a command: a process of a host, and whether it is still there as far as this host can tell."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Driver:
    """A process: its host, its number, and when it began, since numbers are given again."""

    host: str
    pid: int
    began: str

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Driver | None:
        """A driver from its text; None where there is none."""
        try:
            return Driver(**json.loads(text))
        except (ValueError, TypeError):
            return None

    @property
    def is_alive(self) -> bool:
        """Whether it is a process of this host that runs; of another host's nothing can be known here."""
        return self._is_here and _exists(self.pid) and _began(self.pid) == self.began

    @property
    def is_dead(self) -> bool:
        """Whether it is a process of this host that has ended."""
        return self._is_here and not self.is_alive

    @property
    def _is_here(self) -> bool:
        return self.host == socket.gethostname()


def this_driver() -> Driver:
    """The process that asks."""
    return Driver(socket.gethostname(), os.getpid(), _began(os.getpid()))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _began(pid: int) -> str:
    """When a process began, in ticks since its host did; empty where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
