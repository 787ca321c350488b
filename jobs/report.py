"""`unlearn report`: the HTML report and the terminal table of a sweep, from the exported tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from analysis import load, tables
from jobs.progress import console
from jobs.session import existing_store
from orchestrator import results, schemas
from orchestrator.registry import InputError, suggest
from orchestrator.store import Store

_TABLE_WIDTH = 124  # columns that the terminal table needs; a narrower terminal wraps its lines
_WIDTHS = {"paper": 150, "rum": 150, "selections": 150}


def run(storage: str, sweep: str | None, out: Path, table: str = "comparison") -> None:
    """Print a table of a sweep (the newest, unless one is named) and write its report."""
    store = existing_store(storage)
    chosen = newest(store, sweep)
    if chosen is not None:
        show(store, chosen, table)
    try:
        write(store, chosen, out)
    except OSError as error:
        raise InputError(
            f"the report cannot be written to {str(out)!r}: {error.strerror}; give --out another file"
        ) from None
    if chosen is None:
        console.print(f"{store.root} holds no sweep yet: the report has scores alone, if any")
    console.print(f"report: {out}", highlight=False)


def newest(store: Store, prefix: str | None) -> str | None:
    """The key of the sweep asked for last, or of the one that starts with the prefix; None in a store without any."""

    def asked(sweep: results.Sweep) -> float:
        when: float = sweep.provenance.get("continued_at", sweep.provenance["created_at"])
        return when

    sweeps = sorted(results.get_sweeps(store), key=asked)
    matching = [sweep.key for sweep in sweeps if sweep.key.startswith(prefix or "")]
    if prefix and len(matching) != 1:
        known = ", ".join(f"{sweep.key[:8]} ({sweep.recipe})" for sweep in sweeps)
        raise InputError(f"sweep {prefix!r} matches {len(matching)} sweeps; allowed: {known or 'none is stored'}")
    return matching[-1] if matching else None


@contextmanager
def exports(store: Store) -> Iterator[Path]:
    """The folder of exported tables; a copy where the store is not local."""
    names = [name for name in schemas.TABLES if store.exists(f"exports/{name}.parquet")]
    if not names:
        raise InputError(f"{store.url('exports')} holds no tables; run `unlearn export --storage {store.root}` first")
    if store.is_local:
        yield Path(store.path("exports"))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / f"{name}.parquet").write_bytes(store.get(f"exports/{name}.parquet"))
        yield Path(folder)


TABLES = ("comparison", "selections", "paper", "rum", "ablation")


def _tables(table: str, read: load.Tables, sweep: str) -> list[Table]:
    """One of `TABLES`, by parts; the rarer ones and the figures are imported where they are asked for."""
    if table == "comparison":
        return tables.render(tables.comparison_table(read, sweep))
    from analysis import paper, refinement, selections

    rest: Mapping[str, Callable[[], list[Table]]] = {
        "selections": lambda: selections.render(read, sweep),
        "paper": lambda: paper.render(paper.paper_table(read, sweep)),
        "rum": lambda: refinement.render(read, sweep),
        "ablation": lambda: paper.render_ablation(paper.ablation_table(read, sweep)),
    }
    return rest[table]()


def show(store: Store, sweep: str, table: str = "comparison") -> None:
    """Print one of a sweep's tables, one part per forget set."""
    if table not in TABLES:
        raise InputError(f"unknown table {table!r}; {suggest(table, TABLES)}")
    record = results.get_sweep(store, sweep)
    if record is not None and record.caution:
        console.print(f"[yellow]not independent of the number of workers[/yellow]: {record.caution}", highlight=False)
    with exports(store) as folder:
        wide = Console(width=max(console.width, _WIDTHS.get(table, _TABLE_WIDTH)))
        for part in _tables(table, load.load(folder), sweep):
            wide.print(part)


def write(store: Store, sweep: str | None, out: Path, facts: Mapping[str, str] | None = None) -> Path:
    """Write the HTML report."""
    from analysis import report

    with exports(store) as folder:
        return report.write(folder, out, sweep, facts)
