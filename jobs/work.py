"""The waves on the pool, shared by the jobs: what is missing is computed, shown while it runs, and summed up."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import typer
from rich.markup import escape

from jobs import ledger
from jobs.gpus import shared
from jobs.ledger import Ledger
from jobs.progress import bars, console
from jobs.session import Session
from jobs.turns import turns
from orchestrator import campaigns
from orchestrator import plan as planning
from orchestrator.arms import CAMPAIGN
from orchestrator.campaigns import ScoresSummary
from orchestrator.cluster import Cluster, ray_cluster
from orchestrator.compiled import pays
from orchestrator.costs import Outcome
from orchestrator.data import Dataset
from orchestrator.experiment import Context, Workspace, memorization_scores
from orchestrator.heartbeats import Command, process_number
from orchestrator.nodes import one_root
from orchestrator.pool import Pool, WorkerDeathError
from orchestrator.specs import key
from orchestrator.tasks import Task, put_failure, scores_object

NAMES = {
    "model": "subset models",
    "single": "models for exact scores",
    "original": "originals",
    "proxies": "proxies",
    "run": "references",
    "localization": "localizations",
}


@dataclass
class Cost:
    """What a command computed, and what it found done."""

    outcomes: list[Outcome] = field(default_factory=list)
    cached: int = 0
    stopped: int = 0  # runs that a scheduler ended early
    again: set[str] = field(default_factory=set)  # keys of runs that failed before, and were to be tried again
    is_whole: bool = True  # nothing of what was planned is left
    ledger: Ledger | None = None  # of the stretch of work that is going on

    def hear(self, outcome: Outcome) -> None:
        """Take in what became of a task."""
        self.outcomes.append(outcome)
        if self.ledger is not None:
            self.ledger.hear(outcome)

    @property
    def models(self) -> int:
        return sum(outcome.models for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error]

    def line(self) -> str:
        trained, cpu = self.models, sum(outcome.cpu_seconds for outcome in self.outcomes)
        tasks = self.cached + len(self.outcomes)
        return f"{trained} models trained, {cpu:.0f} CPU seconds, {self.cached} of {tasks} tasks from the store"


@contextmanager
def cluster_of(session: Session, *about: str) -> Iterator[Cluster]:
    """Ray for this command, whose nodes see one root, and its heartbeat in the store, which says what it is `about`: a
    sweep, by its key. SIGTERM (what `ray job stop` sends) is an interrupt too.
    """
    options = session.options
    share = 1.0 if options.gpus_per_worker == "auto" else options.gpus_per_worker
    is_alone = not (options.address or os.environ.get("RAY_ADDRESS"))  # a Ray of our own, on this machine
    with (
        ray_cluster(address=options.address, workers=options.workers, gpus_per_worker=share) as cluster,
        _interruptible(session),
        nullcontext() if is_alone else one_root(session.store, session.context.marker),
        beating(session, *about),
    ):
        yield shared(session, cluster) if options.gpus_per_worker == "auto" else cluster


def beating(session: Session, *about: str) -> AbstractContextManager[None]:
    """The command's heartbeat, which says what it is about beside the study's campaign."""
    return session.heart.beating([*about, _campaign_key(session)], _print_other(about))


def device_of(cluster: Cluster) -> str:
    """Where the workers train."""
    return "cuda" if cluster.gpus_per_worker > 0 else "cpu"


def inputs_of(session: Session, cluster: Cluster, models: int) -> tuple[Dataset, Context, str]:
    """What a Workspace is made of, for a campaign of so many subset models, whatever is missing of it."""
    device, asked = device_of(cluster), session.options.compile
    is_compiled = pays(device, models) if asked == "auto" else asked == "on"
    return session.dataset, replace(session.context, compiled=is_compiled), device


@contextmanager
def _interruptible(session: Session) -> Iterator[None]:
    """Signals end the work, and the store says so at once: after SIGTERM, `ray job stop` gives three seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        session.heart.stop()
        raise KeyboardInterrupt

    # after ray.init, which installs handlers of its own
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])


def _campaign_key(session: Session) -> str:
    return key(session.study.campaign_spec(session.dataset.fingerprint))


def _print_other(about: Sequence[str]) -> Callable[[Command], None]:
    """Say that another command is at work on the store."""

    def said(other: Command) -> None:
        same = "the same sweep" if set(about) & set(other.about) else "this store"
        console.print(
            f"[yellow]another command is at work on {same}[/yellow]: {escape(shown(other))}; what one has finished the "
            "other takes from the store",
            highlight=False,
        )

    return said


def shown(command: Command) -> str:
    """A command, its machine and when it began, for people."""
    began = datetime.datetime.fromtimestamp(command.created).strftime("%Y-%m-%d %H:%M")
    number = process_number(command.process)
    return f"`unlearn {command.words}` ({command.host}{f', process {number}' if number else ''}, since {began})"


def prepare(session: Session, cluster: Cluster, wanted: Callable[[planning.Plan], Sequence[Task]], cost: Cost) -> None:
    """Perform the missing tasks that do not depend on scores, then the scores, then the rest, on one pool."""
    plan = session.plan
    tasks = plan.missing(wanted(plan))
    if any(task.kind == "run" for task in tasks):
        print_campaign(session)
    early = plan.models(task for task in tasks if task.kind == "block")
    early += [task for task in tasks if task.kind in ("original", "proxies")]
    late = [[task for task in tasks if task.kind == kind] for kind in ("run", "localization")]
    bases, built = _by_base(late[1])
    book = _ledger_of(session, cluster, early)
    book.prepare()
    inputs = inputs_of(session, cluster, session.study.campaign.models)
    with Pool(cluster, Workspace, inputs) as pool:
        console.print(f"{cluster.workers} workers ready in {pool.usage.startup_seconds:.1f} s")
        with keeping(book, cost, pool.usage.startup_seconds):
            perform(session, pool, early, cost)
        if any(task.kind == "model" for task in early):
            _print_utilisation(cost.outcomes, cluster.workers)
        if late[0] or late[1]:
            ensure_scores(session)
            with keeping(_ledger_of(session, cluster, late[0] + late[1]), cost):
                now = plan.against(session.store)
                perform(session, pool, now.ready(late[0] + bases), cost)
                perform(session, pool, now.ready(built), cost)


def _ledger_of(session: Session, cluster: Cluster, tasks: Sequence[Task]) -> Ledger:
    """What keeps the costs of these tasks: of a campaign, if there are models of one among them."""
    if not any(task.kind == "model" for task in tasks):
        return Ledger(session, cluster, ledger.stretch_of(session, None, cluster=cluster))
    campaign = session.study.campaign_spec(session.dataset.fingerprint)
    stretch = ledger.stretch_of(session, campaign, session.plan.campaign_counts()["done"], cluster)
    tally = campaigns.Tally(session.store, campaign, session.dataset, session.study.campaign.estimator)
    return Ledger(session, cluster, stretch, tally)


@contextmanager
def keeping(book: Ledger, cost: Cost, startup_seconds: float = 0.0) -> Iterator[None]:
    """Keep a record of what is computed inside."""
    with book.kept(startup_seconds):
        cost.ledger = book
        try:
            yield
        finally:
            cost.ledger = None


@contextmanager
def deaths(session: Session, done: Callable[[Outcome], None]) -> Iterator[None]:
    """Tasks that kill every worker become failed ones, known to the store and to `done`."""
    try:
        yield
    except WorkerDeathError as death:
        for task, reason in death.lost:
            put_failure(session.store, task, reason)
            done(Outcome(task.kind, key(task.spec), 0, 0.0, 0.0, 0.0, time.time(), reason, task.label))


def print_campaign(session: Session) -> None:
    """Say that subset models are trained first, where a forget set needs their scores, and what would do it alone."""
    plan = session.plan
    if plan.needs_scores and (missing := plan.campaign_counts()["missing"]):
        drawn = [rule for rule in session.study.forget_sets if "memorization" in rule.entry.inputs]
        names = [f"forget set {rule.name}" for rule in drawn if session.study.scores == CAMPAIGN]
        names += [f"method {name}" for name, arm in session.study.methods.items() if CAMPAIGN in arm.memorization()]
        console.print(
            f"{', '.join(names)} {'needs' if len(names) == 1 else 'need'} memorization scores: "
            f"{missing} subset models come first "
            f"(`unlearn memorize {session.options.recipe}` with the same options trains them alone)",
            highlight=False,
        )


def _by_base(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    bases = [task for task in tasks if getattr(task.spec, "base", None) is None]
    return bases, [task for task in tasks if task not in bases]


def perform(session: Session, pool: Pool[Workspace], tasks: Sequence[Task], cost: Cost) -> None:
    totals = Counter[str]()
    for task in tasks:
        totals[NAMES[task.kind]] += 1
    with bars(totals) as advance:

        def done(outcome: Outcome) -> None:
            session.heart.end(outcome.kind, outcome.key, outcome.label)
            cost.hear(outcome)
            advance(NAMES[outcome.kind], 1)
            if outcome.error:
                print_failure(outcome)
            session.options.deadline.check()

        for part in turns(session, tasks):
            with deaths(session, done):
                pool.map(Workspace.perform, part, done, session.heart.begin)


def print_failure(outcome: Outcome) -> None:
    """One line on a task that failed."""
    said = f"{outcome.kind} {outcome.key[:8]} ({outcome.label}): {outcome.error}"
    console.print(f"[red]failed[/red] {escape(said)}", highlight=False)


def utilisation(outcomes: Sequence[Outcome], workers: int) -> float:
    """Share of the campaign's worker-seconds, first model begun to last returned, spent in training and prediction."""
    models = [outcome for outcome in outcomes if outcome.kind == "model"]
    begin, end = min(o.began for o in models), max(o.began + o.seconds for o in models)
    busy = 0.0
    for outcome in (o for o in outcomes if o.seconds):  # one whose workers died has none
        inside = min(end, outcome.began + outcome.seconds) - max(begin, outcome.began)
        busy += outcome.training_seconds * max(0.0, inside) / outcome.seconds
    return busy / (workers * (end - begin))


def _print_utilisation(outcomes: Sequence[Outcome], workers: int) -> None:
    models = [outcome for outcome in outcomes if outcome.kind == "model" and outcome.models]
    if models:
        share = utilisation(outcomes, workers)
        per_model = sum(o.cpu_seconds for o in models) / len(models)
        console.print(
            f"{len(models)} subset models, {per_model:.2f} CPU s each; "
            f"{share:.1%} of worker time in training and prediction",
            highlight=False,
        )


def ensure_scores(session: Session) -> ScoresSummary | None:
    """The scores that the study's forget sets need, computed from the blocks if they are not in the store.

    None where no forget set needs any, or where a block is missing.
    """
    return campaign_scores(session) if session.plan.needs_scores else None


def note_found(session: Session) -> None:
    """Record where all of a campaign that is needed was in the store."""
    if session.plan.needs_scores and not session.plan.missing(session.plan.blocks()):
        ledger.found(session, ensure_scores(session))


def campaign_scores(session: Session) -> ScoresSummary | None:
    """The scores of the study's campaign, computed if they are not in the store; None where a block is missing."""
    plan = session.plan.against(session.store)
    if plan.missing(plan.blocks()):
        return None
    return campaigns.scores(session.store, session.study.scores_spec(session.dataset.fingerprint), session.dataset)


def print_scores(summary: ScoresSummary) -> None:
    """What a campaign came to, the quality gate loudly."""
    hard = (
        "" if summary.hard_in_accuracy is None else f" ({summary.hard_in_accuracy:.3f} where mostly wrong outside it)"
    )
    halves = "" if summary.split_half is None else f"; split-half rank correlation {summary.split_half:.2f}"
    if summary.top_overlap is not None:
        halves += f", {summary.top_overlap:.0%} of the top 5 % in common"
    if summary.standard_error is not None:
        halves += f"; mean standard error {summary.standard_error:.3f}"
    console.print(
        f"scores {summary.scores_key[:8]} from {summary.models} models: accuracy {summary.in_accuracy:.4f} in the "
        f"subset{hard}, {summary.test_accuracy:.3f} on test{halves}",
        highlight=False,
    )
    if summary.stopping:
        console.print(
            f"Intervals are nominal: the campaign stopped at a target that its scores met ({summary.stopping})",
            highlight=False,
        )
    if not summary.passes_gate:
        console.print(
            "[bold red]The subset models do not fit their subsets[/bold red] (gate: 0.995 overall, 0.97 where mostly "
            "wrong outside): these scores understate memorization. Train longer (--set training.epochs=...)."
        )


def print_overlaps(session: Session) -> None:
    """Sizes of the forget sets and what they share."""
    from orchestrator.experiment import forget_indices

    sets = {}
    for spec in session.study.forget_specs(session.dataset.fingerprint):
        if spec.scores is not None and not session.store.exists(scores_object(spec.scores)):
            continue
        scores = None if spec.scores is None else memorization_scores(session.store, spec.scores)
        name = spec.rule.label if spec.rule.name in sets else spec.rule.name
        sets[name] = forget_indices(session.dataset, spec, scores, session.store)
    sizes = ", ".join(f"{name} {len(indices)}" for name, indices in sets.items())
    shared = ", ".join(f"{a} and {b} {n}" for a, b, n in planning.overlaps(sets))
    console.print(f"forget sets: {sizes}" + (f"; in common: {shared}" if shared else ""), highlight=False)


def conclude(cost: Cost) -> None:
    """Say what it cost; exit 1 where something failed."""
    console.print(cost.line(), highlight=False)
    if cost.failures:
        first = escape(str(cost.failures[0].error).rstrip("."))
        again = sum(outcome.key in cost.again for outcome in cost.failures)
        console.print(
            f"[red]{len(cost.failures)} failed[/red]{f', {again} of them not for the first time' if again else ''}; "
            f"the first: {first}. "
            "The same command tries them again; `unlearn status` shows all, attempts/ in the store what is known."
        )
        raise typer.Exit(1)
