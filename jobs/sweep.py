"""`unlearn sweep`: the waves on the pool, then missing runs as Tune trials; MLflow alongside, Parquet at the end."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from jobs import work
from jobs.ledger import Ledger, stretch_of
from jobs.progress import bars, console
from jobs.session import Options, Session, open_session
from orchestrator import export, results, tracking
from orchestrator.costs import Outcome
from orchestrator.experiment import Task, Workspace
from orchestrator.plan import Plan
from orchestrator.pool import Cluster
from orchestrator.results import Sweep
from orchestrator.specs import key


@dataclass(frozen=True)
class Done:
    """A sweep that ran to its end, and what it cost."""

    session: Session
    sweep: Sweep
    cost: work.Cost
    uri: str | None


def run(options: Options) -> None:
    """Sweep, export, and print the table."""
    from jobs.report import show

    session = open_session(options)
    if options.dry_run:
        work.print_plan(session)
        return
    done = sweep(session)
    show(session.store, done.sweep.key)
    work.conclude(done.cost)


def sweep(session: Session) -> Done:
    """Compute what is missing of the session's study; rows reach MLflow as they come, Parquet at the end."""
    now = time.time()
    sweep = session.plan.sweep({"command": " ".join(sys.argv), "host": socket.gethostname(), "created_at": now})
    if (before := results.get_sweep(session.store, sweep.key)) is not None:
        sweep = replace(sweep, provenance={**before.provenance, "continued_at": now})
    uri = tracking.tracking_uri(session.store, session.options.tracking_uri)
    if uri is None and session.options.tracking_uri is None:
        console.print("no MLflow: an S3 root without --tracking-uri tracks nothing (`unlearn track` can do it later)")
    arms = {member.key: member.arm for member in sweep.members}
    wanted = _prepared(session.plan) + session.plan.runs()
    cost = work.Cost(cached=len(wanted) - len(session.plan.missing(wanted)))
    with _tracked(session, sweep, uri, cost) as live:

        def stored(keys: list[str]) -> None:
            if live is not None:
                for name in keys:
                    live.put(results.get_row(session.store, name), arms[name])

        present = results.row_keys(session.store)
        stored([name for name in arms if name in present])
        results.put_sweep(session.store, sweep)
        work.note_found(session)
        if session.plan.missing(wanted):
            with work.cluster_of(session) as cluster:
                _compute(session, cluster, cost, lambda outcome: stored([outcome.key]))
        else:
            work.ensure_scores(session)
    export.export(session.store)
    return Done(session, sweep, cost, uri)


def _prepared(plan: Plan) -> list[Task]:
    return [
        *plan.rankings(),
        *_needed(plan, plan.originals()),
        *plan.references(),
        *_needed(plan, plan.localizations()),
    ]


def _needed(plan: Plan, tasks: list[Task]) -> list[Task]:
    """The originals or localizations of runs that are missing: a finished run needs none."""
    names = {task.object_name for task in plan.missing(plan.runs())}
    missing = [run for _, run in plan.study.runs(plan.fingerprint) if f"rows/{key(run)}.json" in names]
    needed = {key(part) for run in missing for part in (run.original, run.localization) if part is not None}
    return [task for task in tasks if key(task.spec) in needed]


def _compute(session: Session, cluster: Cluster, cost: work.Cost, stored: Callable[[Outcome], None]) -> None:
    if session.plan.missing(_prepared(session.plan)):
        work.prepare(session, cluster, _prepared, cost)
    for outcome in cost.outcomes:
        if outcome.kind == "run" and not outcome.error:
            stored(outcome)
    if (summary := work.ensure_scores(session)) is not None:
        work.print_scores(summary)
    work.print_overlaps(session)
    missing = session.plan.missing(session.plan.runs())
    runs = session.plan.against(session.store).ready(missing)
    if len(runs) < len(missing):
        console.print(f"{len(missing) - len(runs)} runs are not started: what they need has failed", highlight=False)
    with bars({"runs": len(runs)}) as advance:

        def done(outcome: Outcome) -> None:
            cost.hear(outcome)
            advance("runs", 1)
            if outcome.error:
                work.print_failure(outcome)
            else:
                stored(outcome)

        if runs:
            from orchestrator.sweep import run_trials  # Tune takes seconds to import

            book = Ledger(session, cluster, stretch_of(session, None, cluster=cluster))
            with work.keeping(book, cost), work.deaths(session, done):
                run_trials(
                    Workspace.perform,
                    runs,
                    setup=Workspace,
                    inputs=(session.dataset, session.context, work.device_of(cluster)),
                    workers=cluster.workers,
                    gpus_per_worker=cluster.gpus_per_worker,
                    done=done,
                )


@contextmanager
def _tracked(
    session: Session, sweep: Sweep, uri: str | None, cost: work.Cost
) -> Iterator[tracking.LiveTracking | None]:
    if uri is None:
        yield None
        return
    live = tracking.LiveTracking(tracking.connect(uri, session.store, sweep))
    status = "KILLED"
    try:
        yield live
        status = "FAILED" if cost.failures else "FINISHED"
    finally:
        live.close(status)
        if live.missed:
            console.print(
                f"[yellow]MLflow missed {live.missed} writes[/yellow] ({live.error}); "
                "`unlearn track` brings it level with the store"
            )
