"""A folder is read as written, or refused with a sentence that says why and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.load import Tables, load
from orchestrator.registry import InputError
from orchestrator.schemas import SCHEMA_VERSION, TABLES
from tests.analysis import made


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewrite(path: Path, table: pa.Table, **footer: str) -> None:
    pq.write_table(table.replace_schema_metadata(footer or None), path)


def test_every_table_is_read_as_written(read: Tables) -> None:
    lines = made.sweep().lines
    for name, schema in TABLES.items():
        frame = getattr(read, name)
        assert frame.columns == schema.names
        assert frame.to_dicts() == pa.Table.from_pylist(lines[name], schema=schema).to_pylist()
    assert read.export_id == "0123456789abcdef"


def test_a_missing_table_is_refused(copy: Path) -> None:
    (copy / "layers.parquet").unlink()
    with pytest.raises(InputError, match=r"layers\.parquet' is missing.*run `unlearn export`"):
        load(copy)
    with pytest.raises(InputError, match="is missing"):
        load(copy / "nowhere")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 9])
def test_an_unreadable_table_is_refused(copy: Path, content: bytes) -> None:
    (copy / "runs.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"runs\.parquet' cannot be read as Parquet.*unlearn export"):
        load(copy)


def test_half_a_file_is_refused(copy: Path) -> None:
    whole = (copy / "metrics.parquet").read_bytes()
    (copy / "metrics.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load(copy)


def test_a_mixture_of_exports_is_refused(copy: Path) -> None:
    made.sweep().write(copy, export_id="another", only=["metrics"])
    with pytest.raises(InputError, match=r"mixes tables of several exports.*metrics another.*unlearn export"):
        load(copy)


def test_another_schema_version_is_refused(copy: Path) -> None:
    rewrite(copy / "runs.parquet", pq.read_table(copy / "runs.parquet"), export_id="x", schema_version="0")
    with pytest.raises(InputError, match=f"schema version 0; allowed: {SCHEMA_VERSION}; run `unlearn export`"):
        load(copy)


def test_a_table_without_footer_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in TABLES:  # all of them, so that their export ids agree
        table = pq.ParquetFile(folder / f"{name}.parquet").read()
        rewrite(tmp_path / f"{name}.parquet", table, schema_version=SCHEMA_VERSION)
    with pytest.raises(InputError, match="has no export_id"):
        load(tmp_path)
    rewrite(tmp_path / "runs.parquet", pq.ParquetFile(folder / "runs.parquet").read())
    with pytest.raises(InputError, match="schema version none"):
        load(tmp_path)


def test_other_columns_are_refused(copy: Path) -> None:
    table = pq.read_table(copy / "metrics.parquet")
    footer = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    rewrite(copy / "metrics.parquet", table.rename_columns(["key", "metric", "part", "value"]), **footer)
    with pytest.raises(InputError, match=r"other columns than schema version.*part string, split string"):
        load(copy)
