"""`unlearn export`: Parquet tables from the store."""

from __future__ import annotations

from jobs.progress import console
from jobs.session import existing_store
from orchestrator import export
from orchestrator.schemas import TABLES


def run(storage: str) -> None:
    """Write all tables anew and say where they are."""
    store = existing_store(storage)
    export_id = export.export(store)
    console.print(f"{store.url('exports')}: {', '.join(TABLES)} (export {export_id})", highlight=False)
