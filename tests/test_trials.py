"""Trials of Tune, and sweeps that choose on the way: a real Ray, on the digits; killed, resumed, stopped early."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jobs import sweep
from jobs.cli import app
from jobs.deadline import Deadline
from jobs.session import Options
from orchestrator import costs, results
from orchestrator.cluster import ray_cluster
from orchestrator.pool import WorkerDeathError
from orchestrator.progress import Watch
from orchestrator.store import TEMPORARY, Store
from tests.commands import command, here, rows
from tests.commands import run as process
from tests.test_jobs import kill_when

NO_RAY = {"RAY_ADDRESS": "127.0.0.1:1"}  # any use of Ray would fail at that address


# ---- run_trials ----------------------------------------------------------------------------------------------------


def nothing() -> None:
    return None


def work(_: None, item: Any, report: Callable[[Any], None]) -> Any:
    """Report three times, then give the item and the process that had it; die, or fall asleep before, if asked to."""
    if item == "dies":
        os._exit(7)
    for epoch in (1, 2, 3):
        report((item, epoch))
    return item, os.getpid()


def test_trials_are_taken_one_by_one_stopped_where_the_watch_says_and_given_up_after_their_tries() -> None:
    from orchestrator.sweep import run_trials

    heard: list[Any] = []
    stopped: list[tuple[Any, list[Any]]] = []
    known: list[int] = []

    def items() -> Iterator[Any]:
        for item in [*range(6), "dies"]:
            known.append(len(heard) + len(stopped))
            yield item

    watch = Watch(lambda item, progress: item == 2 and progress[1] == 2, lambda *told: stopped.append(told))
    with ray_cluster(workers=1) as cluster, pytest.raises(WorkerDeathError, match="2 workers died") as death:
        run_trials(
            work,
            items(),
            setup=nothing,
            inputs=(),
            workers=cluster.workers,
            gpus_per_worker=0.0,
            done=heard.append,
            tries=2,
            watch=watch,
        )
    assert [item for item, _ in death.value.lost] == ["dies"]
    assert known == [0, 1, 2, 3, 4, 5, 6], "an item was taken before the one before it was over"
    assert [item for item, _ in heard] == [0, 1, 3, 4, 5]
    assert stopped == [(2, [(2, 1), (2, 2)])]
    assert len({process for _, process in heard}) == 1, "a trial that was stopped cost its worker"


# ---- sweeps --------------------------------------------------------------------------------------------------------

SHARED = ["forget_sets=random", "references=1", "seeds=0,1", "training.epochs=1", "methods.finetune.epochs=3"]
SEARCHED = [*SHARED, "methods=finetune", "lr=loguniform(1e-3, 1e-1)"]


@dataclass
class Answer:
    """What a command came to."""

    returncode: int
    stdout: str


def run(*words: str, environment: dict[str, str] | None = None) -> Answer:
    """A command in this process, which has imported already what takes seconds."""
    result = CliRunner().invoke(app, list(words), env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return Answer(result.exit_code, result.output)


def words(store: Path, assignments: list[str], *more: str) -> list[str]:
    given = [word for assignment in assignments for word in ("--set", assignment)]
    return ["sweep", "digits", *given, "--storage", str(store), "--tracking-uri", "none", *more]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a small random search."""
    store = tmp_path_factory.mktemp("drawn") / "store"
    done = run(*words(store, SEARCHED, "--samples", "3", "--workers", "2"))
    assert done.returncode == 0, done.stdout
    return store


def rates(store: Path) -> dict[int, list[float]]:
    """The rates of fine-tuning by seed."""
    found: dict[int, list[float]] = {}
    for row in rows(store).values():
        spec: Any = row["spec"]
        if spec["method"]["name"] == "finetune":
            found.setdefault(spec["seed"], []).append(spec["method"]["options"]["lr"])
    return {seed: sorted(of) for seed, of in found.items()}


def test_a_random_search_runs_its_draws_for_every_seed_and_says_the_space(drawn: Path) -> None:
    found = rates(drawn)
    assert found[0] == found[1]
    assert len(set(found[0])) == 3
    assert all(0.001 <= rate <= 0.1 for rate in found[0])
    (sweep,) = results.get_sweeps(Store(str(drawn)))
    assert sweep.study["methods"]["finetune"]["options"]["lr"] == "loguniform(0.001, 0.1)"
    assert sweep.caution == ""
    more = run(*words(drawn, SEARCHED, "--samples", "5", "--dry-run"), environment=NO_RAY)
    assert "runs: 6 in the store, 4 to compute" in more.stdout


@pytest.mark.chaos
def test_a_killed_optuna_sweep_goes_on_with_the_same_choices(drawn: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for store in (whole, killed):
        shutil.copytree(drawn, store)
    search = ("--search", "optuna", "--samples", "4", "--search-seed", "3", "--workers", "1")
    done = run(*words(whole, SEARCHED, *search))
    assert done.returncode == 0, done.stdout
    assert "best accuracy/validation of 4 settings" in done.stdout
    before = len(rows(killed))
    kill_when(command(*words(killed, SEARCHED, *search)), killed, "rows/*.json", before + 3)
    first = suggestions(killed)
    assert 2 <= len(first) <= 4
    stamps = {path: path.stat().st_mtime_ns for path in (killed / "rows").glob("*.json")}
    asked = run(*words(killed, SEARCHED, *search, "--dry-run"), environment=NO_RAY)
    assert f"Optuna has chosen {len(first)} settings and will choose {4 - len(first)} more" in asked.stdout
    again = run(*words(killed, SEARCHED, *search))
    assert again.returncode == 0, again.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "a run was computed twice"
    assert suggestions(killed) == suggestions(whole)
    assert suggestions(killed)[: len(first)] == first
    assert rows(killed) == rows(whole)
    complete = run(*words(whole, SEARCHED, *search), environment=NO_RAY)
    assert complete.returncode == 0, complete.stdout
    assert "0 models trained" in complete.stdout


def suggestions(store: Path) -> list[dict[str, Any]]:
    (found,) = [list(sweep.suggestions) for sweep in results.get_sweeps(Store(str(store))) if sweep.suggestions]
    return [dict(values) for values in found]


def test_what_asha_stops_leaves_an_attempt_and_runs_again_without_it(drawn: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(drawn, store)
    before = set(rows(store))
    asha = [*SEARCHED, "scheduler.factor=2", "search.seed=1", "search.samples=5"]
    done = run(*words(store, asha, "--scheduler", "asha", "--workers", "2"))
    assert done.returncode == 0, done.stdout
    assert "not independent of the number of workers" in done.stdout
    new = {name: row for name, row in rows(store).items() if name not in before}
    attempts = results.get_attempts(Store(str(store)))
    assert new
    assert attempts
    assert len(new) + len(attempts) == 5 * 2
    assert not set(attempts) & set(rows(store)), "a run that was stopped has a row"
    for row in new.values():
        assert [len(values) for values in row["series"].values()] == [3]  # type: ignore[attr-defined]
    best: dict[int, float] = {}  # at the first epoch, where nobody has been stopped: who has the least loss goes on
    for row in new.values():
        seed, loss = row["spec"]["seed"], row["series"]["loss"][0]  # type: ignore[index]
        best[seed] = min(loss, best.get(seed, loss))
    for (tried,) in attempts.values():
        assert (tried.status, len(tried.provenance["series"]["loss"]) in (1, 2)) == ("stopped", True)
        assert tried.provenance["series"]["loss"][0] > best[tried.spec["seed"]]
    newest = max(costs.get_stretches(Store(str(store))), key=lambda stretch: stretch.created)
    assert len(newest.workers) <= 2, "a run that was stopped cost its worker"
    (caution,) = {sweep.caution for sweep in results.get_sweeps(Store(str(store))) if sweep.caution}
    assert caution.startswith("asha: after 1, 2, ... epochs the 1/2 of least loss go on")
    status = run("status", "--storage", str(store)).stdout
    assert "failed run" not in status
    again = run(*words(store, asha, "--scheduler", "asha"), environment=NO_RAY)
    assert again.returncode == 0, again.stdout
    assert f"0 runs were stopped early now and {len(attempts)} before, of 10" in again.stdout
    short = run(*words(store, asha, "--scheduler", "none", "--time-budget", "0.001s", "--workers", "1"))
    assert short.returncode == 124, short.stdout
    assert f"{len(attempts)} tasks are left" in short.stdout
    rest = run(*words(store, asha, "--scheduler", "none", "--workers", "2", "--max-concurrent", "1", "--retries", "0"))
    assert rest.returncode == 0, rest.stdout
    assert set(attempts) <= set(rows(store))
    for name, (tried,) in attempts.items():
        losses: Any = rows(store)[name]["series"]
        stopped = tried.provenance["series"]["loss"]
        assert losses["loss"][: len(stopped)] == stopped, "what was stopped is the beginning of what runs whole"


# ---- what ends a wave before it is over ------------------------------------------------------------------------------


def test_what_asha_stops_while_tuning_is_no_candidate_and_the_rest_confirms(drawn: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(drawn, store)
    before = set(rows(store))
    tuned = [*SHARED, "seeds=0", "methods=finetune", "methods.finetune.lr=0.1,0.01,0.001", "scheduler.factor=2"]
    tuned += ["tuning.seeds=100", "tuning.references=1"]
    given = words(store, tuned, "--tune", "tug_of_war_validation", "--scheduler", "asha", "--workers", "1")
    done = run(*given)
    assert done.returncode == 0, done.stdout
    assert "settings chosen for 1 of 1 cells" in done.stdout
    assert "2 runs were stopped early now and 0 before, of 4" in done.stdout
    tried = [attempt for tries in results.get_attempts(Store(str(store))).values() for attempt in tries]
    assert {a.spec["method"]["options"]["lr"]: a.status for a in tried} == {0.01: "stopped", 0.001: "stopped"}
    specs: list[Any] = [row["spec"] for name, row in rows(store).items() if name not in before]
    unlearned = [(s["seed"], s["method"]["options"]["lr"]) for s in specs if s["original_seed"] is not None]
    assert sorted(unlearned) == [(0, 0.1), (100, 0.1)], "tuned and confirmed; nothing that was stopped has a row"
    (record,) = [each for each in results.get_sweeps(Store(str(store))) if each.selections]
    assert "the 1/2 of least loss go on" in record.caution
    asked = run(*given, "--dry-run", environment=NO_RAY).stdout
    assert "tuning runs: 1 in the store, 2 stopped early, 0 to compute" in asked
    assert "runs: 1 in the store, 0 to compute" in asked
    again = run(*given, environment=NO_RAY)
    assert again.returncode == 0, again.stdout
    assert "0 models trained" in again.stdout
    assert "0 runs were stopped early now and 2 before, of 4" in again.stdout


@dataclass(frozen=True)
class Until(Deadline):
    """A deadline that passes once so many files are there: in the middle of a wave, on a machine of any speed."""

    folder: Path = Path()
    count: int = 0

    @property
    def has_passed(self) -> bool:
        return len(list(self.folder.glob("*"))) >= self.count


def test_a_time_budget_ends_within_a_wave_and_the_same_command_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "store"
    fields = ["forget_sets=random", "references=2", "seeds=0,1,2", "training.epochs=8", "methods=finetune,identity"]
    fields += ["methods.finetune.lr=0.001,0.01,0.1", "methods.finetune.epochs=1"]
    options = Options("digits", fields, str(store), "none", workers=1)

    def until(folder: str, count: int) -> None:
        with pytest.raises(typer.Exit) as end:
            here(sweep.run, replace(options, deadline=Until(folder=store / folder, count=count)))
        assert end.value.exit_code == 124
        assert not list(store.rglob(f"*{TEMPORARY}"))
        for name in rows(store):
            results.get_row(Store(str(store)), name)
            results.get_outputs(Store(str(store)), name)

    until("models", 1)
    tried = [tries[-1] for tries in results.get_attempts(Store(str(store))).values()]
    assert [(a.status, a.provenance["kind"]) for a in tried] == [("interrupted", "original")]
    assert "time budget" in tried[0].error
    assert rows(store) == {}
    until("rows", 2 + 4)
    half = {path: path.stat().st_mtime_ns for path in (store / "rows").glob("*.json")}
    assert 2 + 4 <= len(half) < 2 + 3 * 4
    assert len(results.get_attempts(Store(str(store)))) == 1, "what was begun as a trial came to its end"
    here(sweep.run, options)
    assert len(rows(store)) == 2 + 3 * 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in half.items()), "a run was computed twice"


MORTAL = """
import os, signal
from pathlib import Path
from torch import nn
from orchestrator.training import clone
from orchestrator.unlearning import METHODS

@METHODS
def mortal(model: nn.Module, *, deaths: int = 0) -> nn.Module:
    \"""Kill the process so many times, then leave the model as it is.\"""
    mark = Path({folder!r}) / str(deaths)
    if mark.exists() and mark.stat().st_size >= deaths or not deaths:
        return clone(model)
    with open(mark, "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_trial_whose_worker_is_killed_is_tried_again_as_often_as_asked_and_the_rest_goes_on(
    drawn: Path, tmp_path: Path
) -> None:
    store, plugin = tmp_path / "store", tmp_path / "mortality.py"
    shutil.copytree(drawn, store)
    plugin.write_text(MORTAL.format(folder=str(tmp_path)))
    before = set(rows(store))
    options = [*SHARED, "seeds=0", "methods=mortal,identity", "methods.mortal.deaths=0,1,9"]
    done = process(*words(store, options, "--plugin", str(plugin), "--retries", "1", "--workers", "1"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed; the first: 2 workers died on it; the last: SYSTEM_ERROR" in " ".join(done.stdout.split())
    new: list[Any] = [row for name, row in rows(store).items() if name not in before]
    assert sorted(row["spec"]["method"]["options"].get("deaths", -1) for row in new) == [-1, 0, 1]
    tried = {}
    for tries in results.get_attempts(Store(str(store))).values():
        tried[tries[-1].spec["method"]["options"]["deaths"]] = [(each.status, each.error) for each in tries]
    assert {deaths: [status for status, _ in tries] for deaths, tries in tried.items()} == {
        1: ["interrupted"], 9: ["interrupted", "failed"]
    }  # fmt: skip
    assert all("SYSTEM_ERROR" in error for tries in tried.values() for _, error in tries), "the death is named"
    assert (tmp_path / "9").stat().st_size == 2, "tried as often as asked, and no more"
