"""Sweeps that are interrupted, in every way there is: the store says so, and the same command goes on from there."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from jobs import status
from jobs.session import Options, open_session
from orchestrator import results
from orchestrator.experiment import Workspace
from orchestrator.heartbeats import Command, get_commands, is_alive
from orchestrator.store import Store
from tests.commands import ROOT, command, here, rows, run
from tests.faults import ray_nodes
from tests.test_submit import cluster, submit  # noqa: F401

PLUGIN = """
import time
from pathlib import Path
from orchestrator.training import clone
from orchestrator.unlearning import METHODS

@METHODS
def waits(model):
    '''Wait until a file is there.'''
    with open({file!r} + " calls", "a") as calls:
        calls.write("called\\n")
    while not Path({file!r}).exists():
        time.sleep(0.02)
    return clone(model)
"""


class Waiting:
    """A sweep of five runs, two of which wait until they are let go."""

    def __init__(self, folder: Path) -> None:
        self.file, self.root, self.processes = folder / "go", folder / "store", list[subprocess.Popen[str]]()
        plugin = folder / "plugin.py"
        plugin.write_text(PLUGIN.format(file=str(self.file)))
        few = ["training.epochs=1", "references=1", "seeds=0,1", "forget_sets=random", "methods=identity,waits"]
        self.words = ["sweep", "digits", "--plugin", str(plugin), "--storage", str(self.root), "--workers", "2"]
        self.words += [word for assignment in few for word in ("--set", assignment)]
        self.store = Store(str(self.root))

    def start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(*self.words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        return process

    def when(self, ready: Callable[[Command], bool]) -> Command:
        """The command of which this is true, once there is one."""
        deadline = time.monotonic() + 100
        while not (found := [command for command in get_commands(self.store) if ready(command)]):
            assert time.monotonic() < deadline, [process.poll() for process in self.processes]
            time.sleep(0.05)
        return found[0]

    def at_work(self) -> Command:
        """The command that lives, once its workers are at the runs that wait."""
        return self.when(
            lambda c: bool(is_alive(c)) and sum("waits on" in str(each) for each in c.at_work.values()) == 2
        )

    def statuses(self) -> dict[str, str]:
        """What MLflow says, by kind of run and method."""
        found = MlflowClient(tracking_uri=f"sqlite:///{self.root}/mlflow.db").search_runs(["1"], max_results=100)
        return {run.info.run_name.split(" ")[0]: run.info.status for run in found}

    def state(self) -> str:
        shown = here(status.run, Options("", (), str(self.root)))
        line = re.search(r"│ \w{8} │ digits │ [-0-9: ]+ │ (\w+) ", shown)
        assert line is not None, shown
        return line[1]


@pytest.fixture
def waiting(tmp_path: Path) -> Waiting:
    made = Waiting(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


@pytest.mark.chaos
def test_an_interrupt_among_the_trials_is_never_an_end_and_the_same_command_goes_on(waiting: Waiting) -> None:
    """Tune itself answers SIGINT by returning as if all were done."""
    process = waiting.start()
    waiting.at_work()
    process.send_signal(signal.SIGINT)
    waiting.when(lambda c: c.status == "interrupted")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert len(rows(waiting.root)) == 3
    attempts = [tries[-1] for tries in results.get_attempts(waiting.store).values()]
    assert sorted(a.provenance["what"] for a in attempts) == ["waits on random, seed 0", "waits on random, seed 1"]
    assert {a.status for a in attempts} == {"interrupted"}
    assert waiting.state() == "interrupted"
    assert waiting.statuses()["digits"] == "KILLED"
    assert "RUNNING" not in waiting.statuses().values()
    waiting.file.touch()
    done = run(*waiting.words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 models trained" in done.stdout
    assert len(rows(waiting.root)) == 5
    assert waiting.state() == "done"
    assert set(waiting.statuses().values()) == {"FINISHED"}
    assert get_commands(waiting.store) == []


def test_a_finished_run_is_missing_from_no_sweep_whatever_the_order_of_axes_and_arms(tmp_path: Path) -> None:
    """Rows are shared: two sweeps have what both ask for, and only the rest is left to do."""
    few = ["training.epochs=1", "references=1", "forget_sets=random", "epochs=1", "lr=0.1"]
    first = [*few, "seeds=0,1", "methods=identity,finetune,del", "budget=0.1,0.3"]
    second = [*few, "seeds=2,1,0", "methods=random_labels,del,finetune,identity", "budget=0.3,0.2,0.1"]
    session = open_session(Options("digits", first, str(tmp_path)))
    worker = Workspace(session.dataset, session.context)
    for tasks in session.plan.waves().values():
        for task in tasks:
            assert worker.perform(task).error is None
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("*")}
    assert len(stamps) == 1 + 2 * (1 + 1 + 2)
    assert not session.refreshed().plan.missing(session.plan.runs())
    other = open_session(Options("digits", second, str(tmp_path))).plan
    assert len(other.runs()) == 3 * (1 + 1 + 1 + 3)
    missing = other.missing([*other.references(), *other.runs()])
    assert len(missing) == len(other.runs()) - 2 * (1 + 1 + 2)
    for task in [*session.plan.runs(), *session.plan.originals(), *session.plan.localizations()]:
        assert worker.perform(task).models == 0, "what is there is found, also by a worker that is given it again"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("*")} == stamps


@pytest.mark.chaos
def test_two_drivers_on_one_cluster_do_not_mix_their_code(tmp_path: Path) -> None:
    """Tune finds a trainable by its name; both have one of the same name with methods of the same name."""
    both = []
    with ray_nodes() as nodes:
        nodes.add(4)
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            both.append(Waiting(tmp_path / name))
            both[-1].words += ["--address", nodes.address]
            both[-1].start()
        try:
            for waiting in both:
                waiting.at_work()
            both[0].file.touch()
            assert both[0].processes[0].wait(100) == 0
            assert len(rows(both[0].root)) == 5
            assert len(rows(both[1].root)) == 3, "its runs wait for another file"
            both[1].file.touch()
            assert both[1].processes[0].wait(100) == 0
            assert rows(both[0].root).keys() & rows(both[1].root).keys()
            assert len(rows(both[1].root)) == 5
        finally:
            for waiting in both:
                waiting.processes[0].kill()
                waiting.processes[0].wait()


@pytest.mark.chaos
def test_a_sweep_that_another_driver_is_at_says_so_and_after_a_kill_who_it_was(waiting: Waiting) -> None:
    first = waiting.start()
    waiting.at_work()
    second = waiting.start()
    waiting.when(lambda c: bool(is_alive(c)) and len(get_commands(waiting.store)) == 2)
    first.kill()
    first.wait()
    waiting.at_work()  # the second, which waited for the first one's runs
    assert waiting.state() == "running", "the second lives"
    second.send_signal(signal.SIGTERM)
    said, errors = second.communicate(timeout=60)
    assert second.returncode == 130, errors
    assert "another command is at work on the same sweep: `unlearn sweep digits`" in " ".join(said.split())
    assert f"process {first.pid}" in said
    assert waiting.state() == "interrupted"
    waiting.file.touch()
    done = run(*waiting.words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 models trained" in done.stdout
    assert "another command" not in done.stdout
    assert waiting.state() == "done"
    assert set(waiting.statuses().values()) == {"FINISHED"}
    statuses = [attempt.status for tries in results.get_attempts(waiting.store).values() for attempt in tries]
    assert statuses == ["interrupted"] * 4, "two runs, two drivers"


@pytest.mark.chaos
def test_two_commands_on_one_sweep_do_nothing_twice(waiting: Waiting) -> None:
    """Neither in the store nor in MLflow, where not even a run that was deleted again tells of the second."""
    first = waiting.start()
    waiting.at_work()
    second = waiting.start()
    waiting.when(
        lambda c: bool(is_alive(c)) and c.beat > 3 and c.process.rpartition(" ")[2].startswith(f"{second.pid}@")
    )
    waiting.file.touch()
    said = [process.communicate(timeout=100) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert Path(f"{waiting.file} calls").read_text() == "called\n" * 2
    assert "7 models trained" in said[0][0]
    assert "0 models trained" in said[1][0]
    assert len(rows(waiting.root)) == 5
    client = MlflowClient(tracking_uri=f"sqlite:///{waiting.root}/mlflow.db")
    found = client.search_runs(["1"], run_view_type=ViewType.ALL, max_results=100)
    assert sorted(run.data.tags["unlearn.kind"] for run in found) == ["run"] * 5 + ["sweep"]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert waiting.state() == "done"


@pytest.mark.chaos
def test_a_stopped_ray_job_is_interrupted_and_the_command_goes_on(
    cluster: tuple[str, dict[str, str]],  # noqa: F811
    waiting: Waiting,
) -> None:
    """`ray job stop` sends SIGTERM, and SIGKILL three seconds later."""
    address, user = cluster
    submitted = submit(["--address", address, "--submission-id", "stopped", "--no-wait", "--", *waiting.words], user)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    waiting.at_work()
    stop = ["ray", "job", "stop", "--address", address, "stopped"]
    subprocess.run(stop, env={**user, "RAY_AUTH_MODE": "token"}, check=True, capture_output=True, timeout=100)
    assert waiting.when(lambda c: not is_alive(c)).status == "interrupted", "said within the three seconds"
    assert waiting.state() == "interrupted"
    waiting.file.touch()
    done = run(*waiting.words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 models trained" in done.stdout
    assert waiting.state() == "done"
    assert set(waiting.statuses().values()) == {"FINISHED"}
    statuses = [attempt.status for tries in results.get_attempts(waiting.store).values() for attempt in tries]
    assert statuses == ["interrupted"] * 2


@pytest.mark.chaos
@pytest.mark.parametrize("seconds", [0.5, 3.0, 6.0, 9.0])
def test_a_driver_killed_while_it_starts_leaves_nothing_in_the_way(waiting: Waiting, seconds: float) -> None:
    process = waiting.start()
    time.sleep(seconds)
    process.kill()
    process.communicate()
    waiting.file.touch()
    done = run(*waiting.words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows(waiting.root)) == 5
    assert set(waiting.statuses().values()) == {"FINISHED"}
    assert waiting.state() == "done"
