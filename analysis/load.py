"""Exported tables as polars frames. Refuses a folder whose files are not of one export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.registry import InputError
from orchestrator.schemas import SCHEMA_VERSION, TABLES


@dataclass(frozen=True)
class Tables:
    """One export: a frame per table of `orchestrator.schemas.TABLES`, with the columns given there."""

    export_id: str
    runs: pl.DataFrame
    members: pl.DataFrame
    sweeps: pl.DataFrame
    selections: pl.DataFrame
    metrics: pl.DataFrame
    comparisons: pl.DataFrame
    layers: pl.DataFrame
    memorization: pl.DataFrame
    campaigns: pl.DataFrame
    proxies: pl.DataFrame
    exact: pl.DataFrame
    examples: pl.DataFrame
    influence: pl.DataFrame
    influence_pairs: pl.DataFrame
    influence_examples: pl.DataFrame
    series: pl.DataFrame
    costs: pl.DataFrame
    workers: pl.DataFrame


def load(folder: str | Path) -> Tables:
    """Read every table; raises InputError where one is missing, unreadable, of another schema or another export."""
    read = {name: _read(Path(folder) / f"{name}.parquet") for name in TABLES}
    for name, table in read.items():
        _check(Path(folder) / f"{name}.parquet", table, TABLES[name])
    ids = {name: _footer(table, "export_id") for name, table in read.items()}
    if len(set(ids.values())) > 1:
        listed = ", ".join(f"{name} {export_id}" for name, export_id in ids.items())
        raise InputError(
            f"{str(folder)!r} mixes tables of several exports ({listed}); "
            "allowed: one export_id in all; run `unlearn export` again"
        )
    frames = {name: pl.DataFrame(pl.from_arrow(table)) for name, table in read.items()}
    return Tables(export_id=ids["runs"], **frames)


def _read(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except FileNotFoundError:
        allowed = ", ".join(TABLES)
        raise InputError(f"{str(path)!r} is missing; an export holds {allowed}; run `unlearn export`") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(
            f"{str(path)!r} cannot be read as Parquet ({reason}); allowed: a file that `unlearn export` wrote; "
            "run `unlearn export` again"
        ) from None


def _check(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    version = _footer(table, "schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{str(path)!r} has schema version {version or 'none'}; allowed: {SCHEMA_VERSION}; "
            "run `unlearn export` again"
        )
    if not _footer(table, "export_id"):
        raise InputError(
            f"{str(path)!r} has no export_id in its footer; allowed: a file that `unlearn export` wrote; "
            "run `unlearn export` again"
        )
    got, allowed = ([(field.name, str(field.type)) for field in fields] for fields in (table.schema, schema))
    if got != allowed:
        odd = ", ".join(f"{name} {kind}" for name, kind in sorted(set(got) ^ set(allowed))) or "their order"
        raise InputError(
            f"{str(path)!r} has other columns than schema version {SCHEMA_VERSION} (they differ in {odd}); "
            "run `unlearn export` again"
        )


def _footer(table: pa.Table, name: str) -> str:
    value: bytes = (table.schema.metadata or {}).get(name.encode(), b"")
    return value.decode(errors="replace")
