"""Commands at work on a store: one object each, with a heartbeat and what its workers are at. Compares no clocks."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from orchestrator import results
from orchestrator.registry import InputError
from orchestrator.results import Attempt
from orchestrator.sealed import seal, unseal
from orchestrator.specs import key
from orchestrator.store import StorageError, Store
from orchestrator.tasks import Task, attempt_of

FOLDER = "commands"
BEAT_SECONDS = 5.0  # at least: one small put for a whole command, whatever the number of its trials
CHANGE_SECONDS = 0.1  # at most so often, where what workers are at has changed
_SHARE = 0.02  # of the time may go into beats that are not due: where a put is slow they are few
STILL_SECONDS = 30.0  # seen without a beat until a command of another machine counts as dead


@dataclass(frozen=True)
class Command:
    """A command that computes, as its driver last wrote it.

    about: the keys of the sweep and the campaign that it works on. process: which process of which machine it is,
    empty where the machine cannot say. beat: rises for as long as it lives. at_work: attempts (status `running`) at
    what its workers are at, by the number that each has in attempts/<key>/ once it is over. leads: those keys of
    `about` that of all living commands it alone writes to MLflow.
    """

    name: str
    words: str
    about: tuple[str, ...]
    host: str
    process: str
    created: float  # seconds since 1970, of its own clock: for people
    status: str = "running"
    beat: int = 0
    at_work: dict[str, Attempt] = field(default_factory=dict)
    leads: tuple[str, ...] = ()


def get_commands(store: Store) -> list[Command]:
    """The commands that are running or were interrupted, oldest first; one that ends well removes its object."""
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda name: _get(store, name), store.names(FOLDER)))
    return sorted((c for c in found if c is not None), key=lambda command: (command.created, command.name))


def _get(store: Store, name: str) -> Command | None:
    """A command; None where it has just ended, or where its object is damaged: nothing needs it."""
    try:
        body = unseal(store, f"{FOLDER}/{name}")
    except (FileNotFoundError, InputError):
        return None
    at_work = {number: Attempt(**attempt) for number, attempt in body.pop("at_work").items()}
    return Command(**body | {name: tuple(body.get(name, ())) for name in ("about", "leads")} | {"at_work": at_work})


def _put(store: Store, command: Command) -> None:
    store.put(f"{FOLDER}/{command.name}.json", seal(asdict(command)))


# ---- who lives -----------------------------------------------------------------------------------------------------


def living(store: Store, commands: Sequence[Command], wait_seconds: float = 2 * BEAT_SECONDS) -> set[str]:
    """The names of the commands whose drivers live.

    The machine that a driver runs on knows at once. Elsewhere its beat is watched for up to `wait_seconds`.
    """
    alive = {command.name: is_alive(command) for command in commands}
    watched = {command.name: command.beat for command in commands if alive[command.name] is None}
    deadline = time.monotonic() + wait_seconds
    while watched and time.monotonic() < deadline:
        time.sleep(min(0.5, wait_seconds))
        for name, beat in list(watched.items()):
            now = _get(store, f"{name}.json")
            if now is None or now.status != "running" or now.beat != beat:
                alive[name] = now is not None and now.status == "running"
                del watched[name]
    return {name for name, answer in alive.items() if answer}


def worker_of(store: Store, about: str) -> Command | None:
    """The living command that works on a sweep or campaign; None where there is none. May watch for ten seconds."""
    commands = [command for command in get_commands(store) if about in command.about]
    alive = living(store, commands)
    return next((command for command in commands if command.name in alive), None)


def is_alive(command: Command) -> bool | None:
    """Whether a command's driver lives; None where another machine must be asked, by watching its beat."""
    return is_running(command.process) if command.status == "running" else False


def is_running(process: str) -> bool | None:
    """Whether a process, as it called itself, runs; None where another machine must be asked."""
    machine, _, number = process.rpartition(" ")
    if not machine or machine != _machine():
        return None
    return _started(number.partition("@")[0]) == number


def process_number(process: str) -> str:
    """The number of a process, as it called itself; empty where it did not."""
    return process.rpartition(" ")[2].partition("@")[0]


def this_process() -> str:
    """Machine since its start, process namespace, process and when that began; empty where Linux does not say."""
    own = _started(str(os.getpid()))
    return f"{_machine()} {own}" if own and _machine() else ""


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: str) -> str | None:
    """`number@start` of a process that lives; a number is given to another process once it is free."""
    try:
        facts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if facts[0] in "ZX" else f"{process}@{facts[19]}"


# ---- the heart of a command ----------------------------------------------------------------------------------------


class Heart:
    """Keeps a command's object: a beat every few seconds, and what workers are at. Never fails or delays the work.

    Looks after those that died, too: what their workers were at becomes attempts of status `interrupted`.
    """

    def __init__(self, store: Store, words: str) -> None:
        self._store = replace(store, patience_seconds=0.0)  # a beat that cannot be written is followed by the next
        now = time.time()
        name = f"{int(now * 1000)}-{secrets.token_hex(4)}"
        self._command = Command(name, words, (), socket.gethostname(), this_process(), now)
        self._at_work: dict[tuple[str, str, str], tuple[str, Task]] = {}
        self._others: dict[str, tuple[int, float]] = {}  # not known to live or to be dead: beat, and when it was new
        self._changed, self._urgent, self._writing = threading.Event(), threading.Event(), threading.RLock()
        self._ended, self._is_interrupted = True, False

    def begin(self, task: Task) -> None:
        """A worker is at a task now."""
        self._at_work[_identity(task)] = str(time.time_ns()), task
        self._changed.set()

    def end(self, kind: str, key: str, label: str) -> None:
        """No worker is at it any more."""
        self._at_work.pop((kind, key, label), None)
        self._changed.set()

    def leave(self, why: str) -> None:
        """Keep what workers were at as interrupted attempts: the work ends here, and its command says so itself."""
        for number, task in list(self._at_work.values()):
            if not results.is_made(self._store, attempt := attempt_of(task, "interrupted", why)):
                results.put_attempt(self._store, attempt, int(number))
        self._at_work.clear()

    def stop(self) -> None:
        """Have the store say at once that the command was interrupted: a signal came, and little time may be left."""
        self._is_interrupted = True
        self._hurry()

    def _hurry(self) -> None:
        self._urgent.set()
        self._changed.set()

    @contextlib.contextmanager
    def beating(self, about: Sequence[str], met: Callable[[Command], None]) -> Iterator[None]:
        """Beat for as long as the work takes, and say at its end how it ended; `met` hears of each other that lives.

        Within another such block nothing is added, but that an interrupt is in the store before other things are ended.
        """
        if not self._ended:
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError, StorageError):
                    self._interrupt()
                raise
            return
        self._command, self._ended = replace(self._command, about=tuple(about), leads=()), False
        self._write()
        self._meet(met)
        thread = threading.Thread(target=self._run, args=(met,), name="heart", daemon=True)
        thread.start()
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            self._ended = True
            self._hurry()
            thread.join(BEAT_SECONDS)
            if not thread.is_alive():  # else the storage hangs: the beat stands still, which says it too
                with contextlib.suppress(OSError, StorageError):
                    self._close() if is_whole else self._interrupt()

    @property
    def about(self) -> tuple[str, ...]:
        """What the command works on, by key."""
        return self._command.about

    def others(self) -> list[Command]:
        """The living commands that work on something that this one works on. May watch for ten seconds."""
        about = set(self._command.about)
        found = [c for c in get_commands(self._store) if c.name != self._command.name and about & set(c.about)]
        alive = living(self._store, found)
        return [command for command in found if command.name in alive]

    def leads(self, what: str) -> bool:
        """Whether this command leads the work on a sweep or campaign, which one of those that live does at most.

        It says that it does before it looks for others, so of two that ask at once one at least sees the other. The
        younger of the two gives way, and the older where it is not given way to. While the store is away nobody leads.
        """
        try:
            if what in self._command.leads:
                return True
            self._put_leads((*self._command.leads, what))
            for pause in (0.5, 1.0, 1.5, 0.0):
                rivals = [other for other in self.others() if what in other.leads]
                if not rivals:
                    return True
                if any(rival.name < self._command.name for rival in rivals):
                    break
                time.sleep(pause)
            self._put_leads(tuple(name for name in self._command.leads if name != what))
        except (OSError, StorageError):
            self._command = replace(self._command, leads=tuple(n for n in self._command.leads if n != what))
        return False

    def _put_leads(self, leads: tuple[str, ...]) -> None:
        with self._writing:
            self._command = replace(self._command, leads=leads)
            _put(self._store, self._command)

    def _run(self, met: Callable[[Command], None]) -> None:
        took, looked = 0.0, -math.inf
        while not self._ended:
            pause = min(BEAT_SECONDS, max(CHANGE_SECONDS, took / _SHARE))
            self._urgent.wait(pause)
            self._changed.wait(BEAT_SECONDS - pause)
            self._urgent.clear()
            self._changed.clear()
            if not self._ended:
                began = time.monotonic()
                self._write()
                took = time.monotonic() - began
                if began - looked >= BEAT_SECONDS:
                    looked = began
                    with contextlib.suppress(OSError, StorageError):
                        self._look(met)

    def _write(self) -> None:
        with contextlib.suppress(OSError, StorageError), self._writing:
            at_work = {number: attempt_of(task, "running", "") for number, task in list(self._at_work.values())}
            status = "interrupted" if self._is_interrupted else "running"
            self._command = replace(self._command, status=status, beat=self._command.beat + 1, at_work=at_work)
            _put(self._store, self._command)

    def _interrupt(self) -> None:
        self._is_interrupted = True
        self._write()
        bury(self._store, self._command)

    def _close(self) -> None:
        """Remove the object, and those of interrupted commands that this one has brought to their end."""
        for other in get_commands(self._store):
            if other.status == "interrupted" and not other.at_work and set(other.about) <= set(self._command.about):
                self._store.delete(f"{FOLDER}/{other.name}.json")
        self._store.delete(f"{FOLDER}/{self._command.name}.json")

    def _meet(self, met: Callable[[Command], None]) -> None:
        """Greet the living, bury the dead, and keep an eye on those of which only their beat can tell."""
        with contextlib.suppress(OSError, StorageError):
            for other in get_commands(self._store):
                alive = is_alive(other)
                if other.name == self._command.name:
                    continue
                if alive:
                    met(other)
                elif alive is None:
                    self._others[other.name] = other.beat, time.monotonic()
                elif other.at_work or other.status == "running":
                    bury(self._store, other)

    def _look(self, met: Callable[[Command], None]) -> None:
        for each in get_commands(self._store):  # before this command has done again what a killed one was at
            if each.status == "running" and is_alive(each) is False:
                bury(self._store, each)
        for name, (beat, since) in list(self._others.items()):
            other = _get(self._store, f"{name}.json")
            if other is None or other.status != "running":
                del self._others[name]
            elif other.beat != beat:
                del self._others[name]
                met(other)
            elif time.monotonic() - since > STILL_SECONDS:
                del self._others[name]
                bury(self._store, other)


def bury(store: Store, dead: Command) -> None:
    """Keep what a command's workers were at when it ended as attempts of status `interrupted`; twice adds nothing."""
    for number, attempt in dead.at_work.items():
        if not results.is_made(store, attempt):
            said = replace(attempt, status="interrupted", error=f"`{dead.words}` ended while a worker was at it")
            results.put_attempt(store, said, int(number))
    _put(store, replace(dead, status="interrupted", at_work={}))


def _identity(task: Task) -> tuple[str, str, str]:
    return task.kind, key(task.spec), task.label
