"""Search, then confirm: a sweep's tuning runs, what they choose, and how that is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rich.markup import escape

from jobs.progress import console
from jobs.session import Session
from orchestrator.plan import Plan
from orchestrator.selections import Selection
from orchestrator.specs import key


def settle(session: Session, compute: Callable[[Session], None]) -> Session:
    """Have the tuning runs computed that are missing, and choose the settings to report.

    Tuning runs that failed do not hold the others up: their settings cannot be chosen. Nothing is chosen while there
    are runs that were not tried.
    """
    plan, tuning = session.plan, session.plan.tuning
    assert tuning is not None
    assert plan.study.tuning is not None
    by = plan.study.tuning
    sets = ", ".join(rule.label for rule in tuning.study.forget_sets)
    console.print(
        f"tuning by {by.criterion}: {len(tuning.runs())} runs on seeds {', '.join(map(str, by.seeds))} and draw "
        f"{by.draw} of {sets}; then {plan.undecided} runs confirm",
        highlight=False,
    )
    compute(replace(session, study=tuning.study, plan=tuning))
    now = tuning.against(session.store)
    if any(not session.store.names(f"attempts/{key(task.spec)}") for task in now.ready(now.missing(now.runs()))):
        return session
    settled = plan.against(session.store).settled(session.store)
    say(settled)
    return replace(session, plan=settled)


def found(plan: Plan) -> int:
    """Say what was chosen before, or that there is nothing to choose; how many tuning tasks the store had."""
    if plan.tuning is None:
        console.print("nothing to tune: every arm has a single setting")
        return 0
    say(plan)
    return len(plan.tuning.references()) + len(plan.tuning.runs()) - len(plan.tuning.halted)


def say(plan: Plan) -> None:
    """Name the settings that were no candidates, with why, and the cells that nothing could be chosen for."""
    chosen = plan.selections or {}
    out = sum(c.error is not None for selection in chosen.values() for c in selection.candidates)
    left = f"; {out} that failed or were stopped early were no candidates" if out else ""
    console.print(
        f"settings chosen for {sum(s.chosen is not None for s in chosen.values())} of {len(chosen)} cells "
        f"(`unlearn report --table selections`){left}",
        highlight=False,
    )
    for cell, selection in chosen.items():
        if selection.chosen is None:
            console.print(f"[red]not reported[/red] {escape(f'{cell.label}: {selection.reason}')}", highlight=False)
            continue
        for candidate in (c for c in selection.candidates if c.error is not None):
            what = escape(f"{cell.label}: {varied(selection, candidate.options)}: {candidate.error}")
            console.print(f"[yellow]not a candidate[/yellow] {what}", highlight=False)


def varied(selection: Selection, options: object) -> str:
    """The options in which the candidates of a cell differ, as text."""
    assert isinstance(options, dict)
    names = [n for n in options if len({str(c.options.get(n)) for c in selection.candidates}) > 1]
    return ", ".join(f"{name}={options[name]}" for name in names)
