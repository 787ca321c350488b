import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from orchestrator.arrays import pack, unpack, unpack_some
from orchestrator.data import SplitOutputs
from orchestrator.export import export
from orchestrator.metrics import ALL
from orchestrator.pipeline import half
from orchestrator.recipes import RECIPES
from orchestrator.registry import InputError
from orchestrator.results import (
    Attempt,
    Layer,
    Member,
    Row,
    Sweep,
    get_attempts,
    get_outputs,
    get_row,
    get_sweeps,
    get_table,
    put_attempt,
    put_outputs,
    put_row,
    put_sweep,
    put_table,
    row_keys,
    sweep_key,
)
from orchestrator.schemas import TABLES
from orchestrator.specs import RunSpec
from orchestrator.store import Store

ROW = Row(
    key="a" * 32,
    spec={"method": {"name": "finetune", "options": {"lr": 0.1, "word": 'ü\n"x"'}}, "setting": {}, "forget": {}},
    metrics={"accuracy": {"forget": 0.1 + 0.2, "test": 1.0}, "membership_auc": {}},
    metric_versions={"accuracy": "1", "membership_auc": "2+abc"},
    series={"loss": [1e-300, 5e-324, 2.0]},
    measurements={"steps": 35, "realised_budget": 1 / 3},
    layers=(Layer("0.weight", 10, 3, 4), Layer("0.bias", 2, 0, 2)),
    provenance={"host": "h", "seconds": 1.5, "git_commit": None},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_comes_back_as_it_was(store: Store) -> None:
    put_row(store, ROW)
    back = get_row(store, ROW.key)
    assert back == ROW
    assert back.metrics["accuracy"]["forget"].hex() == (0.1 + 0.2).hex()
    assert row_keys(store) == {ROW.key}


def test_a_second_row_of_a_run_replaces_the_first(store: Store) -> None:
    put_row(store, ROW)
    put_row(store, replace(ROW, measurements={"steps": 1}))
    assert get_row(store, ROW.key).measurements == {"steps": 1}
    assert row_keys(store) == {ROW.key}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["metrics", "series", "measurements"])
def test_a_row_with_a_number_that_is_none_is_not_written(store: Store, part: str, value: float) -> None:
    parts: dict[str, Any] = {"metrics": {"m": {"s": value}}, "series": {"loss": [value]}, "measurements": {"x": value}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        put_row(store, replace(ROW, **{part: parts[part]}))
    assert row_keys(store) == set()


def test_a_row_cut_short_anywhere_is_refused_and_named(store: Store, tmp_path: Path) -> None:
    put_row(store, ROW)
    file = tmp_path / "rows" / f"{ROW.key}.json"
    content = file.read_bytes()
    for length in (0, 1, len(content) // 3, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match=rf"{ROW.key}\.json is damaged: {length} bytes") as caught:
            get_row(store, ROW.key)
        assert str(file) in str(caught.value)
        assert "run its sweep again" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_changed_byte_of_a_row_goes_unnoticed(store: Store, tmp_path: Path) -> None:
    put_row(store, ROW)
    file = tmp_path / "rows" / f"{ROW.key}.json"
    content = file.read_bytes()
    for i in range(len(content)):
        for bit in (1, 16, 128):
            file.write_bytes(content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :])
            try:
                back = get_row(store, ROW.key)
            except InputError:
                continue
            assert back == ROW, f"byte {i} changed the row"  # white space and the like


@pytest.mark.parametrize("content", [b"[]", b"{}", b'"text"', b'{"body": {}, "sha256": 5}', b"\xff\xfe"])
def test_other_json_is_not_taken_for_a_row(store: Store, content: bytes) -> None:
    store.put("rows/x.json", content)
    with pytest.raises(InputError, match="damaged"):
        get_row(store, "x")


def test_a_row_that_is_not_there_is_not_damaged(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        get_row(store, "absent")
    assert row_keys(store) == set()


def test_rows_are_compared_within_one_setting_and_forget_set() -> None:
    def row(**spec: Any) -> Row:
        return replace(ROW, spec={"setting": {"data": "d"}, "forget": {"draw": 0}, "method": {"name": "x"}, **spec})

    assert row(seed=1).comparable_with == row(seed=2, method={"name": "retrain"}).comparable_with
    assert row(setting={"data": "e"}).comparable_with != row().comparable_with
    assert row(forget={"draw": 1}).comparable_with != row().comparable_with
    assert row(method={"name": "retrain"}).is_reference
    assert not row().is_reference


# ---- attempts and sweeps -------------------------------------------------------------------------------------------


def attempt(key: str, number: int) -> Attempt:
    return Attempt(key, {"seed": number}, "failed", f"FloatingPointError: number {number}", {"time": 1.0 * number})


def test_attempts_come_back_oldest_first(store: Store) -> None:
    for number in range(12):
        put_attempt(store, attempt("a", number))
    put_attempt(store, attempt("b", 0))
    assert get_attempts(store) == {"a": [attempt("a", number) for number in range(12)], "b": [attempt("b", 0)]}


def test_a_removed_attempt_does_not_cost_another_one(store: Store) -> None:
    for number in range(3):
        put_attempt(store, attempt("a", number))
    store.delete(f"attempts/a/{store.names('attempts/a')[0]}")
    put_attempt(store, attempt("a", 3))
    assert get_attempts(store) == {"a": [attempt("a", number) for number in (1, 2, 3)]}


def test_without_attempts_there_are_none(store: Store) -> None:
    assert get_attempts(store) == {}


def test_sweeps_come_back_as_they_were(store: Store) -> None:
    members = (Member("del", "k1"), Member("del", "k2"), Member("reference", "k3"))
    sweep = Sweep(sweep_key("digits", members), "digits", members, {"seeds": [0, 1]}, {"command": "x"})
    put_sweep(store, sweep)
    assert get_sweeps(store) == [sweep]


def test_a_sweep_is_named_by_its_recipe_and_runs() -> None:
    members = [Member("del", "k1"), Member("del", "k2")]
    name = sweep_key("digits", members)
    assert sweep_key("digits", [*reversed(members), members[0]]) == name
    others = [
        sweep_key("other", members),
        sweep_key("digits", members[:1]),
        sweep_key("digits", [members[0], Member("salun", "k2")]),
    ]
    assert len({name, *others}) == 4


# ---- arrays --------------------------------------------------------------------------------------------------------


def outputs() -> dict[str, SplitOutputs]:
    rng = np.random.default_rng(0)
    made = {}
    for split, size in {"forget": 5, "retain": 9, "test": 4}.items():
        labels = rng.integers(0, 3, size)
        made[split] = SplitOutputs(half(rng.normal(0, 9, (size, 3))), labels, (labels + 1) % 3)
    return made


def test_outputs_come_back_as_they_were(store: Store) -> None:
    put_outputs(store, "k", outputs())
    back = get_outputs(store, "k")
    assert set(back) == {"forget", "retain", "test"}
    for split, expected in outputs().items():
        for name in ("logits", "labels", "true_labels"):
            ours, theirs = getattr(back[split], name), getattr(expected, name)
            assert ours.dtype == theirs.dtype
            assert (ours == theirs).all()


def test_outputs_of_a_view_come_back_in_its_order(store: Store) -> None:
    forget = outputs()["forget"]
    turned = SplitOutputs(forget.logits[::-1, ::-1], forget.labels[::-1], forget.true_labels[::-1])
    put_outputs(store, "k", {"forget": turned})
    assert (get_outputs(store, "k")["forget"].logits == forget.logits[::-1, ::-1]).all()


def test_outputs_that_hold_a_nan_are_refused_when_read(store: Store) -> None:
    logits = np.full((2, 3), np.nan, dtype=np.float16)
    arrays = {"forget.logits": logits, "forget.labels": np.zeros(2, int), "forget.true_labels": np.zeros(2, int)}
    store.put("outputs/k.safetensors", pack(arrays))
    with pytest.raises(ValueError, match="NaN or infinite"):
        get_outputs(store, "k")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_damaged_arrays_are_refused_and_named(store: Store, kept: float) -> None:
    put_outputs(store, "k", outputs())
    content = store.get("outputs/k.safetensors")
    store.put("outputs/k.safetensors", content[: int(kept * len(content))])
    with pytest.raises(InputError, match=r"outputs/k\.safetensors is missing or damaged; remove .*rows/k\.json"):
        get_outputs(store, "k")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_])
def test_arrays_of_every_kind_that_we_store_come_back(store: Store, dtype: type) -> None:
    array = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1).astype(dtype)
    store.put("blocks/0", pack({"x": array, "empty": np.zeros((0, 3), dtype)}, {"host": "h"}))
    back = unpack(store, "blocks/0")
    assert back["x"].dtype == array.dtype
    assert (back["x"] == array).all()
    assert back["empty"].shape == (0, 3)


def test_large_logits_are_clipped_and_not_made_infinite() -> None:
    limit = 65504.0
    given = np.array([1e9, -1e9, np.inf, -np.inf, 1.0009765625, 0.1], dtype=np.float32)
    assert half(given).tolist() == [limit, -limit, limit, -limit, 1.0009765625, float(np.float16(0.1))]
    assert np.isnan(half(np.array([np.nan]))).all(), "a NaN must stay one, so that it is found"


# ---- tables --------------------------------------------------------------------------------------------------------


def example_column(field: pa.Field) -> pa.Array:
    values = {
        pa.string(): ["a", "ü"],
        pa.int64(): [0, -(2**62)],
        pa.float64(): [0.1, 1e-300],
        pa.binary(): [b"", b"\x00"],
        pa.bool_(): [True, False],
        pa.list_(pa.field("element", pa.float64())): [[], [0.1, 2.0]],
    }
    column = values[field.type]
    return pa.array([column[0], None] if field.nullable else column, field.type)


@pytest.mark.parametrize("name", TABLES)
def test_tables_come_back_with_their_schema(store: Store, name: str) -> None:
    schema = TABLES[name]
    table = pa.table([example_column(field) for field in schema], schema=schema)
    put_table(store, "exports/t.parquet", table, {"export_id": "5"})
    back = get_table(store, "exports/t.parquet")
    assert back.equals(table)
    assert back.schema.remove_metadata() == schema
    assert back.schema.metadata[b"export_id"] == b"5"


def test_a_damaged_table_is_refused_and_named(store: Store) -> None:
    put_table(store, "scores/k.parquet", pa.table({"score": [0.5] * 100}))
    store.put("scores/k.parquet", store.get("scores/k.parquet")[:-20])
    with pytest.raises(InputError, match=r"scores/k\.parquet is damaged"):
        get_table(store, "scores/k.parquet")


def test_rows_are_plain_json(store: Store, tmp_path: Path) -> None:
    """Anyone can read a row without this program."""
    put_row(store, ROW)
    body = json.loads((tmp_path / "rows" / f"{ROW.key}.json").read_text())["body"]
    assert body == json.loads(json.dumps(asdict(ROW)))


def test_a_row_from_before_a_field_was_added_agrees_with_one_at_its_default() -> None:
    """Rows keep their spec as it was written: what came later must not part runs from their references."""
    study = RECIPES["digits"].function()
    spec = study.runs("0" * 64)[0][1].model_dump(mode="json")
    older = json.loads(json.dumps(spec))
    del older["setting"]["training"]["schedule"], older["forget"]["rule"]["options"]["as_released"]
    stored, earlier = replace(ROW, spec=spec), replace(ROW, spec=older)
    assert stored.comparable_with == earlier.comparable_with
    spec["setting"]["training"]["schedule"] = "epoch"
    assert stored.comparable_with != earlier.comparable_with


def test_flipped_bytes_are_noticed_and_objects_without_checksums_are_read(store: Store) -> None:
    arrays = {"a": np.arange(600, dtype=np.float16).reshape(20, 30), "b": np.array(True), "none": np.zeros((0, 3))}
    whole = pack(arrays, {"host": "here"})
    store.put("x", whole)
    for name, array in unpack(store, "x").items():
        assert np.array_equal(array.reshape(arrays[name].shape), arrays[name])
    assert np.array_equal(unpack_some(store, "x", lambda name: name == "a")[0]["a"], arrays["a"])
    place = whole.rindex(np.float16(300).tobytes())
    store.put("x", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(InputError, match=r"x is damaged .the bytes of a do not match their checksum.; remove it"):
        unpack(store, "x")
    with pytest.raises(InputError, match="x is damaged"):
        unpack_some(store, "x", lambda name: name == "a")
    assert "a" not in unpack_some(store, "x", lambda name: name == "b")[0], "what is not asked for is not read"
    store.put("old", safetensors.numpy.save({"a": arrays["a"]}))
    assert np.array_equal(unpack(store, "old")["a"], arrays["a"])


# ---- what is compared ----------------------------------------------------------------------------------------------


def put_run(store: Store, run: RunSpec, drawn: int, *, said: str | None) -> str:
    """A finished run whose forget set is the one drawn so, and that says what it may be compared with, or does not."""
    rng = np.random.default_rng(drawn)
    outputs = {}
    for split in ("forget", "retain", "validation", "test"):
        labels = rng.integers(0, 10, 40)
        outputs[split] = SplitOutputs(half(rng.normal(size=(40, 10))), labels, labels)
    name = hashlib.sha256(f"{run}{drawn}{said}".encode()).hexdigest()[:32]
    put_outputs(store, name, outputs)
    facts = {
        "data": "digits",
        "model": "small_cnn",
        "seconds": 1.0,
        "numerics": "cpu",
        "finished_at": 0.0,
        "git_commit": None,
    }
    provenance = facts | ({} if said is None else {"comparable": said})
    put_row(store, Row(name, run.model_dump(mode="json"), {}, {}, {}, {}, (), provenance))
    return name


@pytest.mark.parametrize("said", [None, ("old", "new")])
def test_runs_whose_forget_sets_were_drawn_by_another_version_of_the_rule_are_not_compared(
    store: Store, said: tuple[str, str] | None
) -> None:
    """Their specs are equal: a version is not part of what a spec says, only of its key."""
    study = RECIPES["digits"].function()
    references, (_, run) = study.reference_runs("f" * 64), study.runs("f" * 64)[0]
    forget = [reference.forget for reference in references]
    assert forget[0] == run.forget == forget[1]
    names = [
        [put_run(store, spec, drawn, said=said and said[drawn]) for spec in (references[0], references[1], run)]
        for drawn in (0, 1)
    ]
    export(store)
    pairs = get_table(store, "exports/comparisons.parquet").select(["key", "reference_key"]).to_pylist()
    found = {(pair["key"], pair["reference_key"]) for pair in pairs}
    assert {pair for pair in found if pair[1] != ALL} == {
        (name, other) for group in names for name in group for other in group[:2] if other != name
    }
