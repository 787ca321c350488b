"""Parquet tables of everything in a store. Reads rows, outputs and scores; trains nothing and needs no data set."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from orchestrator import costs, exact, results, selections
from orchestrator.arms import CAMPAIGN
from orchestrator.criteria import CRITERIA
from orchestrator.data import Outputs
from orchestrator.judging import Judged
from orchestrator.localization import STRATEGIES
from orchestrator.metrics import ALL, COMPARISONS, METRICS, Values
from orchestrator.registry import Added, InputError, canonical_json
from orchestrator.results import Attempt, Row, Sweep
from orchestrator.schemas import SCHEMA_VERSION, TABLES
from orchestrator.selections import Selection
from orchestrator.specs import ScoresSpec, StandInSpec, key
from orchestrator.store import Store
from orchestrator.unlearning import METHODS


def ensure(store: Store) -> None:
    """Export, unless the last export is whole and of what the store holds now."""
    footers = [results.table_metadata(store, f"exports/{name}.parquet") for name in TABLES]
    said = {(footer.get("export_id"), footer.get("contents")) for footer in footers}
    if len(said) > 1 or footers[0].get("contents") != _contents(store):
        export(store)


_FOLDERS = ("rows", "attempts", "scores", "proxies", "influence", exact.TABLES_FOLDER, "costs")


def _contents(store: Store) -> str:
    """A digest of all that an export is made from, by name, size and time of change."""
    versions = [(name, entry.version) for kind in (METRICS, COMPARISONS) for name, entry in kind.items()]
    sweeps = [
        [sweep.key, sweep.caution, sweep.selections, *map(vars, sweep.members)] for sweep in results.get_sweeps(store)
    ]
    # sweeps by what is read of them: their records are put again with each command
    read = [SCHEMA_VERSION, versions, sweeps, *(store.stamps(folder) for folder in _FOLDERS)]
    return hashlib.sha256(canonical_json(read).encode()).hexdigest()[:32]


def export(store: Store) -> str:
    """Write every table of `TABLES` to `exports/` anew and return the export_id that all their footers carry."""
    contents = _contents(store)  # before anything is read: what comes meanwhile is not in it
    rows = [results.get_row(store, key) for key in sorted(results.row_keys(store))]
    done = {row.key for row in rows}
    failed = [tries[-1] for name, tries in results.get_attempts(store).items() if name not in done]
    outputs, sweeps = _LazyOutputs(store), results.get_sweeps(store)
    metrics = {row.key: metrics_of(store, row, outputs) for row in rows}
    export_id = secrets.token_hex(8)
    footer = {"export_id": export_id, "schema_version": SCHEMA_VERSION, "contents": contents}
    lines: dict[str, Iterable[Mapping[str, Any]]] = {
        "runs": [*map(run_line, rows), *(failed_line(a) for a in failed if a.provenance.get("kind") == "run")],
        "members": member_lines(sweeps),
        "sweeps": ({"sweep": s.key, "recipe": s.recipe, "caution": s.caution or None} for s in sweeps),
        "selections": selection_lines(store, sweeps, {row.key: row for row in rows}),
        "metrics": metric_lines(metrics),
        "comparisons": comparison_lines(rows, outputs, metrics),
        "layers": ({"key": row.key, **vars(layer)} for row in rows for layer in row.layers),
        "series": (
            {"key": row.key, "metric": name, "epoch": epoch, "value": value}
            for row in rows
            for name, values in row.series.items()
            for epoch, value in enumerate(values, 1)
        ),
    }
    # all before the first is written: what is damaged leaves the last export whole
    tables = {name: pa.Table.from_pylist(list(items), schema=TABLES[name]) for name, items in lines.items()}
    tables["memorization"] = _keyed_table(store, "scores", "memorization", ".parquet")
    tables["campaigns"] = pa.Table.from_pylist(list(campaign_lines(store)), schema=TABLES["campaigns"])
    tables |= _influence_tables(store)
    tables["proxies"] = _proxies_table(store)
    tables["exact"] = _exact_table(store)
    stretches = costs.get_stretches(store)
    tables["costs"] = pa.Table.from_pylist(list(costs.cost_lines(stretches)), schema=TABLES["costs"])
    tables["workers"] = pa.Table.from_pylist(list(costs.worker_lines(stretches)), schema=TABLES["workers"])
    tables["examples"] = _keyed_table(store, "scores", "examples", ".examples.parquet")
    for name, table in tables.items():
        results.put_table(store, f"exports/{name}.parquet", table, footer)
    return export_id


def run_line(row: Row) -> dict[str, Any]:
    """A row as one line of the table `runs`."""
    return _spec_columns(row.spec) | {
        "key": row.key,
        "status": "done",
        "data": row.provenance["data"],
        "model": row.provenance["model"],
        "realised_budget": row.measurements.get("realised_budget"),
        "effective_budget": row.measurements.get("effective_budget"),
        "steps_ratio": row.measurements.get("steps_ratio"),
        "seconds": row.provenance["seconds"],
        "localization_seconds": row.provenance.get("localization_seconds"),
        "moved": row.measurements.get("moved"),
        "distance": row.measurements.get("distance"),
        "numerics": row.provenance["numerics"],
        "git_commit": row.provenance["git_commit"],
    }


def failed_line(attempt: Attempt) -> dict[str, Any]:
    """The last failed attempt of a run without a row, as one line of the table `runs`."""
    model = attempt.spec["setting"]["model"]["name"]
    data = attempt.provenance.get("data", "")
    return _spec_columns(attempt.spec) | {"key": attempt.key, "status": attempt.status, "data": data, "model": model}


def _spec_columns(spec: Mapping[str, Any]) -> dict[str, Any]:
    mask, method = spec["mask"] or {}, spec["method"]
    return {
        "forget_set": spec["forget"]["rule"]["name"],
        "forget_draw": spec["forget"]["draw"],
        "method": method["name"],
        "strategy": mask["strategy"]["name"] if mask else None,
        "granularity": mask.get("granularity"),
        "budget": mask.get("budget"),
        "learning_rate": method["options"].get("lr"),
        "seed": spec["seed"],
        "original_seed": spec["original_seed"],
        "options": canonical_json(_added(method) | method["options"] | _mask_options(mask) | _composition(spec)),
        "memorization_key": _memorization_key(spec),
    }


def _added(method: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a method's options that came after a release: a row from before them ran at these."""
    declared = METHODS[method["name"]].options if method["name"] in METHODS else {}
    return {name: option.default for name, option in declared.items() if option.has_mark(Added)}


def _composition(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a composed method, each option by itself as `stage1.lr`, and what its parts go by."""
    options: dict[str, Any] = {}
    for number, stage in enumerate(spec.get("stages", ()), 1):
        method, mask = stage["method"], stage["mask"] or {}
        found = {"": method["name"], **method["options"]}
        if mask:
            found |= {"strategy": mask["strategy"]["name"], "granularity": mask["granularity"]}
            found |= {"budget": mask["budget"], **_mask_options(mask)}
        options |= {f"stage{number}.{name}".removesuffix("."): value for name, value in found.items()}
    if by := spec.get("memorization"):
        options["scores"] = by["proxy"]["name"] if "proxy" in by else CAMPAIGN
    return options


def _memorization_key(spec: Mapping[str, Any]) -> str | None:
    """The key of the scores, or of the stand-in, that a method went by."""
    by = spec.get("memorization")
    if not by:
        return None
    try:
        return key(StandInSpec(**by) if "proxy" in by else ScoresSpec(**by))
    except (InputError, ValidationError):  # of a plugin that is not loaded
        return None


def _mask_options(mask: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a mask beside strategy, granularity and budget, where it differs from the default."""
    if not mask:
        return {}
    plain = {"h": "released", "train_head": True, "freeze_statistics": False}
    options = {f"mask.{name}": mask[name] for name, default in plain.items() if mask.get(name, default) != default}
    for part in ("strategy", "base"):
        given = mask[part] or {"name": "", "options": {}}
        if part == "base" and mask[part]:
            options["base"] = given["name"]
        options |= {f"{part}.{name}": value for name, value in given["options"].items() if not _is_plain(given, name)}
    return options


def _is_plain(strategy: Mapping[str, Any], option: str) -> bool:
    """Whether an option of a strategy says nothing: a batch size, or the default (of a function that is loaded)."""
    declared = STRATEGIES[strategy["name"]].options if strategy["name"] in STRATEGIES else {}
    return option == "batch_size" or (option in declared and strategy["options"][option] == declared[option].default)


def member_lines(sweeps: Iterable[Sweep]) -> Iterator[dict[str, Any]]:
    """The table `members`."""
    for sweep in sweeps:
        for member in sweep.members:
            yield {"sweep": sweep.key, "recipe": sweep.recipe, **vars(member)}


def selection_lines(store: Store, sweeps: Iterable[Sweep], rows: Mapping[str, Row]) -> Iterator[dict[str, Any]]:
    """The table `selections`."""
    for sweep in (sweep for sweep in sweeps if sweep.selections):
        found = [selections.get_selection(store, name) for name in sweep.selections]
        chosen = [selection for selection in found if selection is not None]
        names = [member.key for member in sweep.members if member.role != "tuning"]
        reported = [rows[name] for name in names if name in rows]
        by = {selection.criterion for selection in chosen if selection.criterion in CRITERIA}
        confirmed = {name: selections.confirmed(store, name, sweep.selections, reported) for name in by}
        for selection in chosen:
            after = confirmed.get(selection.criterion, {}).get(selection.key, Judged())
            for place, candidate in enumerate(selection.candidates):
                is_chosen = place == selection.chosen
                yield {
                    "sweep": sweep.key,
                    "selection": selection.key,
                    **_cell_columns(selection),
                    "candidate": place,
                    "options": canonical_json(candidate.options),
                    "chosen": is_chosen,
                    "error": candidate.error,
                    **_judged_columns("", candidate.judged),
                    **(_judged_columns("confirmed_", after) if is_chosen else {}),
                }


def _cell_columns(selection: Selection) -> dict[str, Any]:
    """What the candidates of a cell share."""
    spec = selection.spec
    columns = {name: _spec_columns(spec)[name] for name in ("strategy", "granularity", "budget")}
    return columns | {
        "arm": selection.arm,
        "forget_set": selection.forget_set,
        "setting": canonical_json(_mask_options(spec["mask"] or {}) | _composition(spec)),
        "criterion": selection.criterion,
        "criterion_version": selection.criterion_version,
        "formula": selection.formula,
        "seeds": ", ".join(map(str, selection.seeds)),
        "tuning_set": selection.tuning_set,
        "tuning_draw": selection.draw,
        "used_references": bool(selection.references),
        "num_references": len(selection.references),
    }


def _judged_columns(prefix: str, found: Judged) -> dict[str, Any]:
    names = ("values", "by_reference", "mean", "standard_error")
    return {f"{prefix}n": len(found.values)} | {f"{prefix}{name}": getattr(found, name) for name in names}


class _LazyOutputs:
    """Outputs by run key, read once each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, Outputs] = {}

    def __getitem__(self, key: str) -> Outputs:
        if key not in self._read:
            self._read[key] = results.get_outputs(self._store, key)
        return self._read[key]

    def forget(self, key: str) -> None:
        """Drop what was read: all outputs of a store at once may be more than fits into memory."""
        self._read.pop(key, None)


def metrics_of(store: Store, row: Row, outputs: _LazyOutputs) -> dict[str, Mapping[str, float]]:
    """All metrics of a row: as stored, and from the outputs where a metric is new or of another version.

    What is computed anew is kept beside the row, which is never written again.
    """
    later = results.get_later_metrics(store, row.key) if _lacks(row.metrics, row.metric_versions) else {}
    values: dict[str, Mapping[str, float]] = {}
    for name, metric in METRICS.items():
        known = {row.metric_versions.get(name): row.metrics.get(name)} | later.get(name, {})
        found = known.get(metric.version)
        values[name] = metric({"outputs": outputs[row.key]}, {}) if found is None else found
        if found is None:
            later.setdefault(name, {})[metric.version] = values[name]
            results.put_later_metrics(store, row.key, later)
    return values


def _lacks(metrics: Mapping[str, Any], versions: Mapping[str, str]) -> bool:
    return any(name not in metrics or versions.get(name) != metric.version for name, metric in METRICS.items())


def metric_lines(metrics: Mapping[str, Values]) -> Iterator[dict[str, Any]]:
    """The table `metrics`."""
    for run, values in metrics.items():
        for name, by_split in values.items():
            for split, value in by_split.items():
                yield {"key": run, "metric": name, "split": split, "value": value}


def comparison_lines(
    rows: Iterable[Row], outputs: _LazyOutputs, metrics: Mapping[str, Values]
) -> Iterator[dict[str, Any]]:
    """The table `comparisons`: every run, references too, with each other matching reference, and with all of them."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.comparable_with].append(row)
    for group in _drawn_alike(groups.values(), outputs):
        references = [row.key for row in group if row.is_reference]
        for row in group:
            others = [name for name in references if name != row.key]
            for reference in others:
                yield from _compare(row.key, reference, outputs, metrics)
            if others:
                yield from _compare_with_all(row.key, others, outputs)
            if not row.is_reference:
                outputs.forget(row.key)
        for reference in references:
            outputs.forget(reference)


def _drawn_alike(groups: Iterable[list[Row]], outputs: _LazyOutputs) -> Iterator[list[Row]]:
    """The groups, apart where their forget sets are not one: a rule's new version draws others.

    Rows say which version drew theirs; where one is from before they did, the labels of the examples tell.
    """
    for group in groups:
        if all(results.COMPARABLE in row.provenance for row in group):
            yield group
            continue
        drawn: defaultdict[bytes, list[Row]] = defaultdict(list)
        for row in group:
            forget = outputs[row.key]["forget"]
            drawn[forget.labels.tobytes() + forget.true_labels.tobytes()].append(row)
        yield from drawn.values()


def _compare(
    key: str, reference: str, outputs: _LazyOutputs, metrics: Mapping[str, Values]
) -> Iterator[dict[str, Any]]:
    available = {
        "outputs": outputs[key],
        "reference": outputs[reference],
        "metrics": metrics[key],
        "reference_metrics": metrics[reference],
    }
    for name, comparison in COMPARISONS.items():
        if "references" not in comparison.inputs:
            for split, value in comparison(available, {}).items():
                yield {"key": key, "reference_key": reference, "metric": name, "split": split, "value": value}


def _compare_with_all(key: str, others: Sequence[str], outputs: _LazyOutputs) -> Iterator[dict[str, Any]]:
    available = {"outputs": outputs[key], "references": [outputs[name] for name in others]}
    for name, comparison in COMPARISONS.items():
        if "references" in comparison.inputs:
            for split, value in comparison(available, {}).items():
                yield {"key": key, "reference_key": ALL, "metric": name, "split": split, "value": value}


def campaign_lines(store: Store) -> Iterator[dict[str, Any]]:
    """The table `campaigns`."""
    for name in store.names("scores"):
        if name.endswith(".examples.parquet"):
            continue
        facts = results.get_table(store, f"scores/{name}").schema.metadata or {}
        summary = json.loads(facts[b"summary"])
        setting = facts.get(b"setting")
        line = {column: summary.get(column) for column in TABLES["campaigns"].names if column != "setting"}
        plain = {"setting": setting.decode() if setting else None, "estimator": summary.get("estimator", "correctness")}
        yield line | plain


def _proxies_table(store: Store) -> pa.Table:
    """The table `proxies`: one line per proxy and training example."""
    parts, schema = [], TABLES["proxies"]
    for name in store.names("proxies"):
        table = results.get_table(store, f"proxies/{name}")
        facts = table.schema.metadata or {}
        seconds = json.loads(facts[b"seconds"])
        for proxy in table.column_names:
            count = len(table)
            columns = {
                "proxies_key": [name.removesuffix(".parquet")] * count,
                "setting": [facts[b"setting"].decode()] * count,
                "proxy": [proxy] * count,
                "index": list(range(count)),
                "value": table[proxy].to_pylist(),
                "seconds": [seconds[proxy]] * count,
                "training_seconds": [seconds["training"]] * count,
            }
            parts.append(pa.table(columns).cast(schema))
    return pa.concat_tables(parts) if parts else schema.empty_table()


def _exact_table(store: Store) -> pa.Table:
    """The table `exact`: one line per asked set of examples, estimator and example."""
    parts, schema = [], TABLES["exact"]
    for name in store.names(exact.TABLES_FOLDER):
        table = results.get_table(store, f"{exact.TABLES_FOLDER}/{name}")
        facts = json.loads((table.schema.metadata or {})[b"facts"])
        columns = {"exact_key": name.removesuffix(".parquet"), **facts}
        filled = {column: pa.array([columns[column]] * len(table)) for column in schema.names if column in columns}
        parts.append(pa.table({**filled, **dict(zip(table.column_names, table.columns, strict=True))}))
    return pa.concat_tables([part.select(schema.names).cast(schema) for part in parts] or [schema.empty_table()])


def _influence_tables(store: Store) -> dict[str, pa.Table]:
    """The tables `influence`, `influence_pairs` and `influence_examples`."""
    lines = []
    for name in store.names("influence"):
        facts = results.get_table(store, f"influence/{name}").schema.metadata or {}
        lines += [json.loads(facts[b"summary"])] if b"summary" in facts else []
    return {
        "influence": pa.Table.from_pylist(lines, schema=TABLES["influence"]),
        "influence_pairs": _keyed_table(store, "influence", "influence_pairs", ".parquet"),
        "influence_examples": _keyed_table(store, "influence", "influence_examples", ".examples.parquet"),
    }


def _keyed_table(store: Store, folder: str, table: str, suffix: str) -> pa.Table:
    """The stored tables of a folder, one below another, each under its key."""
    other, parts = ".examples.parquet", []
    for name in store.names(folder):
        if name.endswith(suffix) and (suffix == other or not name.endswith(other)):
            part = results.get_table(store, f"{folder}/{name}")
            keys = pa.array([name.removesuffix(suffix)] * len(part), pa.string())
            parts.append(part.add_column(0, TABLES[table].field(0), keys).cast(TABLES[table]))
    return pa.concat_tables(parts) if parts else TABLES[table].empty_table()
