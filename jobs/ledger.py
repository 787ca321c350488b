"""What a command's work costs, kept while it runs: a record in the store, and for a campaign a run in MLflow."""

from __future__ import annotations

import hashlib
import io
import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from jobs.progress import console
from jobs.session import Session, ray_job
from orchestrator import campaigns, costs, results, tracking
from orchestrator.campaigns import ScoresSummary, Tally
from orchestrator.cluster import Cluster
from orchestrator.costs import Outcome, Point, Stretch
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.outbox import LAST_SECONDS, STOPPED_SECONDS, Outbox
from orchestrator.registry import canonical_json
from orchestrator.specs import CampaignSpec, key
from orchestrator.store import StorageError, Store
from orchestrator.tasks import Task

_SECONDS_BETWEEN_RECORDS = 10.0


def stretch_of(
    session: Session, campaign: CampaignSpec | None, cached: int = 0, cluster: Cluster | None = None
) -> Stretch:
    """The record of what is about to be computed, on a cluster where something is missing."""
    asked = session.options.gpus_per_worker
    now, gpus = time.time(), cluster.gpus_per_worker if cluster else 1.0 if asked == "auto" else asked
    return Stretch(
        name=f"{int(now * 1000)}-{secrets.token_hex(4)}",
        command="".join(sys.argv[1:2]),
        recipe=session.study.recipe,
        data=session.study.data.label,
        campaign=key(campaign) if campaign else None,
        spec=campaign.model_dump(mode="json") if campaign else None,
        device="gpu" if gpus > 0 else "cpu",
        devices_per_worker=gpus if gpus > 0 else 1.0,
        created=now,
        cached=cached,
        git_commit=session.context.git_commit,
        ray_job=ray_job(),
    )


def found(session: Session, summary: ScoresSummary | None) -> None:
    """Record that a campaign was wanted and all of it was in the store: once, however often the command is repeated."""
    if summary is None:
        return
    campaign = session.study.campaign_spec(session.dataset.fingerprint)
    stretch = stretch_of(session, campaign, summary.models)
    about = canonical_json([stretch.command, stretch.recipe, stretch.campaign, summary.models])
    name = f"found-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    if costs.has_stretch(session.store, key(campaign), name):
        return
    costs.put_stretch(
        session.store,
        replace(
            stretch,
            name=name,
            status="finished",
            began=stretch.created,
            ended=stretch.created,
            cached_seconds=summary.model_seconds,
            scores_key=summary.scores_key,
            passes_gate=summary.passes_gate,
        ),
    )


class Ledger:
    """Hears of every outcome of one stretch of work, and keeps what it cost.

    Of a campaign it also reads each block as it comes, for scores and their reliability. Only the store's record is
    waited for; what MLflow is told is in the store before.
    """

    def __init__(
        self,
        session: Session,
        cluster: Cluster,
        stretch: Stretch,
        tally: Tally | None = None,
        most: int | None = None,  # blocks of a campaign that may stop before; None: all that the study asks for
    ) -> None:
        self.session, self.cluster, self.stretch, self.tally = session, cluster, stretch, tally
        self.fewest = session.study.campaign.blocks if most is None else 0
        self.most = self.fewest if most is None else most
        self.outcomes: list[Outcome] = []
        self._earlier: list[Stretch] = []
        self._writer: Outbox | None = None
        self._tracker: tracking.CampaignTracker | None = None
        self._told, self._saved = 0, -math.inf
        self._opening: Future[None] | None = None
        has_run = stretch.campaign is not None  # in MLflow
        self._uri = tracking.tracking_uri(session.store, session.options.tracking_uri) if has_run else None

    def prepare(self) -> None:
        """Start what takes seconds beside the start of the workers: MLflow, and reading the blocks that are there."""
        if self.stretch.campaign is not None:
            threads = ThreadPoolExecutor(1)
            self._opening = threads.submit(self._open)
            threads.shutdown(wait=False)

    def _open(self) -> None:
        assert self.tally is not None
        store = self.session.store
        self._earlier = costs.get_stretches(store, self.stretch.campaign)
        if self._uri:
            if self.session.heart.leads(str(self.stretch.campaign)):
                self._track()
            import analysis.figures  # noqa: F401  # here, beside the start of the workers; drawing comes at the end
        if not self.tally.blocks:
            self.tally.resume(self.most)
        while self.tally.blocks < self.most and self._next_block() in self.session.plan.present:
            self.tally.add()
        self.stretch = replace(self.stretch, cached_seconds=self.tally.seconds)

    def _track(self) -> None:
        assert self._uri is not None
        self._tracker = tracking.connect_campaign(self._uri, self.session.store, self.stretch, live=True)

    def _next_block(self) -> str:
        assert self.tally is not None
        return Task("block", self.tally.campaign, self.tally.blocks).object_name

    @contextmanager
    def kept(self, startup_seconds: float) -> Iterator[None]:
        """Keep the record up to the end of the work, however it ends; raises InputError where MLflow cannot be had."""
        if self._opening is not None:
            self._opening.result()
        if self._tracker is not None:
            self._writer = Outbox()
        self.stretch = replace(self.stretch, startup_seconds=startup_seconds)
        status = "interrupted"
        try:
            yield
            status = "failed" if any(outcome.error for outcome in self.outcomes) else "finished"
        finally:
            self._close(status)

    def hear(self, outcome: Outcome) -> None:
        """Take an outcome in; a block that it completes gives a point."""
        self.outcomes.append(outcome)
        if outcome.kind == "model" and not outcome.error and self._read() and not self._has_all:
            self._mark()
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_RECORDS:
            self._save()

    def _read(self) -> bool:
        """Read the blocks that have come; whether there were any."""
        if self.tally is None:
            return False
        before = self.tally.blocks
        while self.tally.blocks < self.most and self.session.store.exists(self._next_block()):
            self.tally.add()
        return self.tally.blocks > before

    @property
    def _has_all(self) -> bool:
        return self.tally is not None and self.tally.blocks == self.most

    def _mark(self) -> None:
        """Add a point: what the campaign costs and comes to so far."""
        assert self.tally is not None
        self._update()
        values = costs.progress(self.stretch, self._earlier)
        if self.tally.can_estimate:
            values |= quality(self.tally.summary())
        point = Point(
            time.time(), BLOCK_SIZE * self.tally.blocks, {n: v for n, v in values.items() if math.isfinite(v)}
        )
        self.stretch = replace(self.stretch, points=(*self.stretch.points, point))

    def _update(self) -> None:
        """Bring the record level with what was heard."""
        own = [o for o in self.outcomes if o.kind == "model" or self.stretch.campaign is None]
        window = costs.window(own) or (self.stretch.created, self.stretch.created)
        self.stretch = replace(
            self.stretch,
            began=window[0],
            ended=window[1],
            workers=costs.workers_of(costs.within(self.outcomes, *window), self.cluster.workers),
            models=sum(outcome.models for outcome in own),
            model_seconds=sum(outcome.training_seconds for outcome in own),
        )

    def _save(self) -> None:
        """Write the record, then tell MLflow of the points in it. What cannot be written now is tried again later."""
        self._update()
        self._saved = time.monotonic()
        try:
            costs.put_stretch(self.session.store, self.stretch)
        except (OSError, StorageError) as error:  # a note on costs never fails the work
            console.print(f"[yellow]what this costs could not be written[/yellow]: {error}", highlight=False)
            return
        if self._writer is not None and self._tracker is not None:
            if new := self.stretch.points[self._told :]:
                self._writer.submit(partial(self._tracker.write, new))
            self._told = len(self.stretch.points)

    def _close(self, status: str) -> None:
        self.stretch = replace(self.stretch, status=status)
        self._update()
        if self._has_all and self.outcomes:
            self._mark()  # the last, when it is known how long each worker waited for the others
        summary = self._scores() if status == "finished" else None
        if summary is not None:
            self.stretch = replace(self.stretch, scores_key=summary.scores_key, passes_gate=summary.passes_gate)
        if self.outcomes:
            self._save()
        if self._uri and self._writer is None and self.outcomes and status != "interrupted":
            self._write_later()
        if self._writer is None:
            return
        self._writer.end(self._finish, STOPPED_SECONDS if status == "interrupted" else LAST_SECONDS)
        if self._writer.missed:
            console.print(
                f"[yellow]MLflow missed {self._writer.missed} writes[/yellow] ({self._writer.error}); "
                "`unlearn track` brings it level with the store"
            )

    def _write_later(self) -> None:
        """Write all of it now, if the command that led has ended; else it is left to `unlearn track`."""
        if self.session.heart.leads(str(self.stretch.campaign)):
            self._writer = Outbox()
            self._writer.submit(self._track)
            self._writer.submit(lambda: self._tracker.write(self.stretch.points) if self._tracker else None)
        else:
            console.print(
                "[yellow]MLflow's run of the campaign is left to the other command[/yellow]; "
                "`unlearn track` adds what this one computed"
            )

    def _finish(self) -> None:
        if self._tracker is not None:
            self._tracker.finish(self.stretch, artifacts(self.session.store, self.stretch.scores_key))

    def _scores(self) -> ScoresSummary | None:
        """The scores of what was read, stored; None where blocks are missing that were asked for."""
        if self.tally is None or not self.tally.can_estimate or self.tally.blocks < self.fewest:
            return None
        return campaigns.put_scores(self.tally)


def artifacts(store: Store, scores_key: str | None) -> dict[str, bytes]:
    """Files about stored scores, by name: their histogram, and a table of the most memorized examples."""
    if scores_key is None:
        return {}
    import polars as pl

    from analysis.figures import histogram

    table = results.get_table(store, f"scores/{scores_key}.parquet")
    shown = results.get_table(store, f"scores/{scores_key}.examples.parquet").drop(["png"])
    scores, examples = pl.DataFrame(pl.from_arrow(table)), pl.DataFrame(pl.from_arrow(shown))
    estimator = json.loads((table.schema.metadata or {})[b"summary"]).get("estimator", "correctness")
    picture, text = io.BytesIO(), io.BytesIO()
    histogram(scores, estimator).savefig(picture, format="png")
    most = examples.join(scores, on="index").sort("score", "index", descending=[True, False])
    most.drop("label", "true_label").write_csv(text, float_precision=4)
    return {"scores.png": picture.getvalue(), "most_memorized.csv": text.getvalue()}


def quality(summary: ScoresSummary) -> dict[str, float]:
    """What a campaign's scores are worth, as numbers by name; what depends on the estimator says so."""
    prefix = "" if summary.estimator == "correctness" else f"{summary.estimator}/"
    values = {
        "in_accuracy": summary.in_accuracy,
        "hard_in_accuracy": summary.hard_in_accuracy,
        "test_accuracy": summary.test_accuracy,
        f"{prefix}standard_error": summary.standard_error,
        f"{prefix}split_half": summary.split_half,
        f"{prefix}top_overlap": summary.top_overlap,
    }
    return {name: value for name, value in values.items() if value is not None}
