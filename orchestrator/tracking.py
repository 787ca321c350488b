"""MLflow: a sweep's rows become runs under one parent, a campaign one run. Idempotent, replayable, never in the way."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator import logged
from orchestrator.contact import EXPERIMENT, answering, attempted, open_experiment, tracking_uri
from orchestrator.costs import Point, Stretch
from orchestrator.heartbeats import is_running, this_process
from orchestrator.mlflow_runs import DRIVER_TAG, add_dataset, attach, driver_of, release, search
from orchestrator.registry import canonical_json
from orchestrator.results import Role, Row, Sweep
from orchestrator.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "EXPERIMENT",
    "CampaignTracker",
    "Tracker",
    "connect",
    "connect_campaign",
    "replay_campaign",
    "tracking_uri",
]

SWEEP_TAG, KEY_TAG, KIND_TAG = "unlearn.sweep", "unlearn.key", "unlearn.kind"
ROLE_TAG = "unlearn.role"  # of a sweep's runs: reported, confirmed, or tuning, which settings were chosen by
CAMPAIGN_TAG, SCORES_TAG, GATE_TAG = "unlearn.campaign", "unlearn.scores", "unlearn.gate"
LEVEL_TAG = "unlearn.level"  # of a parent: what its children and files were level with
JOB_TAG = "unlearn.ray_job"  # the submission id of the Ray job that the command was
_PARENT = "mlflow.parentRunId"
_LEVEL = re.compile(r"(\d+) rows [0-9a-f]{32}")  # as _digest writes it


@dataclass
class Tracker:
    """Writes one sweep's rows to MLflow, each at most once: a run is known by (sweep key, run key).

    A row costs three requests: its run made, one log_batch of all parameters, metrics and series, and its end. The
    dataset is an input of the parent, and of a row the parameters `data` and `fingerprint`; specs are a file there.
    """

    client: MlflowClient
    experiment_id: str
    sweep: Sweep
    driver: str | None = None  # the process that is writing, empty where it is not known
    written: int = 0
    _level: str = ""
    _status: str = ""  # of the parent, as far as it is known
    _parents: list[Any] = field(default_factory=list)
    _parent: str = ""
    has_begun: bool = False
    _runs: dict[str, Any] | None = None  # run key -> a run that is not finished
    _finished: set[str] = field(default_factory=set)
    _unsure: set[str] = field(default_factory=set)  # runs that may have been made although the answer was lost
    _astray: list[str] = field(default_factory=list)  # runs of the sweep's rows that are not the parent's
    has_dataset: bool = False  # of the parent
    _ended: int | None = None  # the last row, where all is written later; None: now

    def look(self) -> None:
        """Ask for the parent, who writes it, and what it is level with; nothing is written."""
        parents = self._search(f"tags.`{KIND_TAG}` = 'sweep'")
        self._parents = sorted(parents, key=lambda run: (run.info.start_time, run.info.run_id))
        if self._parents:
            first = self._parents[0]
            self._parent, self._status = first.info.run_id, first.info.status
            self.driver, self.has_dataset = driver_of(first), bool(first.inputs and first.inputs.dataset_inputs)
            said = _LEVEL.fullmatch(first.data.tags.get(LEVEL_TAG, ""))  # else somebody changed it
            self._level = said[0] if said and self._has_children(int(said[1])) else ""

    def _search(self, filter_string: str) -> list[Any]:
        """The sweep's runs that match."""
        return search(self.client, self.experiment_id, f"tags.`{SWEEP_TAG}` = '{self.sweep.key}' and {filter_string}")

    def _has_children(self, number: int) -> bool:
        """Whether so many rows are there, whole: one that was deleted or given away would be missed by nothing else."""
        from mlflow.exceptions import MlflowException
        from mlflow.utils.search_utils import SearchUtils

        filter_string = f"tags.`{_PARENT}` = '{self._parent}' and tags.`{KIND_TAG}` = 'run' and status = 'FINISHED'"
        token = SearchUtils.create_page_token(number - 1).decode() if number > 1 else None  # type: ignore[no-untyped-call]
        try:  # the last of them alone; MLflow has no call that counts
            page = self.client.search_runs([self.experiment_id], filter_string, max_results=1, page_token=token)
        except MlflowException:  # a server whose pages have other names: every run is looked at instead
            return False
        return len(page) == min(number, 1) and not page.token

    def begin(self, process: str | None = None) -> None:
        """Make the parent ready to be written, if it is not; by a process that computes the sweep it is running."""
        if self.has_begun:
            return
        if not self._parents:
            self._parents = [self.client.create_run(self.experiment_id, self._began, tags=self._parent_tags())]
            self._parent, self._status = self._parents[0].info.run_id, "RUNNING"
        while len(self._parents) > 1:  # of two commands that began in the same moment
            self._adopt(self._parents.pop().info.run_id)
        self._is_live = process is not None
        if process is not None:
            self.client.set_tag(self._parent, DRIVER_TAG, process)
            self.client.update_run(self._parent, status="RUNNING")
            self._status, self.driver = "RUNNING", process
        self.client.log_dict(self._parent, dict(self.sweep.study), "study.json")
        self.has_begun = True
        self._gather()

    @property
    def _began(self) -> int:
        return int(self.sweep.provenance.get("created_at", time.time()) * 1000)

    def _parent_tags(self) -> dict[str, str]:
        said, recipe = self.sweep.provenance, self.sweep.recipe
        tags = {
            SWEEP_TAG: self.sweep.key,
            KIND_TAG: "sweep",
            "unlearn.recipe": recipe,
            "mlflow.runName": f"{recipe} {self.sweep.key[:8]}",
            "mlflow.note.content": f"{len(self.sweep.members)} runs of the recipe {recipe}",
            **logged.commit_tags(said.get("git_commit")),
            **({JOB_TAG: said["ray_job"]} if said.get("ray_job") else {}),
        }
        return {name: logged.cut(value, logged.MAX_TAG) for name, value in tags.items()}

    def _adopt(self, parent: str) -> None:
        """Give the children of a spare parent to the one that stays."""
        self._astray += [run.info.run_id for run in self._search(f"tags.`{_PARENT}` = '{parent}'")]
        self._gather()
        self.client.delete_run(parent)

    def _gather(self) -> None:
        """Give the parent those of the sweep's rows that belong to another, which may be gone."""
        while self._astray:
            self.client.set_tag(self._astray[-1], _PARENT, self._parent)
            self._astray.pop()

    def is_level(self, keys: Iterable[str]) -> bool:
        """Whether an earlier command left the parent level with these rows: cheaper than to look at every run."""
        return bool(self._level) and self._level == _digest(keys)

    def is_over(self, status: str, keys: Iterable[str]) -> bool:
        """Whether nothing is left to be said of a sweep with these rows that ended so."""
        return self._status == status and self.driver is None and len(self._parents) == 1 and self.is_level(keys)

    def find(self, keys: Collection[str] | None = None) -> None:
        """Look at what is there of the sweep's rows; of a row that is there twice, the spare run is deleted.

        So is a run that says it is of another row than these `keys`, where all are known.
        """
        kept, spare = dict[str, Any](), list[str]()
        for run in sorted(self._search(f"tags.`{KIND_TAG}` = 'run'"), key=_doubts):
            key = run.data.tags.get(KEY_TAG, "")
            if key in kept or (keys is not None and key not in keys):
                spare.append(run.info.run_id)
            else:
                kept[key] = run
        for name in spare:
            self.client.delete_run(name)
        self._finished = {key for key, run in kept.items() if run.info.status == "FINISHED"}
        # left half-written by a driver that died: written again, under the same id
        self._runs = {key: run for key, run in kept.items() if key not in self._finished}
        self._astray = [run.info.run_id for run in kept.values() if run.data.tags.get(_PARENT) != self._parent]
        if self._astray:
            self._level = ""
        if self.has_begun:
            self._gather()

    def lacks(self, key: str) -> bool:
        """Whether a row is not there, or not whole."""
        if self._runs is None:
            self.find()
        return key not in self._finished

    def write(self, row: Row, arm: str, role: Role = "reported") -> bool:
        """Write a row as a child run; False where it is there already. Raises RefusedError where it never will be."""
        from mlflow.entities import Metric, Param

        stamp = int(row.provenance["finished_at"] * 1000)  # fixed, so that writing again adds no point
        typed = logged.typed_params(row, arm)
        with attempted():
            is_there = not self.lacks(row.key)
            if is_there and self.has_dataset:
                return False
            self.begin()
            self._add_dataset(row)
            if is_there:
                return False
            run = self._run(row, arm, role, stamp)
            texts = {name: text for name, text in logged.params(typed).items() if name not in run.data.params}
            metrics = [Metric(name, value, stamp, 0) for name, value in logged.numbers(row, typed).items()]
            room = logged.MAX_ENTITIES - len(metrics) - len(texts)
            metrics += [Metric(name, value, stamp, epoch) for name, epoch, value in logged.points(row, room)]
            params = [Param(name, text) for name, text in texts.items()]
            self.client.log_batch(run.info.run_id, metrics=metrics, params=params)
            self.client.set_terminated(run.info.run_id, "FINISHED", end_time=stamp)
        self._finished.add(row.key)
        self._ended = None if self._is_live else max(stamp, self._ended or 0)
        self.written += 1
        return True

    def _run(self, row: Row, arm: str, role: Role, stamp: int) -> Any:
        """The run of a row: the one that is there, or a new one."""
        assert self._runs is not None
        if row.key in self._unsure:
            for found in self._search(f"tags.`{KEY_TAG}` = '{row.key}'"):
                self._runs[row.key] = found
        if row.key not in self._runs:
            self._unsure.add(row.key)
            began = stamp - int(row.provenance["seconds"] * 1000)
            self._runs[row.key] = self.client.create_run(self.experiment_id, began, tags=self._tags(row, arm, role))
        self._unsure.discard(row.key)
        return self._runs[row.key]

    def _tags(self, row: Row, arm: str, role: Role) -> dict[str, str]:
        tags = {
            SWEEP_TAG: self.sweep.key,
            KEY_TAG: row.key,
            KIND_TAG: "run",
            ROLE_TAG: role,
            _PARENT: self._parent,
            "mlflow.runName": f"{arm} {row.spec['forget']['rule']['name']} {row.key[:8]}",
            "unlearn.host": str(row.provenance.get("host", "")),
            **logged.commit_tags(row.provenance.get("git_commit")),
        }
        return {name: logged.cut(value, logged.MAX_TAG) for name, value in tags.items() if value}

    def _add_dataset(self, row: Row) -> None:
        if not self.has_dataset:
            source = canonical_json(self.sweep.study.get("data", {}))
            add_dataset(self.client, self._parent, row.provenance["data"], row.spec["setting"]["data"], source)
            self.has_dataset = True

    def attach(self, files: Mapping[str, bytes]) -> None:
        """Put files at the parent, by name; one of that name that is there is replaced."""
        if not files:
            return
        with attempted():
            self.begin()
            attach(self.client, self._parent, files)

    def finish(self, status: str, level: Iterable[str] | None = None) -> None:
        """End the parent as FINISHED, FAILED or KILLED, and say which rows it is level with, unless it is so."""
        with attempted():
            level = None if level is None else list(level)
            if level is not None and self.is_over(status, level):
                return
            self.begin()
            self._gather()
            if level is not None and not self.is_level(level):
                self.client.set_tag(self._parent, LEVEL_TAG, _digest(level))
            if self._status != status:
                self.client.set_terminated(self._parent, status, end_time=self._ended)
            if self.driver is not None:
                release(self.client, self._parent)


@dataclass
class CampaignTracker:
    """Writes one campaign to MLflow: a single run, known by the campaign's key, that goes on as the campaign grows."""

    client: MlflowClient
    experiment_id: str
    stretch: Stretch
    driver: str | None = None  # the process that is writing, empty where it is not known
    _run: str = ""

    def start(self, process: str | None) -> None:
        """Find the campaign's run, or make it; by a process that trains its models it is running, and says so."""
        from mlflow.entities import Param

        campaign = self.stretch.campaign
        runs = search(self.client, self.experiment_id, f"tags.`{CAMPAIGN_TAG}` = '{campaign}'")
        if not runs:
            begin = int(self.stretch.created * 1000)
            runs = [self.client.create_run(self.experiment_id, start_time=begin, tags=self._tags())]
        run, *spare = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
        for other in spare:  # of two commands that began in the same moment; its points are in the store
            self.client.delete_run(other.info.run_id)
        self._run = run.info.run_id
        self.driver = driver_of(run)
        if process is not None:
            self.client.set_tag(self._run, DRIVER_TAG, process)
            self.client.update_run(self._run, status="RUNNING")
            self.driver = process
        known, typed = run.data.params, logged.campaign_params(self.stretch)
        if params := [Param(name, text) for name, text in typed.items() if name not in known]:
            self.client.log_batch(self._run, params=params)
            add_dataset(self.client, self._run, self.stretch.data, typed["fingerprint"], self.stretch.data)

    def _tags(self) -> dict[str, str]:
        recipe, campaign = self.stretch.recipe, str(self.stretch.campaign)
        return {
            CAMPAIGN_TAG: campaign,
            KIND_TAG: "campaign",
            "unlearn.recipe": recipe,
            "mlflow.runName": f"{recipe} campaign {campaign[:8]}",
            "mlflow.note.content": "Subset models of one memorization estimate; a step is the number of models.",
            **logged.commit_tags(self.stretch.git_commit),
            **({JOB_TAG: self.stretch.ray_job} if self.stretch.ray_job else {}),
        }

    def write(self, points: Sequence[Point]) -> None:
        """Write points; MLflow keeps one that it has already as it is, since moment, step and value are the same."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(point.time * 1000), point.models)
            for point in points
            for name, value in logged.by_legal_name(point.values.items()).items()
        ]
        with attempted():
            self.client.log_batch(self._run, metrics=metrics)

    def num_points(self) -> int:
        """How many points MLflow holds."""
        return len(self.client.get_metric_history(self._run, POINT_METRIC))

    def finish(self, stretch: Stretch, artifacts: Mapping[str, bytes]) -> None:
        """Say what the campaign came to and end the run, with files of these names attached to it."""
        with attempted():
            if stretch.scores_key is not None:
                self.client.set_tag(self._run, SCORES_TAG, stretch.scores_key)
                self.client.set_tag(self._run, GATE_TAG, "passed" if stretch.passes_gate else "failed")
            attach(self.client, self._run, artifacts)
            status = {"finished": "FINISHED", "failed": "FAILED"}.get(stretch.status, "KILLED")
            self.client.set_terminated(self._run, status, end_time=int(stretch.ended * 1000))
            if self.driver is not None:
                release(self.client, self._run)


POINT_METRIC = "device_hours"  # every point of a campaign has it


def connect(uri: str, store: Store, sweep: Sweep, *, live: bool = False) -> Tracker:
    """A tracker that only looks at a sweep, unless it is `live`; raises InputError where MLflow cannot be had."""
    with answering(uri):
        tracker = Tracker(*open_experiment(uri, store), sweep)
        tracker.look()
        if live:
            tracker.begin(this_process())
    return tracker


def connect_campaign(uri: str, store: Store, stretch: Stretch, *, live: bool = False) -> CampaignTracker:
    """A tracker for the campaign of a stretch of work; raises InputError where MLflow cannot be had."""
    with answering(uri):
        tracker = CampaignTracker(*open_experiment(uri, store), stretch)
        tracker.start(this_process() if live else None)
    return tracker


def end_abandoned(uri: str, store: Store) -> int:
    """End as KILLED what commands of this host that are gone had left running, known to the store or not; how many."""
    with answering(uri):
        client, experiment = open_experiment(uri, store)
        found = client.search_runs([experiment], f"attributes.status = 'RUNNING' and tags.`{DRIVER_TAG}` LIKE '%'")
        dead = [run.info.run_id for run in found if is_running(run.data.tags[DRIVER_TAG]) is False]
        for run in dead:
            client.set_terminated(run, "KILLED")
            release(client, run)
    return len(dead)


def probe(uri: str, store: Store) -> None:
    """Write a run with an artifact, and delete it; raises InputError where MLflow takes either not."""
    with answering(uri):
        client, experiment = open_experiment(uri, store)
        run = client.create_run(experiment, tags={KIND_TAG: "probe", "mlflow.runName": "unlearn doctor"})
        try:
            client.log_text(run.info.run_id, "written by unlearn doctor", "probe.txt")
        finally:
            client.set_terminated(run.info.run_id)
            client.delete_run(run.info.run_id)


def replay_campaign(
    tracker: CampaignTracker, stretches: Iterable[Stretch], ended: Stretch, artifacts: Mapping[str, bytes]
) -> int:
    """Write a campaign's points that MLflow lacks, and how it `ended`; returns how many points were new."""
    before = tracker.num_points()
    for stretch in stretches:
        tracker.write(stretch.points)
    tracker.finish(ended, artifacts)
    return tracker.num_points() - before


def _doubts(run: Any) -> tuple[bool, bool]:
    """What speaks against a run as that of its row: a name that another key gave it, and that it is not whole."""
    named = (run.info.run_name or "").endswith(run.data.tags.get(KEY_TAG, "")[:8])
    return not named, run.info.status != "FINISHED"


def _digest(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return f"{len(names)} rows {hashlib.sha256(canonical_json(names).encode()).hexdigest()[:32]}"
