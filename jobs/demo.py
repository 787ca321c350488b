"""`unlearn demo`: the whole pipeline on embedded data, ending with a table, a report and where to look."""

from __future__ import annotations

import time
from pathlib import Path

from jobs import work
from jobs.progress import console
from jobs.report import show, write
from jobs.session import Options, open_session
from jobs.sweep import sweep
from orchestrator.contact import redacted


def run(options: Options) -> None:
    """Memorize, references and sweep of the recipe `digits`; trains only what the store lacks."""
    start = time.perf_counter()
    session = open_session(options)
    counts = session.plan.counts()
    missing = sum(count["missing"] for count in counts.values())
    models = session.study.campaign.models
    console.print(
        f"digits: {models} subset models, {len(session.plan.originals())} originals, "
        f"{len(session.plan.references())} references, {len(session.plan.runs())} runs; "
        + (f"{missing} tasks to do" if missing else "all in the store"),
        highlight=False,
    )
    done = sweep(session)
    store, key = session.store, done.sweep.key
    if not missing and (summary := work.ensure_scores(session)) is not None:
        work.print_scores(summary)
    show(store, key)
    out = Path(store.path("report.html")) if store.is_local else Path("report.html")
    write(store, key, out, {"cost of this command": done.cost.line()})
    seconds = time.perf_counter() - start
    console.print(f"report written to {out}; the demo took {seconds:.0f} s", highlight=False)
    console.print("next:", highlight=False)
    if done.uri is not None:
        console.print(
            f"  mlflow ui --backend-store-uri {done.uri}" if "sqlite" in done.uri else f"  open {redacted(done.uri)}",
            highlight=False,
        )
    console.print(f"  unlearn report --storage {store.root} --sweep {key[:8]} --out report.html", highlight=False)
    work.conclude(done.cost)
