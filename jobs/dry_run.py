"""What a dry run says: what is in the store, what would be computed, and how long that would take."""

from __future__ import annotations

from jobs.progress import console
from jobs.session import Session
from orchestrator.estimates import Estimate, measured


def print_plan(session: Session) -> None:
    """Per wave, what is in the store, what would be computed, and how long that would take.

    Runs that confirm settings are counted as if what failed before fails again; the choice is made anew if it does not.
    """
    plan = session.plan.foreseen(session.store)
    waves = plan.counts()
    tasks = (
        {"subset models": plan.missing(plan.models(plan.missing(plan.blocks())))} if "subset models" in waves else {}
    )
    if plan.tuning is not None:
        tasks |= {f"tuning {name}": plan.tuning.missing(wave) for name, wave in plan.tuning.waves().items()}
    tasks |= {name: plan.missing(wave) for name, wave in plan.waves().items()}
    tasks["runs"] += plan.missing(plan.waiting())
    on_gpu = session.options.gpus_per_worker != 0
    rates = measured(
        session.store,
        session.study.setting(session.dataset.fingerprint),
        len(session.dataset.splits["train"]),
        on_gpu=on_gpu,
    )
    each = {name: rates.of(wave) for name, wave in tasks.items()}
    for name, counts in waves.items():
        took = f", about {_duration(each[name].seconds)}" if each[name].seconds else ""
        stopped = f"{counts['stopped']} stopped early, " if counts["stopped"] else ""
        said = f"{name}: {counts['done']} in the store, {stopped}{counts['missing']} to compute{took}"
        console.print(said, highlight=False)
    models = sum(counts["missing"] for name, counts in waves.items() if not name.endswith("localizations"))
    console.print(f"models to train: {models}", highlight=False)
    tried = plan.failed_before(session.store) + (
        [] if plan.tuning is None else plan.tuning.failed_before(session.store)
    )
    if again := len(tried):
        console.print(f"runs to compute that failed before, and are tried again: {again}", highlight=False)
    if plan.undecided:
        console.print(
            f"{plan.undecided} of the runs confirm settings that the tuning runs choose first", highlight=False
        )
    if any(tasks.values()):
        console.print(_needed_time(session, sum(each.values(), Estimate()), rates.count), highlight=False)


def _needed_time(session: Session, estimate: Estimate, count: int) -> str:
    """One sentence on the device-hours that a plan needs."""
    share = session.options.gpus_per_worker
    device, part = ("GPU", 1.0 if share == "auto" else share) if share != 0 else ("core", 1.0)
    unknown = ", ".join(estimate.unknown)
    if not estimate.seconds:
        return (
            f"{device}-hours: nothing was measured with this data and model in this store yet; "
            f"`unlearn memorize {session.options.recipe} --models 10` with the same options measures a rate"
        )
    said = f"about {estimate.seconds * part / 3600:.2g} {device}-hours, by {count} measurements in this store"
    return said + (f"; nothing was measured for: {unknown}" if unknown else "")


def _duration(seconds: float) -> str:
    """A worker's time in the unit that reads best."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
