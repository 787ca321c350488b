"""`unlearn references`: originals, and references retrained without each forget set."""

from __future__ import annotations

from jobs import dry_run, work
from jobs.session import Options, open_session
from orchestrator.plan import Plan
from orchestrator.tasks import Task


def run(options: Options) -> None:
    """Train what is missing, the campaign first where a forget set needs its scores."""
    session = open_session(options)
    if options.dry_run:
        dry_run.print_plan(session)
        return
    missing = session.plan.missing(_wanted(session.plan))
    work.note_found(session)
    cost = work.Cost(cached=len(_wanted(session.plan)) - len(missing))
    if missing:
        with work.cluster_of(session) as cluster:
            work.prepare(session, cluster, _wanted, cost)
    if not cost.failures:
        work.print_overlaps(session)
    work.conclude(cost)


def _wanted(plan: Plan) -> list[Task]:
    return [*plan.rankings(), *plan.originals(), *plan.references()]
