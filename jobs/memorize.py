"""`unlearn memorize`: subset models and memorization scores."""

from __future__ import annotations

from jobs import work
from jobs.progress import console
from jobs.session import Options, open_session
from orchestrator import plan as planning


def run(options: Options) -> None:
    """Train the missing blocks of the campaign, then estimate and store the scores."""
    session = open_session(options)
    if options.dry_run:
        counts = session.plan.campaign_counts()
        console.print(f"subset models: {counts['done']} in the store, {counts['missing']} to train", highlight=False)
        return
    cost = work.Cost(cached=len(session.plan.blocks()) - len(session.plan.missing(session.plan.blocks())))
    if session.plan.missing(session.plan.blocks()):
        with work.cluster_of(session) as cluster:
            work.prepare(session, cluster, lambda plan: plan.blocks(), cost)
    if not cost.failures:
        spec = session.study.scores_spec(session.dataset.fingerprint)
        work.print_scores(planning.scores(session.store, spec, session.dataset))
    work.conclude(cost)
