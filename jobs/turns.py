"""The order in which a command takes up its tasks, where another that lives is at the same ones. Knows no locks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

from jobs.session import Session
from orchestrator.heartbeats import BEAT_SECONDS, Command
from orchestrator.specs import key
from orchestrator.store import StorageError
from orchestrator.tasks import Task

_SECONDS_BETWEEN_LOOKS = 10.0


def turns(session: Session, tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """The tasks in rounds: alone, all at once; with another command, first those that its workers are not at.

    Who leads begins at the front and the other at the back, so that they meet once; where there are more, each goes an
    order of its own. What another has finished by then, the worker that is given it finds in the store. What another is
    at is left to it for as long as it lives and is at it.
    """
    left = list(tasks)
    while left:
        others = _others(session)
        theirs = {(a.provenance["kind"], a.key, a.provenance["what"]) for each in others for a in each.at_work.values()}
        free = [task for task in left if (task.kind, key(task.spec), task.label) not in theirs] if theirs else left
        if free:
            yield _ordered(session, free, len(others))
            given = {id(task) for task in free}
            left = [task for task in left if id(task) not in given]
        else:
            session.options.deadline.check()
            time.sleep(BEAT_SECONDS)


def _others(session: Session) -> list[Command]:
    try:
        return session.heart.others()
    except (OSError, StorageError):  # the work itself says what is the matter with the storage
        return []


def _ordered(session: Session, tasks: list[Task], others: int) -> list[Task]:
    if not others or session.heart.leads(session.heart.about[-1]):
        return tasks
    return tasks[::-1] if others == 1 else random.sample(tasks, len(tasks))


def unfinished(session: Session, runs: Sequence[Task], found: Callable[[Task], None]) -> Iterator[Task]:
    """Runs one by one, but those that another command has finished, which `found` hears of."""
    looked, present = time.monotonic(), frozenset[str]()
    for task in runs:
        if time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
            looked, present = time.monotonic(), frozenset(f"rows/{name}" for name in session.store.names("rows"))
        if task.object_name in present:
            found(task)
        else:
            yield task
