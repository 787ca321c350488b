"""`unlearn sweep`: the waves on the pool, then missing runs as Tune trials; MLflow alongside, Parquet at the end."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

import typer

from jobs import dry_run, searching, tune, work
from jobs.deadline import OUT_OF_TIME, OutOfTimeError
from jobs.ledger import Ledger, stretch_of
from jobs.progress import bars, console
from jobs.session import Options, Session, open_session, ray_job
from jobs.tracked import tracked
from jobs.turns import turns, unfinished
from orchestrator import export, results, tracking
from orchestrator.cluster import Cluster
from orchestrator.contact import redacted
from orchestrator.costs import Outcome
from orchestrator.experiment import Workspace
from orchestrator.plan import Plan
from orchestrator.progress import Progress
from orchestrator.results import Member, Sweep, put_attempt
from orchestrator.specs import RunSpec, key
from orchestrator.tasks import Task, attempt_of


@dataclass(frozen=True)
class Done:
    """A sweep, what it cost, and how many of its tasks are neither there, failed nor stopped early."""

    session: Session
    sweep: Sweep
    cost: work.Cost
    uri: str | None
    num_left: int = 0


def run(options: Options) -> None:
    """Sweep, export, and print the table."""
    from jobs.report import show

    session = open_session(options, is_tracked=True)
    if options.dry_run:
        dry_run.print_plan(session)
        searching.print_plan(session)
        return
    done = sweep(session)
    present = results.row_keys(session.store)
    if any(member.arm != "reference" and member.key in present for member in done.sweep.members):
        show(session.store, done.sweep.key)
    if done.num_left:
        console.print(
            f"[yellow]not finished[/yellow]: {done.num_left} tasks are left, for which there was no time; "
            "the same command goes on from here"
        )
    work.conclude(done.cost)
    if done.num_left:
        raise typer.Exit(OUT_OF_TIME)


def sweep(session: Session) -> Done:
    """Compute what is missing of the session's study; rows reach MLflow as they come, Parquet at the end."""
    sweep = _record(session)
    uri = tracking.tracking_uri(session.store, session.options.tracking_uri)
    if uri is None and session.options.tracking_uri is None:
        console.print("no MLflow: an S3 root without --tracking-uri tracks nothing (`unlearn track` can do it later)")
    if sweep.caution:
        console.print(f"[yellow]not independent of the number of workers[/yellow]: {sweep.caution}", highlight=False)
    asking = searching.Asking(session, sweep, session.plan) if session.study.searched() else None
    members: dict[str, Member] = {}
    cost = work.Cost()
    with tracked(session, sweep, uri, cost) as live, ExitStack() as closing:

        def stored(keys: Iterable[str]) -> None:
            if asking is not None:
                members.update({member.key: member for member in asking.sweep.members})
            if live is not None:
                live.put(keys, members)

        def put(sweep: Sweep) -> None:
            new = {member.key: member for member in sweep.members if member.key not in members}
            members.update(new)
            stored(sorted(new.keys() & results.row_keys(session.store)))
            results.put_sweep(session.store, sweep)

        @cache
        def cluster() -> Cluster:  # where anything is missing
            if live is not None:
                live.begin()
            return closing.enter_context(work.cluster_of(session, sweep.key))

        def phase(session: Session) -> None:
            wanted = _prepared(session.plan) + session.plan.runs()
            missing = session.plan.missing(wanted)
            cost.cached += len(wanted) - len(missing) - len(session.plan.halted)
            work.note_found(session)
            if again := session.plan.failed_before(session.store):
                cost.again |= {key(task.spec) for task in again}
                console.print(f"runs that failed before, and are tried again: {len(again)}", highlight=False)
            if missing:
                _compute(session, cluster(), cost, lambda name: stored([name]), asking)
            else:
                work.ensure_scores(session)

        put(sweep)
        if asking is not None:
            session = replace(session, plan=asking.begin(stored))
        try:
            if session.plan.undecided:
                session = tune.settle(session, phase)
                sweep = _record(session)
                put(sweep)
            elif session.study.tuning is not None:
                cost.cached += tune.found(session.plan)
            phase(session)
        except OutOfTimeError:
            session.heart.leave("the time budget of its command ended while a worker was at it")
        num_left = _num_left(session, cost, asking)
        if num_left:
            cost.is_whole = False
        export.ensure(session.store)
    searching.print_stopped(session.plan, cost.stopped)
    if asking is not None:
        asking.print_best()
    return Done(session, asking.sweep if asking else sweep, cost, uri, num_left)


def _record(session: Session) -> Sweep:
    """What the sweep is, as far as it is known."""
    now = time.time()
    facts = {"command": redacted(" ".join(sys.argv)), "host": socket.gethostname(), "created_at": now}
    sweep = session.plan.sweep(facts | {"git_commit": session.context.git_commit, "ray_job": ray_job()})
    if (before := results.get_sweep(session.store, sweep.key)) is not None:
        sweep = replace(sweep, provenance={**before.provenance, "continued_at": now})
    return sweep


def _num_left(session: Session, cost: work.Cost, asking: searching.Asking | None) -> int:
    """How many tasks of those that were planned are not over: Tune does not say, so the store is asked."""
    plan = (asking.plan if asking else session.plan).against(session.store)
    over = {(outcome.kind, outcome.key) for outcome in cost.outcomes}  # failed or stopped, if they are not there
    missing = plan.missing(_prepared(plan) + plan.runs())
    ready = plan.ready(missing) if cost.failures else missing  # what has failed holds others up
    left = [task for task in ready if task.kind == "block" or (task.kind, key(task.spec)) not in over]
    if any(outcome.kind == "model" for outcome in cost.failures):
        left = [task for task in left if task.kind != "block"]
    tuning = plan.tuning.against(session.store) if plan.tuning is not None and plan.undecided else None
    unchosen = tuning.missing(_prepared(tuning) + tuning.runs()) if tuning is not None else []
    before = sum((task.kind, key(task.spec)) not in over for task in unchosen)
    unasked = asking.num_left * len(session.study.seeds) if asking and not cost.failures else 0
    return before + len(left) + plan.undecided + unasked


def _prepared(plan: Plan) -> list[Task]:
    return [
        *plan.rankings(),
        *_needed(plan, plan.originals),
        *plan.references(),
        *_needed(plan, plan.localizations),
    ]


def _needed(plan: Plan, tasks: Callable[[], list[Task]]) -> list[Task]:
    """The originals or localizations of runs that are missing: a finished run needs none."""
    missing = [task.spec for task in plan.missing(plan.runs()) if isinstance(task.spec, RunSpec)]
    needed = {key(part) for run in missing for part in (run.original, run.localization) if part is not None}
    return [task for task in tasks() if key(task.spec) in needed] if needed else []


def _compute(
    session: Session,
    cluster: Cluster,
    cost: work.Cost,
    stored: Callable[[str], None],
    asking: searching.Asking | None,
) -> None:
    before = len(cost.outcomes)
    if session.plan.missing(_prepared(session.plan)):
        work.prepare(session, cluster, _prepared, cost)
    for outcome in cost.outcomes[before:]:
        if outcome.kind == "run" and not outcome.error:
            stored(outcome.key)
    if (summary := work.ensure_scores(session)) is not None:
        work.print_scores(summary)
    work.print_overlaps(session)
    now, planned = session.plan.against(session.store), session.plan.missing(session.plan.runs())
    missing = now.missing(planned)
    cost.cached += len(planned) - len(missing)
    for task in planned:
        if task.object_name in now.present:  # another command was faster
            stored(key(task.spec))
    runs = now.ready(missing)
    if len(runs) < len(missing):
        console.print(f"{len(missing) - len(runs)} runs are not started: what they need has failed", highlight=False)
    if runs:
        book = Ledger(session, cluster, stretch_of(session, None, cluster=cluster))
        with work.keeping(book, cost):
            _try(session, cluster, cost, stored, runs, asking)


def _try(
    session: Session,
    cluster: Cluster,
    cost: work.Cost,
    stored: Callable[[str], None],
    runs: list[Task],
    asking: searching.Asking | None,
) -> None:
    """The runs as trials of Tune, and those that Optuna chooses after them."""
    from orchestrator.sweep import run_trials  # Tune takes seconds to import

    options, rule = session.options, session.study.scheduler
    more = asking.num_left * len(session.study.seeds) if asking else 0
    with bars({"runs": len(runs) + more}) as advance:

        def done(outcome: Outcome) -> None:
            session.heart.end(outcome.kind, outcome.key, outcome.label)
            cost.hear(outcome)
            advance("runs", 1)
            if outcome.error:
                work.print_failure(outcome)
            else:
                stored(outcome.key)

        def found(task: Task) -> None:
            cost.cached += 1
            advance("runs", 1)
            stored(key(task.spec))

        def stopped(reports: Sequence[Progress]) -> None:
            cost.stopped += 1
            if reports:
                outcome = reports[-1].outcome
                session.heart.end(outcome.kind, outcome.key, outcome.label)
                cost.hear(outcome)
            advance("runs", 1)

        def died(task: Task, reason: str) -> None:
            said = f"its worker died ({reason or 'Ray does not say of what'}), and it was tried again"
            put_attempt(session.store, attempt_of(task, "interrupted", said))

        watch = None if rule is None else searching.watching(session.store, rule, session.plan, stopped)
        for part in [runs] if asking else turns(session, runs):
            with work.deaths(session, done):
                run_trials(
                    Workspace.perform,
                    options.deadline.within(asking.tasks(part) if asking else unfinished(session, part, found)),
                    setup=Workspace,
                    inputs=(session.dataset, session.context, work.device_of(cluster)),
                    workers=min(cluster.workers, options.max_concurrent or cluster.workers),
                    gpus_per_worker=cluster.gpus_per_worker,
                    done=done,
                    begun=session.heart.begin,
                    died=died,
                    tries=options.retries + 1,
                    watch=watch,
                )
    options.deadline.check()
