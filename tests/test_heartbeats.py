"""Heartbeats: who lives, who died, and what becomes of what a dead command's workers were at."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from orchestrator import heartbeats, results
from orchestrator.heartbeats import Command, Heart, bury, get_commands, is_alive, living, this_process, worker_of
from orchestrator.recipes import RECIPES
from orchestrator.specs import OriginalSpec, key
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.tasks import Task, attempt_of

STUDY: Study = RECIPES["digits"].function()
TASKS = [Task("original", OriginalSpec(setting=STUDY.setting("0" * 32), seed=seed)) for seed in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeats, "STILL_SECONDS", 0.5)


def command(name: str = "1-a", **facts: object) -> Command:
    return replace(Command(name, "sweep digits", ("sweep",), "far", "other machine 7@1", 1.0), **facts)


def put(store: Store, *commands: Command) -> None:
    for each in commands:
        heartbeats._put(store, each)


def work(root: str, ready: multiprocessing.synchronize.Event) -> None:
    """A driver at two tasks, a third one done, until it is killed."""
    heartbeats.BEAT_SECONDS = 0.05
    heart = Heart(Store(root), "sweep digits")
    with heart.beating(["sweep"], lambda other: None):
        for task in TASKS:
            heart.begin(task)
        heart.end("original", key(TASKS[0].spec), TASKS[0].label)
        time.sleep(0.3)
        ready.set()
        time.sleep(60)


def killed(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    driver = context.Process(target=work, args=(store.root, ready))
    driver.start()
    assert ready.wait(60)
    (found,) = get_commands(store)
    assert is_alive(found) is True
    worker = worker_of(store, "sweep")
    assert worker is not None
    assert worker.name == found.name
    driver.kill()
    while driver.exitcode is None:  # not reaped by us before it is asked for: a zombie does not live
        if is_alive(found) is False:
            break
    driver.join()
    assert is_alive(found) is False


def test_a_killed_driver_leaves_what_it_was_at_and_the_next_command_says_it_was_interrupted(store: Store) -> None:
    killed(store)
    (dead,) = get_commands(store)
    assert (dead.status, len(dead.at_work)) == ("running", 2), "it could say nothing when it was killed"
    assert {attempt.status for attempt in dead.at_work.values()} == {"running"}
    assert worker_of(store, "sweep") is None
    store.put(TASKS[1].object_name, b"made, and nobody heard of it")
    met: list[Command] = []
    with Heart(store, "memorize digits").beating(["other"], met.append):
        pass
    assert not met
    (attempt,) = (tries[0] for tries in results.get_attempts(store).values())
    assert (attempt.key, attempt.status) == (key(TASKS[2].spec), "interrupted")
    assert attempt.error == "`sweep digits` ended while a worker was at it"
    assert attempt.provenance["objects"] == [TASKS[2].object_name]
    (buried,) = get_commands(store)
    assert (buried.status, buried.at_work) == ("interrupted", {})
    bury(store, dead)
    assert len(results.get_attempts(store)) == 1, "buried twice by two commands, it is one attempt"
    with Heart(store, "sweep digits").beating(["sweep", "campaign"], met.append):
        pass
    assert get_commands(store) == [], "brought to its end by a command on the same sweep"


def test_a_command_that_lives_buries_one_that_is_killed_beside_it(store: Store) -> None:
    """Later nobody could tell: what the dead one was at would have been made by who lives."""
    with Heart(store, "sweep digits").beating(["sweep"], lambda other: None):
        put(store, dead := died_at(TASKS[0]))
        deadline = time.monotonic() + 5
        while not results.get_attempts(store):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    (attempt,) = (tries[0] for tries in results.get_attempts(store).values())
    assert (attempt.key, attempt.status) == (key(TASKS[0].spec), "interrupted")
    assert dead.words in attempt.error


def died_at(task: Task) -> Command:
    gone = f"{this_process()}0"  # which began later
    return command("1-a", process=gone, at_work={"17": attempt_of(task, "running", "")})


def test_what_workers_are_at_is_in_the_store_long_before_the_next_beat(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SIGKILL leaves nothing but that."""
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 60.0)
    heart = Heart(store, "sweep digits")
    with heart.beating(["sweep"], lambda other: None):
        for task in [*TASKS, *TASKS]:
            heart.begin(task)
            deadline = time.monotonic() + 2
            while [each.key for each in get_commands(store)[0].at_work.values()] != [key(task.spec)]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            heart.end(task.kind, key(task.spec), task.label)


def test_an_interrupt_is_in_the_store_with_what_workers_were_at(store: Store) -> None:
    heart = Heart(store, "sweep digits")
    heart.begin(TASKS[0])
    with pytest.raises(KeyboardInterrupt), heart.beating(["sweep"], lambda other: None):
        raise KeyboardInterrupt
    (found,) = get_commands(store)
    assert found.status == "interrupted"
    assert [tries[0].status for tries in results.get_attempts(store).values()] == ["interrupted"]
    assert living(store, [found]) == set()


def test_a_signal_is_in_the_store_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 60.0)
    heart = Heart(store, "sweep digits")
    with heart.beating(["sweep"], lambda other: None):
        assert get_commands(store)[0].status == "running"
        heart.stop()
        deadline = time.monotonic() + 5
        while get_commands(store)[0].status == "running":
            assert time.monotonic() < deadline


def test_of_another_machine_the_beat_tells_and_no_clock(store: Store) -> None:
    """Both were written at the same moment by a clock that is years off; one of them beats."""
    still, beating = command("1-a", created=9e9), command("2-b", created=9e9, process="")
    put(store, still, beating)
    assert is_alive(still) is None
    met: list[str] = []
    heart = Heart(store, "sweep digits")
    with heart.beating(["sweep"], lambda other: met.append(other.name)):
        for beat in range(1, 16):
            put(store, replace(beating, beat=beat))
            time.sleep(0.06)
        assert met == ["2-b"]
        assert {c.name: c.status for c in get_commands(store)}["1-a"] == "interrupted"
        assert {c.name: c.status for c in get_commands(store)}["2-b"] == "running"


def test_a_reused_process_number_is_not_the_driver() -> None:
    machine, _, process = this_process().rpartition(" ")
    number = process.partition("@")[0]
    assert number == str(os.getpid())
    assert is_alive(command(process=this_process())) is True
    assert is_alive(command(process=f"{machine} {number}@1")) is False


def test_commands_that_live_are_met_and_work_goes_on_where_the_store_takes_no_beat(store: Store) -> None:
    put(store, command(process=this_process()))
    met: list[str] = []
    with Heart(store, "sweep digits").beating(["sweep"], lambda other: met.append(other.name)):
        assert met == ["1-a"]
    gone = Store("s3://nowhere-at-all/x", "http://127.0.0.1:9")
    with Heart(gone, "sweep digits").beating(["sweep"], lambda other: None):
        pass


def test_a_beat_costs_one_small_object(store: Store) -> None:
    heart = Heart(store, "sweep digits")
    with heart.beating(["sweep"], lambda other: None):
        for _ in range(500):
            for task in TASKS:
                heart.begin(task)
                heart.end("original", key(task.spec), task.label)
        assert store.names("") == [name for name in store.names("") if name.startswith("commands/")]
        assert len(store.names("commands")) == 1
    assert store.names("") == []


def test_of_commands_that_ask_at_once_one_leads_and_after_it_another(store: Store) -> None:
    """The dead are no rivals; who lives elsewhere, by its beat, is one."""
    elsewhere = command("0-a", about=("campaign",), leads=("campaign",))
    put(store, command("0-b", process=f"{this_process()}0", leads=("sweep",)), elsewhere)
    together, answers = threading.Barrier(6), list[bool]()

    def ask() -> None:
        heart = Heart(store, "sweep digits")
        with heart.beating(["sweep"], lambda other: None):
            together.wait()
            answers.append(heart.leads("sweep"))
            together.wait()

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 5 + [True]
    heart, is_over = Heart(store, "sweep digits"), threading.Event()

    def beat() -> None:
        for number in count(1):
            put(store, replace(elsewhere, beat=number))
            if is_over.wait(0.1):
                return

    beats = threading.Thread(target=beat)
    beats.start()
    with heart.beating(["sweep", "campaign"], lambda other: None):
        assert (heart.leads("sweep"), heart.leads("campaign")) == (True, False)
        is_over.set()
        beats.join()
