"""`unlearn track`: MLflow brought level with the store."""

from __future__ import annotations

from dataclasses import replace

from jobs.ledger import artifacts
from jobs.progress import bars, console
from jobs.session import existing_store
from orchestrator import costs, results, tracking
from orchestrator.costs import Stretch
from orchestrator.progress import stopped_series
from orchestrator.registry import InputError
from orchestrator.store import Store


def run(storage: str, tracking_uri: str | None) -> None:
    """Write every stored sweep's rows and every campaign's points that MLflow lacks."""
    store = existing_store(storage)
    uri = tracking.tracking_uri(store, tracking_uri)
    if uri is None:
        raise InputError("there is no MLflow to write to; give --tracking-uri, or set MLFLOW_TRACKING_URI")
    present = results.row_keys(store)
    for sweep in results.get_sweeps(store):
        members = {member.key: member for member in sweep.members}
        keys = [name for name in members if name in present]
        tracker = tracking.connect(uri, store, sweep)
        written = 0
        with bars({"rows": len(keys)}) as advance:
            for name in keys:
                written += tracker.write(results.get_row(store, name), members[name].arm, members[name].role)
                advance("rows", 1)
        over = {*keys, *(stopped_series(store, list(members)) if sweep.caution else ())}
        is_whole = len(over) == len(members) and not sweep.undecided
        tracker.finish("FINISHED" if is_whole else "KILLED")
        console.print(
            f"sweep {sweep.key[:8]} ({sweep.recipe}): {written} of {len(keys)} rows were new at {uri}", highlight=False
        )
    for stretches in _campaigns(store):
        campaign = tracking.connect_campaign(uri, store, stretches[0])
        scores = [stretch for stretch in stretches if stretch.scores_key is not None]
        ended = replace(scores[-1], status=stretches[-1].status, ended=stretches[-1].ended) if scores else stretches[-1]
        new = tracking.replay_campaign(campaign, stretches, ended, artifacts(store, ended.scores_key) if scores else {})
        points = sum(len(stretch.points) for stretch in stretches)
        console.print(
            f"campaign {str(ended.campaign)[:8]} ({ended.recipe}): {new} of {points} points were new at {uri}",
            highlight=False,
        )


def _campaigns(store: Store) -> list[list[Stretch]]:
    """The stretches that trained models of a campaign, oldest first, by campaign."""
    found: dict[str, list[Stretch]] = {}
    for stretch in costs.get_stretches(store):
        if stretch.campaign is not None and stretch.workers:
            found.setdefault(stretch.campaign, []).append(stretch)
    return list(found.values())
