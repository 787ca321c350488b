"""`unlearn proxies`: cheap stand-ins for memorization, held against the campaign's scores."""

from __future__ import annotations

from pathlib import PurePosixPath

from rich.console import Console

from analysis import load
from analysis import proxies as analysis
from jobs import work
from jobs.progress import console
from jobs.report import exports
from jobs.session import Options, Session, open_session
from orchestrator import export
from orchestrator.tasks import Task


def run(options: Options) -> None:
    """Train one original watched, if that is not in the store, export, and print how each proxy ranks examples."""
    session = open_session(options)
    tasks = session.plan.proxies(bool(len(session.dataset.splits["validation"])))
    missing = session.plan.missing(tasks)
    if options.dry_run:
        console.print(f"proxies: {len(tasks) - len(missing)} in the store, {len(missing)} to compute", highlight=False)
        return
    cost = work.Cost(cached=len(tasks) - len(missing))
    if missing:
        with work.cluster_of(session) as cluster:
            work.prepare(session, cluster, lambda _: tasks, cost)
    if not cost.failures:
        _show(session, tasks)
    work.conclude(cost)


def _show(session: Session, tasks: list[Task]) -> None:
    scores = work.campaign_scores(session)
    export.export(session.store)
    with exports(session.store) as folder:
        frame = analysis.proxy_table(load.load(folder))
    names = [PurePosixPath(name).stem for task in tasks for name in task.objects]
    frame = frame.filter(frame["proxies_key"].is_in(names))
    if scores is None:
        others = "; below are others of this setting" if len(frame) else ""
        console.print(
            f"the campaign's {session.study.campaign.models} subset models are not all in the store; `unlearn memorize "
            f"{session.options.recipe}` with the same options trains them{others}",
            highlight=False,
        )
    else:
        frame = frame.filter(frame["scores_key"] == scores.scores_key)
    wide = Console(width=max(console.width, 110))
    for table in analysis.render(frame):
        wide.print(table)
