"""A bounded queue of writes to a server that may be slow or gone: it never blocks nor fails who fills it."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable

QUEUE_SIZE = 10_000
LAST_SECONDS = 60.0  # for what is queued when a command ends
PATIENCE_SECONDS = 20.0  # of these, for a server that fails: one that was started anew answers by then
STOPPED_SECONDS = 2.0  # the same where it was stopped: `ray job stop` kills after three
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class RefusedError(Exception):
    """The server answers, and will not take this write at any later time either."""


class Outbox:
    """Does writes in order, in a thread of its own.

    A write that fails is tried again after a pause, so what a server missed while it was away it gets when it comes
    back; a refused one is given up. `missed` counts what was given up, did not fit, or was left at the end; `error`
    says why.
    """

    def __init__(self) -> None:
        self.missed, self.error = 0, ""
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue(QUEUE_SIZE)
        self._ending = threading.Event()
        self._lost = False
        self._given_up = math.inf
        self._thread = threading.Thread(target=self._drain, name="tracking", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[], object]) -> None:
        """Have something written; returns at once."""
        try:
            self._waiting.put_nowait(write)
        except queue.Full:
            self.missed += 1
            self.error = self.error or f"more than {QUEUE_SIZE} writes were waiting"

    def _drain(self) -> None:
        while (write := self._waiting.get()) is not None:
            if self._lost:
                self.missed += 1
            else:
                self._insist(write)

    def _insist(self, write: Callable[[], object]) -> None:
        """Do a write, again and again; once the end was asked for, for a while, and once at least."""
        pause = _FIRST_PAUSE
        while True:
            is_last_try = self._ending.is_set() and time.monotonic() >= self._given_up
            try:
                write()
                return
            except RefusedError as error:
                self.missed, self.error = self.missed + 1, str(error)
                return
            except Exception as error:  # tracking never fails a command
                self.error = str(error).strip() or type(error).__name__
            if is_last_try:
                self.missed, self._lost = self.missed + 1, True
                return
            if self._ending.wait(pause):
                time.sleep(max(0.0, min(_FIRST_PAUSE, self._given_up - time.monotonic())))
            else:
                pause = min(2 * pause, _LONGEST_PAUSE)

    def end(self, last: Callable[[], object], seconds: float = LAST_SECONDS) -> None:
        """Write what is queued, then what comes last; whatever is not done after so many seconds is left."""
        deadline = time.monotonic() + seconds
        self._given_up = time.monotonic() + min(PATIENCE_SECONDS, seconds / 2)
        self._ending.set()
        for write in (last, None):
            try:
                self._waiting.put(write, timeout=max(0.0, deadline - time.monotonic()))
            except queue.Full:
                break
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():  # it ends with the process
            self.missed += max(1, self._waiting.qsize() - 1)
            self.error = self.error or "the server is too slow"
        elif not self.missed:
            self.error = ""
