"""Exports: of one moment, fresh or left alone, and readable by anything that reads Parquet as the README shows."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from analysis.load import load
from jobs.report import exports
from jobs.tracked import files
from orchestrator import export, results
from orchestrator.metrics import METRICS
from orchestrator.overrides import override
from orchestrator.plan import Plan
from orchestrator.recipes import RECIPES
from orchestrator.registry import InputError
from orchestrator.schemas import SCHEMA_VERSION, TABLES
from orchestrator.specs import RunSpec
from orchestrator.store import StorageError, Store
from tests.benchmarks.rows import put
from tests.faults import s3_server

SPLITS = ["forget", "retain", "test"]
WORDS = ["seeds=0,1", "forget_sets=random", "references=2", "methods=identity,finetune", "lr=0.1"]


def fill(store: Store) -> Plan:
    """A small sweep's made rows and their outputs; the metrics are made, too."""
    plan = Plan(override(RECIPES["digits"].function(), WORDS), "0" * 64, frozenset())
    values = {name: dict.fromkeys(SPLITS, 0.0) for name in METRICS}
    for number, task in enumerate((*plan.references(), *plan.runs())):
        assert isinstance(task.spec, RunSpec)
        put(store, values, (number, task.spec))
    results.put_sweep(store, plan.sweep({"created_at": 1.0}))
    return plan


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store in the folder `runs`, which is where the README's commands look."""
    monkeypatch.chdir(tmp_path)
    made = Store("runs")
    fill(made)
    return made


def test_an_export_is_of_one_moment_with_the_schema_and_its_numbers(store: Store) -> None:
    said = export.export(store)
    for name, schema in TABLES.items():
        table = pq.read_table(store.path(f"exports/{name}.parquet"))
        assert table.schema.remove_metadata().equals(schema), name
        assert table.schema.metadata[b"export_id"].decode() == said
        assert table.schema.metadata[b"schema_version"].decode() == SCHEMA_VERSION
    read = load("runs/exports")
    rows = {key: results.get_row(store, key) for key in results.row_keys(store)}
    assert Counter(read.runs["key"]) == Counter(rows.keys())
    assert len(read.members) == len(rows) == 6
    assert len(read.series) == 10 * len(rows)
    assert {(k, e): v for k, _, e, v in read.series.iter_rows()} == {
        (key, epoch): value for key, row in rows.items() for epoch, value in enumerate(row.series["loss"], 1)
    }
    assert len(read.layers) == 6 * len(rows)
    references = {key for key, row in rows.items() if row.is_reference}
    for run, other, value in (
        read.comparisons.filter((pl.col("metric") == "disagreement") & (pl.col("split") == "test"))
        .select("key", "reference_key", "value")
        .iter_rows()
    ):
        ours, theirs = (results.get_outputs(store, key)["test"].logits.argmax(1) for key in (run, other))
        assert value == np.mean(ours != theirs)
        assert other in references
    pairs = read.comparisons.filter(pl.col("metric") == "tug_of_war")
    assert len(pairs) == 4 * 2 + 2, "each run with both references, each reference with the other"


def test_what_is_fresh_is_left_alone_and_what_is_not_is_exported_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [export.export(store)]

    def is_left_alone() -> bool:
        export.ensure(store)
        ids.append(load("runs/exports").export_id)
        return ids[-1] == ids[-2]

    assert is_left_alone()
    key = min(results.row_keys(store))
    row = results.get_row(store, key)
    results.put_attempt(store, results.Attempt("a" * 32, row.spec, "failed", "why", {"kind": "run"}))
    assert not is_left_alone()
    assert "failed" in load("runs/exports").runs["status"]
    store.delete(f"rows/{key}.json")
    assert not is_left_alone()
    results.put_row(store, row)
    assert not is_left_alone()
    (sweep,) = results.get_sweeps(store)
    results.put_sweep(store, replace(sweep, provenance={"created_at": 2.0}))
    assert is_left_alone()
    results.put_sweep(store, replace(sweep, members=sweep.members[:-1]))  # as Optuna's, whose members come one by one
    assert not is_left_alone()
    table = Path(store.path("exports/layers.parquet"))
    table.write_bytes(table.read_bytes()[:-5])
    assert not is_left_alone()
    table.unlink()
    assert not is_left_alone()
    monkeypatch.setattr(export, "SCHEMA_VERSION", "next")
    export.ensure(store)
    assert pq.read_schema(table).metadata[b"schema_version"] == b"next"


class Filling(Store):
    """A store that has room for so many objects more."""

    def put(self, name: str, content: bytes) -> None:
        object.__setattr__(self, "room", self.room - 1)
        if self.room < 0:
            raise StorageError("no room")
        super().put(name, content)

    room = 3


def test_an_export_that_breaks_off_leaves_whole_files_that_the_loader_will_not_mix(store: Store) -> None:
    export.export(store)
    with pytest.raises(StorageError):
        export.export(Filling(store.root))
    assert not list(Path("runs").rglob("*.partial"))
    for name in TABLES:
        pq.read_table(store.path(f"exports/{name}.parquet"))
    with pytest.raises(InputError, match=r"mixes tables of several exports.*run `unlearn export` again"):
        load("runs/exports")
    export.ensure(store)
    assert len(load("runs/exports").runs) == 6


def test_a_damaged_row_leaves_the_last_export_whole(store: Store) -> None:
    said, path = export.export(store), store.path(f"outputs/{min(results.row_keys(store))}.safetensors")
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    with pytest.raises(InputError, match="missing or damaged"):
        export.export(store)
    assert load("runs/exports").export_id == said


def test_the_files_about_a_sweep_are_of_its_export(store: Store) -> None:
    said = export.export(store)
    (sweep,) = results.get_sweeps(store)
    found = files(store, sweep)
    assert {*found} == {"specs.jsonl", "tables.json", "report.html", "comparison.csv", *FIGURES}
    about = json.loads(found["tables.json"])
    assert (about["export_id"], about["tables"]["runs"]["rows"]) == (said, 6)
    specs = {line["key"]: line["spec"] for line in map(json.loads, found["specs.jsonl"].splitlines())}
    assert specs == {key: results.get_row(store, key).spec for key in results.row_keys(store)}
    assert said in found["report.html"].decode()
    assert "finetune" in found["comparison.csv"].decode()


FIGURES = ("figures/forget-quality.png",)
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def answer(tool: str, short: str) -> object:
    """What the README's line for a tool gives, run as it is written."""
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "runs/exports" in text)
    names: dict[str, object] = {}
    exec(re.search(rf"^import {tool}.*$", block, re.MULTILINE)[0], names)  # type: ignore[index]
    (line,) = re.findall(rf"^{short}\..*$", block, re.MULTILINE)
    return eval(line, names)


def test_the_lines_of_the_readme_read_a_real_export(store: Store) -> None:
    export.export(store)
    rows = [results.get_row(store, key) for key in results.row_keys(store)]
    frame = answer("polars", "pl")
    assert isinstance(frame, pl.DataFrame)
    (mean,) = frame.filter((pl.col("metric") == "loss") & (pl.col("split") == "test"))["value"]
    assert mean == pytest.approx(np.mean([row.metrics["loss"]["test"] for row in rows]))
    relation = answer("duckdb", "duckdb")
    assert isinstance(relation, duckdb.DuckDBPyRelation)
    tugs = load("runs/exports").comparisons.filter(pl.col("metric") == "tug_of_war")
    by_hand = {key: np.mean([v for k, v in tugs.select("key", "value").iter_rows() if k == key]) for key in tugs["key"]}
    assert len(by_hand) == 6
    assert dict(relation.fetchall()) == pytest.approx(by_hand)
    table = answer("pandas", "pd")
    assert isinstance(table, pd.DataFrame)
    assert list(table["loss"]) == pytest.approx(np.mean([row.series["loss"] for row in rows], axis=0))


def test_an_export_on_s3_reads_as_one_on_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with s3_server() as url:
        away = Store("s3://bucket/runs", url)
        fill(away)
        for place in (away, store):
            export.export(place)
        with exports(away) as folder:
            there = load(folder)
        export.ensure(away)
        with exports(away) as folder:
            assert load(folder).export_id == there.export_id
    here = load("runs/exports")
    for name in TABLES:
        assert getattr(there, name).equals(getattr(here, name)), name
