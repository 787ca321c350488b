"""Exported tables as polars frames. Refuses a folder whose files are not of one export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.registry import InputError
from orchestrator.results import SCHEMA_VERSION, TABLES


@dataclass(frozen=True)
class Tables:
    """One export: a frame per table of `orchestrator.results.TABLES`."""

    export_id: str
    runs: pl.DataFrame
    members: pl.DataFrame
    metrics: pl.DataFrame
    comparisons: pl.DataFrame
    layers: pl.DataFrame
    memorization: pl.DataFrame
    examples: pl.DataFrame
    series: pl.DataFrame


def load(folder: str | Path) -> Tables:
    """Read every table; raises InputError where one is missing or unreadable, of another schema or another export."""
    read = {name: _read(Path(folder) / f"{name}.parquet") for name in TABLES}
    ids = {name: _footer(table).get("export_id", "none") for name, table in read.items()}
    for name, table in read.items():
        version = _footer(table).get("schema_version", "none")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{name}.parquet in {str(folder)!r} has schema version {version}; allowed: {SCHEMA_VERSION}; "
                "run `unlearn export` again"
            )
    if len(set(ids.values())) > 1:
        listed = ", ".join(f"{name} {export_id[:8]}" for name, export_id in ids.items())
        raise InputError(f"{str(folder)!r} mixes tables of several exports ({listed}); run `unlearn export` again")
    frames = {name: pl.DataFrame(pl.from_arrow(table)) for name, table in read.items()}
    return Tables(export_id=ids["runs"], **frames)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path} is not there; run `unlearn export` first") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"{path} cannot be read ({reason}); run `unlearn export` again") from None


def _footer(table: pa.Table) -> Mapping[str, str]:
    return {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
