"""`unlearn memorize`: subset models and memorization scores, as many as asked for or until they are good enough."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import takewhile

from jobs import ledger, work
from jobs.progress import console
from jobs.session import Options, Session, open_session
from orchestrator import campaigns
from orchestrator.campaigns import ScoresSummary, Tally
from orchestrator.cluster import Cluster
from orchestrator.experiment import Workspace
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.pool import Pool
from orchestrator.registry import InputError
from orchestrator.tasks import Task

MOST_MODELS = 100_000  # of a campaign with a target and no --models
_GROWTH = 0.2  # of a round: short enough to stop in time, long enough that its end costs little


@dataclass(frozen=True)
class Goal:
    """When a campaign that grows has enough: at the first of these. `models` alone asks for a number."""

    models: int | None = None
    standard_error: float | None = None
    split_half: float | None = None
    hours: float | None = None

    @property
    def grows(self) -> bool:
        """Whether a target is set; raises InputError for one that nothing meets."""
        if self.standard_error is not None and self.standard_error <= 0:
            raise InputError(f"--target-se is {self.standard_error:g}; allowed: above 0")
        if self.hours is not None and not 0 <= self.hours < math.inf:
            raise InputError(f"--budget-hours is {self.hours:g}; allowed: hours from 0, or leave it out for no limit")
        return any(target is not None for target in (self.standard_error, self.split_half, self.hours))

    def met(self, summary: ScoresSummary) -> str | None:
        """Which target the scores meet, in words."""
        error, halves = summary.standard_error, summary.split_half
        if self.standard_error is not None and error is not None and error <= self.standard_error:
            return f"mean standard error {error:.4f} is at most {self.standard_error:g}"
        if self.split_half is not None and halves is not None and halves >= self.split_half:
            return f"split-half rank correlation {halves:.3f} is at least {self.split_half:g}"
        return None


def run(options: Options, goal: Goal = Goal()) -> None:
    """Train the missing blocks of the campaign, then estimate and store the scores."""
    session = open_session(options)
    if goal.grows:
        _grow(session, goal)
        return
    if options.dry_run:
        counts = session.plan.campaign_counts()
        console.print(f"subset models: {counts['done']} in the store, {counts['missing']} to train", highlight=False)
        return
    cost = work.Cost(cached=session.plan.campaign_counts()["done"])
    if session.plan.missing(session.plan.blocks()):
        with work.cluster_of(session) as cluster:
            work.prepare(session, cluster, lambda plan: plan.blocks(), cost)
    if not cost.failures:
        spec = session.study.scores_spec(session.dataset.fingerprint)
        summary = campaigns.scores(session.store, spec, session.dataset)
        work.print_scores(summary)
        if not cost.outcomes:
            ledger.found(session, summary)
    work.conclude(cost)


def _grow(session: Session, goal: Goal) -> None:
    """Add blocks in rounds until a target is met; blocks that are in the store are read first."""
    campaign = session.study.campaign_spec(session.dataset.fingerprint)
    most = (goal.models or MOST_MODELS) // BLOCK_SIZE
    begin, cost = time.monotonic(), work.Cost()
    tally = Tally(session.store, campaign, session.dataset, session.study.campaign.estimator)
    whole = (Task("block", campaign, place).object_name in session.plan.present for place in range(most))
    tally.resume(sum(1 for _ in takewhile(bool, whole)))  # sums may be there of blocks that are not any more
    cost.cached += BLOCK_SIZE * tally.blocks
    while tally.blocks < most and Task("block", campaign, tally.blocks).object_name in session.plan.present:
        tally.add()
        cost.cached += BLOCK_SIZE
    reason = _enough(tally, goal, most, begin)
    if session.options.dry_run:
        state = f"enough: {reason}" if reason else "more are needed"
        console.print(f"{BLOCK_SIZE * tally.blocks} subset models in the store; {state}", highlight=False)
        return
    if reason is None:
        with work.cluster_of(session) as cluster:
            reason = _rounds(session, cluster, goal, tally, most, begin, cost)
    if tally.can_estimate:
        work.print_scores(campaigns.put_scores(tally))
        console.print(
            f"stopped at {BLOCK_SIZE * tally.blocks} models: {reason}. "
            f"Use them with --set campaign.models={BLOCK_SIZE * tally.blocks}",
            highlight=False,
        )
    work.conclude(cost)


def _enough(tally: Tally, goal: Goal, most: int, begin: float) -> str | None:
    if tally.can_estimate and (met := goal.met(tally.summary())):
        return met
    if tally.blocks >= most:
        return f"--models {BLOCK_SIZE * most}"
    if tally.blocks and goal.hours is not None and time.monotonic() - begin >= 3600 * goal.hours:
        return f"--budget-hours {goal.hours:g}"
    return None


def _rounds(
    session: Session, cluster: Cluster, goal: Goal, tally: Tally, most: int, begin: float, cost: work.Cost
) -> str:
    inputs = work.inputs_of(session, cluster, BLOCK_SIZE * most)
    stretch = ledger.stretch_of(session, tally.campaign, BLOCK_SIZE * tally.blocks, cluster)
    book = ledger.Ledger(session, cluster, stretch, tally, most)
    book.prepare()
    with Pool(cluster, Workspace, inputs) as pool, work.keeping(book, cost, pool.usage.startup_seconds):
        console.print(f"{cluster.workers} workers ready in {pool.usage.startup_seconds:.1f} s", highlight=False)
        while True:
            number = _round(cluster, goal, tally, most, begin)
            if number == 0:
                return f"another block would take longer than --budget-hours {goal.hours:g} leave"
            blocks = [Task("block", tally.campaign, tally.blocks + place) for place in range(number)]
            work.perform(session, pool, session.plan.models(session.plan.missing(blocks)), cost)
            if cost.failures:
                return "a model failed"
            tally.add(max(0, blocks[-1].block + 1 - tally.blocks))  # those that the ledger has not read
            if reason := _enough(tally, goal, most, begin):
                if tally.can_estimate:  # before anyone else estimates them: they say what stopped the campaign
                    campaigns.put_scores(tally, goal.met(tally.summary()))
                return reason
            if not tally.can_estimate:
                continue
            summary = tally.summary()
            halves = "" if summary.split_half is None else f", split-half rank correlation {summary.split_half:.3f}"
            console.print(
                f"{summary.models} models: mean standard error {summary.standard_error:.4f}{halves}", highlight=False
            )


def growth(blocks: int, workers: int) -> int:
    """How many blocks the next round adds to so many: a share of what there is, and enough for every worker."""
    return max(math.ceil(workers / BLOCK_SIZE), math.ceil(_GROWTH * blocks))


def _round(cluster: Cluster, goal: Goal, tally: Tally, most: int, begin: float) -> int:
    """How many blocks to train next: `growth`, as far as --models and time allow."""
    number = min(growth(tally.blocks, cluster.workers), most - tally.blocks)
    if goal.hours is not None and tally.blocks:
        per_block = tally.seconds / tally.blocks / cluster.workers
        left = begin + 3600 * goal.hours - time.monotonic()
        number = min(number, max(0, int(left / max(per_block, 1e-9))))
    return number
