"""`unlearn status`: what a store holds, and what it cost."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis import costs as analysis
from jobs import dry_run, work
from jobs.progress import console
from jobs.session import Options, existing_store, open_session
from orchestrator import costs, exact, heartbeats, results
from orchestrator.heartbeats import Command
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.progress import STOPPED
from orchestrator.results import Sweep
from orchestrator.store import Store

_SHOWN = 4  # tasks of a command
_WIDTH = 110  # columns that the tables need; a narrower terminal wraps their lines


def run(options: Options) -> None:
    """Print sweeps, campaigns, failures and cost; with a recipe, what of it is missing."""
    if options.recipe:
        existing_store(options.storage)
        session = open_session(options)
        dry_run.print_plan(session)
        return
    store = existing_store(options.storage)
    present = results.row_keys(store)
    attempts = results.get_attempts(store)
    unfinished = _failed(store, {name: tries for name, tries in attempts.items() if name not in present})
    failed = [tries for tries in unfinished if tries[-1].status != STOPPED]
    stopped = {tries[-1].key for tries in unfinished if tries[-1].status == STOPPED}
    known = heartbeats.get_commands(store)
    alive = heartbeats.living(store, known)
    wide = Console(width=max(console.width, _WIDTH))
    wide.print(_sweeps(store, present, {tries[-1].key for tries in failed}, stopped, known, alive))
    for command in known:
        _print_command(command, command.name in alive)
    models, stored = Counter[str](), store.names("campaigns")
    for name in stored:
        campaign, folder, rest = name.split("/", 2)
        whole = f"{campaign}/blocks/{rest.partition('/')[0]}.safetensors"  # of a model by itself
        models[campaign] += BLOCK_SIZE if folder == "blocks" else whole not in stored
    for campaign, count in models.items():
        console.print(f"campaign {campaign[:8]}: {count} subset models", highlight=False)
    if singles := len(store.names(exact.SINGLES_FOLDER)):
        console.print(f"exact scores: {singles} models, on all examples or all but one", highlight=False)
    seconds = sum(results.get_row(store, name).provenance["seconds"] for name in present)
    console.print(f"{len(present)} runs, {seconds:.0f} s of training in them", highlight=False)
    stretches = costs.get_stretches(store)
    if stretches:
        for table in analysis.render(analysis.totals(costs.cost_lines(stretches), costs.worker_lines(stretches))):
            wide.print(table)
    for tries in failed:
        kind, what = (tries[-1].provenance.get(fact, other) for fact, other in (("kind", "run"), ("what", "")))
        number = f"{len(tries)} {'try' if len(tries) == 1 else 'tries'}"
        said = f"{kind} {tries[-1].key[:8]} ({f'{what}, ' if what else ''}{number}): {tries[-1].error}"
        console.print(f"[red]failed[/red] {escape(said)}", highlight=False)


def _failed(store: Store, attempts: Mapping[str, Sequence[results.Attempt]]) -> list[list[results.Attempt]]:
    """The tries at each thing that failed and is not there by now; many models of a campaign may have."""
    found: dict[tuple[str, object], list[results.Attempt]] = {}
    for name, tries in attempts.items():
        for attempt in (attempt for attempt in tries if attempt.status in ("failed", STOPPED)):
            found.setdefault((name, attempt.provenance.get("what")), []).append(attempt)
    return [tries for tries in found.values() if not results.is_made(store, tries[-1])]


def _print_command(command: Command, lives: bool) -> None:
    """One line on a command that is running, or that ended before its work did."""
    state = "[green]running[/green]" if lives else "[yellow]interrupted[/yellow]"
    tasks = [f"{attempt.provenance['kind']} {attempt.provenance['what']}" for attempt in command.at_work.values()]
    what = "; ".join(tasks[:_SHOWN]) + (f" and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else "")
    at_work = f"; its workers {'are' if lives else 'were'} at {what}" if tasks else ""
    remedy = "" if lives else "; the same command goes on from there"
    console.print(f"{state} {escape(work.shown(command) + at_work)}{remedy}", highlight=False)


def _state(sweep: Sweep, failed: int, missing: int, known: Sequence[Command], alive: set[str]) -> str:
    """What a sweep is in: running, done, failed, interrupted; missing where its command ended and runs are left."""
    at_it = [command for command in known if sweep.key in command.about]
    if any(command.name in alive for command in at_it):
        return "running"
    if not missing:
        return "failed" if failed else "done"
    return "interrupted" if at_it else "missing"


def _sweeps(
    store: Store, present: set[str], failed: set[str], stopped: set[str], known: Sequence[Command], alive: set[str]
) -> Table:
    columns = ("sweep", "recipe", "started", "state", "done", "failed", "stopped", "missing")
    table = Table(*columns, title=f"sweeps in {store.root}")
    for sweep in sorted(results.get_sweeps(store), key=lambda s: s.provenance["created_at"]):
        keys = {member.key for member in sweep.members}
        started = datetime.datetime.fromtimestamp(sweep.provenance["created_at"]).strftime("%Y-%m-%d %H:%M")
        missing = len(keys - present - failed - stopped) + sweep.undecided
        counts = (len(keys & present), len(keys & failed - present), len(keys & stopped), missing)
        state = _state(sweep, counts[1], missing, known, alive)
        table.add_row(sweep.key[:8], sweep.recipe, started, state, *map(str, counts))
    return table
