"""`unlearn track`: MLflow brought level with the store."""

from __future__ import annotations

from jobs.progress import bars, console
from jobs.session import existing_store
from orchestrator import results, tracking
from orchestrator.registry import InputError


def run(storage: str, tracking_uri: str | None) -> None:
    """Write every stored sweep's rows that MLflow lacks."""
    store = existing_store(storage)
    uri = tracking.tracking_uri(store, tracking_uri)
    if uri is None:
        raise InputError("there is no MLflow to write to; give --tracking-uri, or set MLFLOW_TRACKING_URI")
    present = results.row_keys(store)
    for sweep in results.get_sweeps(store):
        arms = {member.key: member.arm for member in sweep.members}
        keys = [name for name in arms if name in present]
        tracker = tracking.connect(uri, store, sweep)
        written = 0
        with bars({"rows": len(keys)}) as advance:
            for name in keys:
                written += tracker.write(results.get_row(store, name), arms[name])
                advance("rows", 1)
        tracker.finish("FINISHED" if len(keys) == len(arms) else "KILLED")
        console.print(
            f"sweep {sweep.key[:8]} ({sweep.recipe}): {written} of {len(keys)} rows were new at {uri}", highlight=False
        )
