"""Finished runs: rows, attempts, sweeps, outputs and tables in the store."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from orchestrator.arrays import damaged, not_whole, pack, unpack, unpack_some
from orchestrator.data import Outputs, SplitOutputs
from orchestrator.pipeline import REFERENCE, Layer
from orchestrator.registry import InputError, canonical_json
from orchestrator.sealed import seal, unseal
from orchestrator.specs import ForgetSpec, Setting, key
from orchestrator.store import Store

COMPARABLE = "comparable"  # the entry of a row's provenance that says what it may be compared with


def comparable(setting: Setting, forget: ForgetSpec) -> str:
    """What runs have in common that may be compared, by key."""
    return canonical_json([key(setting), key(forget)])


@dataclass(frozen=True)
class Row:
    """One finished run. Equality promises cover everything but `provenance`.

    spec: the run's spec as JSON. metrics: name -> split -> value, and metric_versions the versions that made them.
    series: name -> one value per epoch. measurements: steps, steps_ratio, realised_budget, effective_budget, ...
    provenance: data, seconds, host, numerics, git_commit, finished_at (seconds since 1970).
    """

    key: str
    spec: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    metric_versions: Mapping[str, str]
    series: Mapping[str, list[float]]
    measurements: Mapping[str, float]
    layers: tuple[Layer, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_reference(self) -> bool:
        return bool(self.spec["method"]["name"] == REFERENCE)

    @property
    def comparable_with(self) -> str:
        """Rows with the same text may be compared: equal data, model, training recipe and forget set.

        As the row itself says, with the versions of the functions that made it. One from before rows said so goes by
        the keys that its spec has now, or, where a plugin that is not loaded is part of it, by its spec as stored.
        """
        if (said := self.provenance.get(COMPARABLE)) is not None:
            return str(said)
        return _comparable(canonical_json([self.spec["setting"], self.spec["forget"]]))


@lru_cache(1024)
def _comparable(text: str) -> str:
    setting, forget = json.loads(text)
    try:
        return comparable(Setting(**setting), ForgetSpec(**forget))
    except (InputError, ValidationError):
        return text


@dataclass(frozen=True)
class Attempt:
    """One try at a run that did not become a row. status: running, failed, stopped or interrupted."""

    key: str
    spec: Mapping[str, Any]
    status: str
    error: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


Role = Literal["reported", "confirmed", "tuning"]


@dataclass(frozen=True)
class Member:
    """A run of a sweep, under the name that the recipe gives its combination of strategy and method.

    role: `reported` (its setting was given), `confirmed` (its setting was chosen on tuning runs), or `tuning`: a run
    that a setting was chosen by, which no table may report.
    """

    arm: str
    key: str
    role: Role = "reported"


@dataclass(frozen=True)
class Sweep:
    """What a sweep is: the runs that belong to it, by key. Rows are shared among sweeps.

    suggestions: the settings that Optuna chose, values by axis, each written before its runs are begun. caution: what
    its results depend on beside what it says, as the number of workers where runs are stopped early.
    selections: the key of each choice of a setting, and of the runs that report it. undecided: how many runs are not
    known yet, since their settings wait for tuning runs.
    """

    key: str
    recipe: str
    members: tuple[Member, ...]
    study: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    suggestions: tuple[Mapping[str, Any], ...] = ()
    caution: str = ""
    selections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    undecided: int = 0


def sweep_key(recipe: str, members: Iterable[Member], *more: str) -> str:
    """The name of a sweep: its recipe, the runs in it, and `more` that tells it from others."""
    parts = [recipe, sorted({(member.arm, member.key) for member in members}), *more]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def search_key(recipe: str, parts: object) -> str:
    """The name of a sweep whose runs are chosen on the way: its recipe, and what they are chosen by."""
    return hashlib.sha256(canonical_json([recipe, "search", parts]).encode()).hexdigest()[:32]


# ---- rows, attempts and sweeps ---------------------------------------------------------------------------------------


def put_row(store: Store, row: Row) -> None:
    store.put(f"rows/{row.key}.json", seal(asdict(row)))


def get_row(store: Store, key: str) -> Row:
    body = unseal(store, f"rows/{key}.json")
    layers = tuple(Layer(**layer) for layer in body.pop("layers"))
    return Row(**body, layers=layers)


def get_later_metrics(store: Store, key: str) -> dict[str, dict[str, Mapping[str, float]]]:
    """Metrics of a run that were computed after its row: name -> version -> split -> value. Lost ones are none."""
    try:
        found: dict[str, dict[str, Mapping[str, float]]] = unseal(store, f"metrics/{key}.json")
    except (FileNotFoundError, InputError):
        return {}
    return found


def put_later_metrics(store: Store, key: str, metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    store.put(f"metrics/{key}.json", seal(dict(metrics)))


def row_keys(store: Store) -> set[str]:
    return {name.removesuffix(".json") for name in store.names("rows")}


def put_attempt(store: Store, attempt: Attempt, number: int | None = None) -> None:
    """Keep a try beside the earlier ones of the same run; its number is the moment in ns, unless it has one."""
    store.put(f"attempts/{attempt.key}/{number or time.time_ns()}.json", seal(asdict(attempt)))


def is_made(store: Store, attempt: Attempt) -> bool:
    """Whether what an attempt did not come to make is there by now."""
    said = attempt.provenance
    wanted = said.get("objects") or [name for name in [said.get("object")] if name]  # the second: from before
    whole = said.get("whole")  # the block of a model that failed by itself
    return (bool(wanted) and all(map(store.exists, wanted))) or (whole is not None and store.exists(whole))


def get_attempts(store: Store) -> dict[str, list[Attempt]]:
    """All attempts by run key, oldest first."""
    attempts: dict[str, list[Attempt]] = {}
    names = store.names("attempts")
    for name in sorted(names, key=lambda n: (n.partition("/")[0], int(n.partition("/")[2].removesuffix(".json")))):
        attempts.setdefault(name.partition("/")[0], []).append(Attempt(**unseal(store, f"attempts/{name}")))
    return attempts


def put_sweep(store: Store, sweep: Sweep) -> None:
    store.put(f"sweeps/{sweep.key}.json", seal(asdict(sweep)))


def get_sweep(store: Store, key: str) -> Sweep | None:
    """A stored sweep; None where there is none."""
    try:
        body = unseal(store, f"sweeps/{key}.json")
    except FileNotFoundError:
        return None
    members = tuple(Member(**member) for member in body.pop("members"))
    selections = {name: tuple(runs) for name, runs in body.pop("selections", {}).items()}
    suggestions = tuple(body.pop("suggestions", ()))
    return Sweep(**body, members=members, suggestions=suggestions, selections=selections)


def get_sweeps(store: Store) -> list[Sweep]:
    found = (get_sweep(store, name.removesuffix(".json")) for name in store.names("sweeps"))
    return [sweep for sweep in found if sweep is not None]


# ---- outputs -------------------------------------------------------------------------------------------------------


def put_outputs(store: Store, key: str, outputs: Outputs) -> None:
    arrays = {}
    for split, part in outputs.items():
        arrays[f"{split}.logits"] = part.logits
        arrays[f"{split}.labels"] = part.labels.astype(np.int32)
        arrays[f"{split}.true_labels"] = part.true_labels.astype(np.int32)
    store.put(f"outputs/{key}.safetensors", pack(arrays))


def check_outputs(store: Store, keys: Sequence[str]) -> None:
    """Raise InputError for the first finished run whose outputs are lost or cut; reads headers alone."""
    for name in not_whole(store, [f"outputs/{run}.safetensors" for run in keys]):
        raise _lost(store, PurePosixPath(name).stem)


def _lost(store: Store, key: str) -> InputError:
    return InputError(
        f"{store.url(f'outputs/{key}.safetensors')} is missing or damaged; remove the run's "
        f"{store.url(f'rows/{key}.json')} and run its sweep again, which computes this run anew"
    )


def get_outputs(store: Store, key: str, only: Sequence[str] | None = None) -> dict[str, SplitOutputs]:
    """The outputs of a finished run, on some splits alone or on all; raises InputError where they are lost or damaged.

    Splits that are not asked for are not read.
    """
    name = f"outputs/{key}.safetensors"
    try:
        if only is None:
            arrays = unpack(store, name)
        else:
            arrays, _ = unpack_some(store, name, lambda part: part.partition(".")[0] in only)
    except (FileNotFoundError, InputError):
        raise _lost(store, key) from None
    splits = {name.partition(".")[0] for name in arrays}
    return {
        split: SplitOutputs(
            arrays[f"{split}.logits"],
            arrays[f"{split}.labels"].astype(np.int64),
            arrays[f"{split}.true_labels"].astype(np.int64),
        )
        for split in sorted(splits)
    }


# ---- tables --------------------------------------------------------------------------------------------------------


def put_table(store: Store, name: str, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
    """A table as one Parquet object, with metadata in its footer."""
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(dict(metadata) if metadata else None), sink, compression="zstd")
    store.put(name, sink.getvalue().to_pybytes())


def table_metadata(store: Store, name: str) -> dict[str, str]:
    """What the footer of a stored Parquet table says beside its columns; nothing where there is none to be read."""
    import pyarrow.parquet as pq

    try:
        with store.filesystem.open_input_file(store.path(name)) as file, pq.ParquetFile(file) as table:
            found = table.schema_arrow.metadata or {}
    except (OSError, pa.ArrowException):
        return {}
    return {name.decode(): value.decode(errors="replace") for name, value in found.items()}


def get_table(store: Store, name: str) -> pa.Table:
    """A stored Parquet table; raises InputError where it is damaged."""
    import pyarrow.parquet as pq

    content = store.get(name)
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:  # read_table imports pandas, which takes half a second
            return file.read()
    except (pa.ArrowException, OSError) as error:
        raise damaged(store, name, error) from None
