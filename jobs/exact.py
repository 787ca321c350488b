"""`unlearn memorize --exact`: retraining with and without single examples, held against the campaign's scores."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from analysis import exact as analysis
from analysis import load
from jobs import ledger, work
from jobs.memorize import Goal
from jobs.progress import console
from jobs.report import exports
from jobs.session import Options, Session, open_session
from orchestrator import exact, export
from orchestrator.arrays import check_whole
from orchestrator.experiment import Workspace, memorization_scores
from orchestrator.pool import Pool
from orchestrator.registry import InputError
from orchestrator.specs import ExactSpec
from orchestrator.tasks import Task


def run(options: Options, asked: str, seeds: int, goal: Goal) -> None:
    """Train what is missing on either side, estimate and store exact scores, export, and print them."""
    if goal.grows:
        raise InputError("--exact trains no subset models; leave out --target-se, --target-split-half, --budget-hours")
    session = open_session(options)
    setting = session.study.setting(session.dataset.fingerprint)
    spec = ExactSpec(setting=setting, indices=_chosen(session, asked), seeds=seeds)
    tasks = [Task("single", single) for single in spec.singles]
    missing = session.plan.missing(tasks)
    if options.dry_run:
        done = len(tasks) - len(missing)
        console.print(f"models for exact scores: {done} in the store, {len(missing)} to train", highlight=False)
        return
    present = session.plan.present
    check_whole(session.store, [task.object_name for task in tasks if task.object_name in present])
    cost = work.Cost(cached=len(tasks) - len(missing))
    if missing:
        with work.cluster_of(session) as cluster:
            inputs = work.inputs_of(session, cluster, len(tasks))
            book = ledger.Ledger(session, cluster, ledger.stretch_of(session, None, cluster=cluster))
            with Pool(cluster, Workspace, inputs) as pool, work.keeping(book, cost, pool.usage.startup_seconds):
                console.print(f"{cluster.workers} workers ready in {pool.usage.startup_seconds:.1f} s", highlight=False)
                work.perform(session, pool, missing, cost)
    if not cost.failures:
        selection = asked if exact.by_scores(asked) else exact.GIVEN
        _show(session, exact.put_scores(session.store, spec, session.dataset, selection))
    work.conclude(cost)


def _chosen(session: Session, asked: str) -> tuple[int, ...]:
    """The training indices asked for; a rule needs a campaign that is complete."""

    def scores() -> np.ndarray:
        if work.campaign_scores(session) is None:
            missing = session.plan.campaign_counts()["missing"]
            raise InputError(
                f"--exact {asked} goes by the campaign's scores, of which {missing} subset models are missing; "
                f"`unlearn memorize {session.options.recipe}` with the same options trains them"
            )
        return memorization_scores(session.store, session.study.scores_spec(session.dataset.fingerprint))

    return exact.select(asked, len(session.dataset.splits["train"]), scores)


def _show(session: Session, name: str) -> None:
    """Print the exact scores beside those of the study's campaign, or alone where it is not complete."""
    summary = work.campaign_scores(session)
    export.export(session.store)
    with exports(session.store) as folder:
        scores = None if summary is None else summary.scores_key
        found = analysis.compare(load.load(folder), name, session.study.campaign.estimator, scores)
    Console(width=max(console.width, 100)).print(analysis.render(found))
    for sentence in analysis.remarks(found):
        console.print(sentence, highlight=False)
    if summary is None:
        console.print(
            f"`unlearn memorize {session.options.recipe}` with the same options makes scores to compare with",
            highlight=False,
        )
