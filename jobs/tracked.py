"""A sweep as MLflow hears of it while it runs: its rows as they come, and files about it at the end."""

from __future__ import annotations

import io
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from jobs import work
from jobs.progress import console
from jobs.session import Session
from orchestrator import results, tracking
from orchestrator.contact import answering, redacted
from orchestrator.heartbeats import is_running, this_process
from orchestrator.outbox import LAST_SECONDS, STOPPED_SECONDS, Outbox, RefusedError
from orchestrator.registry import InputError, canonical_json
from orchestrator.results import Member, Sweep
from orchestrator.store import Store
from orchestrator.tracking import Tracker


class LiveTracking(Outbox):
    """Brings a sweep's rows, which are in the store by then, to MLflow. Nobody waits for it before the end.

    `leads` asks whether this command is the one to write; where another is, nothing is written before the end, when it
    is asked again. A sweep that MLflow is level with is only looked at.
    """

    def __init__(self, tracker: Tracker, store: Store, leads: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.tracker, self.store, self.leads = tracker, store, leads
        self.asked: set[str] = set()
        self.done: set[str] = set()
        self.is_left = False  # to the command that leads
        self._members: Mapping[str, Member] = {}
        self._is_writer = False

    def begin(self) -> None:
        """Have MLflow know, once, that the sweep is running; raises InputError where MLflow cannot be had."""
        if not self._is_writer and not self.is_left:
            self.is_left = not self.leads()
            if not self.is_left:
                with answering(self.tracker.client.tracking_uri):
                    self._take()
                self._is_writer = True

    def _take(self) -> None:
        if not self.tracker.has_begun:
            self.tracker.look()  # as the one who led before has left it
        self.tracker.begin(this_process())

    def put(self, keys: Iterable[str], members: Mapping[str, Member]) -> None:
        """Have these rows written, each as the member that it is, unless MLflow is level with them."""
        waiting, self._members = deque(keys), members
        self.asked |= {*waiting}
        if waiting and not self.tracker.is_level(self.asked):
            self.begin()
            if self._is_writer:
                self.submit(partial(self._write, waiting))
        else:
            self.done |= {*waiting}

    def _write(self, waiting: deque[str]) -> None:
        while waiting:
            member = self._members[waiting[0]]
            try:
                self.tracker.write(results.get_row(self.store, member.key), member.arm, member.role)
                self.done.add(member.key)
            except (RefusedError, InputError) as error:
                self.error = self.error or str(error)
            waiting.popleft()

    def close(self, status: str) -> None:
        """Write what is queued and, of a sweep that came to its end, files about it; then end the parent run."""
        is_stopped, sweep = status == "KILLED", self.tracker.sweep
        seconds = STOPPED_SECONDS if is_stopped else LAST_SECONDS
        if not self._is_writer:
            is_over = is_stopped or self.tracker.is_over(status, self.asked)
            self.is_left = self.is_left if is_over else not self.leads()
            if is_over or self.is_left:
                self.end(lambda: None, seconds)
                return
            self._is_writer = True
            self.submit(self._take)
            self.submit(partial(self._write, deque(self.asked)))
        sweep = results.get_sweep(self.store, sweep.key) or sweep  # its members may have become known as it ran
        attached = {} if is_stopped or self.tracker.is_level(self.asked) else files(self.store, sweep)
        self.end(partial(self._finish, status, attached), seconds)

    def _finish(self, status: str, attached: dict[str, bytes]) -> None:
        self.tracker.attach(attached)
        self.tracker.finish(status, self.done if self.done == self.asked else None)

    @property
    def missing(self) -> str:
        """What MLflow was not told, in a few words; empty where it was told all, or is told by another command."""
        if not self._is_writer:
            return ""
        if rows := len(self.asked - self.done):
            return f"{rows} of {len(self.asked)} rows"
        return "how the sweep ended" if self.missed else ""


@contextmanager
def tracked(session: Session, sweep: Sweep, uri: str | None, cost: work.Cost) -> Iterator[LiveTracking | None]:
    """Track a sweep at the URI, if there is one, and say at the end what was missed; it never fails the sweep."""
    if uri is None:
        yield None
        return
    tracker = tracking.connect(uri, session.store, sweep)
    with ExitStack() as closing:

        def leads() -> bool:
            closing.enter_context(work.beating(session, sweep.key))
            is_elsewhere = is_running(tracker.driver or "") and tracker.driver != this_process()  # on another store
            return session.heart.leads(sweep.key) and not is_elsewhere

        live, status = LiveTracking(tracker, session.store, leads), "KILLED"
        try:
            yield live
            status = "FAILED" if cost.failures else "FINISHED" if cost.is_whole else "KILLED"
        finally:
            live.close(status)
            _print_missing(live, redacted(uri))


def _print_missing(live: LiveTracking, place: str) -> None:
    if live.is_left:
        said = f"MLflow at {place} is left to the other command[/yellow], which is at the same sweep"
        console.print(f"[yellow]{said}; `unlearn track` brings it level if that one does not", highlight=False)
    elif live.missing:
        console.print(
            f"[yellow]MLflow at {place} missed {live.missing}[/yellow] ({live.error}); "
            "`unlearn track` brings it level with the store",
            highlight=False,
        )


def files(store: Store, sweep: Sweep) -> dict[str, bytes]:
    """What people want beside a sweep's numbers, by name: the report, its figures, its table, specs, what was exported.

    Made from the exported tables; what cannot be made is left out, and said.
    """
    from analysis import load, report, tables
    from jobs.report import exports
    from orchestrator.schemas import SCHEMA_VERSION, TABLES

    found = {"specs.jsonl": specs(store, sweep)}
    try:
        with exports(store) as folder, tempfile.TemporaryDirectory() as scratch:
            read = load.load(folder)
            sizes = {name: {"rows": len(getattr(read, name)), "columns": TABLES[name].names} for name in TABLES}
            about = {"export_id": read.export_id, "schema_version": SCHEMA_VERSION, "folder": store.url("exports")}
            found["tables.json"] = json.dumps(about | {"tables": sizes}, indent=1).encode()
            report.write(folder, Path(scratch) / "report.html", sweep.key)
            found["report.html"] = (Path(scratch) / "report.html").read_bytes()
            for path in report.pictures(folder, Path(scratch) / "figures", sweep.key):
                found[f"figures/{path.name}"] = path.read_bytes()
            text = io.BytesIO()
            tables.comparison_table(read, sweep.key).write_csv(text, float_precision=6)
            found["comparison.csv"] = text.getvalue()
    except (InputError, OSError) as error:
        console.print(f"[yellow]MLflow gets no report of the sweep[/yellow]: {error}", highlight=False)
    return found


def specs(store: Store, sweep: Sweep) -> bytes:
    """The full spec of each finished run of a sweep, one JSON object per line."""
    present = results.row_keys(store)
    lines = [
        canonical_json({"arm": member.arm, "key": member.key, "spec": results.get_row(store, member.key).spec})
        for member in sweep.members
        if member.key in present
    ]
    return ("\n".join(lines) + "\n").encode()
