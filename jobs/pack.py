"""`unlearn pack` and `unlearn unpack`: runs performed elsewhere by `python -m orchestrator.offline`, and back."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.progress import console
from jobs.session import Options, Session, existing_store, open_session, open_store
from orchestrator import export, results
from orchestrator.data import SplitOutputs
from orchestrator.experiment import forget_indices, make_row, memorization_scores
from orchestrator.offline import FORMAT
from orchestrator.pipeline import Finished, Layer
from orchestrator.plan import Plan
from orchestrator.registry import InputError, Plugin, load_plugin
from orchestrator.specs import RunSpec, key
from orchestrator.store import Store
from orchestrator.study import Study


def run(options: Options, out: Path) -> None:
    """Write what is missing of a study as a work order: references first, then the runs."""
    session = open_session(options)
    order = _order(session)
    if options.dry_run:
        console.print(f"{len(order['runs'])} runs to pack", highlight=False)
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(order), encoding="utf-8")
    except OSError as error:
        raise InputError(f"the order cannot be written to {str(out)!r}: {error.strerror}; give --out a file") from None
    console.print(f"{out}: {len(order['runs'])} runs; on the other machine, from this checkout:", highlight=False)
    console.print(
        f"  python -m orchestrator.offline {out} --out parts   # then: unlearn unpack parts/*.npz --storage ..."
    )


def _order(session: Session) -> dict[str, Any]:
    plan, fingerprint = session.plan, session.dataset.fingerprint
    missing = {key(task.spec) for task in plan.missing([*plan.references(), *plan.runs()])}
    named = [("reference", spec) for spec in session.study.reference_runs(fingerprint)]
    named += session.study.runs(fingerprint)
    chosen = {key(spec): (arm, spec) for arm, spec in named if key(spec) in missing}
    forget_sets: dict[str, list[int]] = {}
    for _, spec in chosen.values():
        if key(spec.forget) not in forget_sets:
            forget_sets[key(spec.forget)] = _indices(session, spec)
    study = session.study
    return {
        "format": FORMAT,
        "recipe": study.recipe,
        "study": study.model_dump(mode="json"),
        "data": {"name": study.data.name, "options": dict(study.data.options)},
        "fingerprint": fingerprint,
        "plugins": [asdict(plugin) for plugin in session.context.plugins],
        "git_commit": session.context.git_commit,
        "forget_sets": forget_sets,
        "runs": [_packed(name, arm, spec) for name, (arm, spec) in chosen.items()],
    }


def _indices(session: Session, spec: RunSpec) -> list[int]:
    scores = None
    if spec.forget.scores is not None:
        if not session.store.exists(f"scores/{key(spec.forget.scores)}.parquet"):
            raise InputError(
                f"forget set {spec.forget.rule.name} needs memorization scores that the store has not; "
                f"run `unlearn memorize {session.study.recipe}` with the same options first"
            )
        scores = memorization_scores(session.store, spec.forget.scores)
    indices: list[int] = forget_indices(session.dataset, spec.forget, scores, session.store).tolist()
    return indices


def _packed(name: str, arm: str, spec: RunSpec) -> dict[str, Any]:
    localizations = []
    if spec.localization is not None:
        parts = [part for part in (spec.localization.base_spec, spec.localization) if part is not None]
        fields = {"strategy", "seed", "granularity"}
        localizations = [part.model_dump(mode="json", include=fields) for part in parts]
    return {
        "id": name,
        "arm": arm,
        "spec": spec.model_dump(mode="json"),
        "forget": key(spec.forget),
        "localizations": localizations,
    }


def unpack(parts: Sequence[Path], storage: str) -> None:
    """Put runs performed elsewhere into a store, each under its own key, with their sweep; then export."""
    store = open_store(storage)
    read = [(path, *_read(path)) for path in parts]
    added = 0
    for path, facts, arrays in read:
        for plugin in facts["plugins"]:
            load_plugin(Plugin(**plugin))
        study = Study(**facts["study"])
        for run in facts["runs"]:
            added += _put(store, study, facts, run, arrays, path)
        now = time.time()
        sweep = Plan(study, facts["fingerprint"], frozenset()).sweep(
            {"command": "unlearn unpack", "host": facts["host"], "created_at": now}
        )
        if results.get_sweep(store, sweep.key) is None:
            results.put_sweep(store, sweep)
    total = sum(len(facts["runs"]) for _, facts, _ in read)
    export.export(existing_store(storage))
    console.print(f"{added} of {total} runs were new to {store.root}; exports are written", highlight=False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    import zipfile

    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts: dict[str, Any] = json.loads(arrays.pop("json").tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}; give files that orchestrator.offline wrote") from None
    if facts.get("format") != FORMAT:
        raise InputError(f"{path} is of another version of this code ({facts.get('format')}); here it is {FORMAT}")
    return facts, arrays


def _put(
    store: Store,
    study: Study,
    facts: Mapping[str, Any],
    run: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    path: Path,
) -> bool:
    plain = run["spec"]
    spec = RunSpec(**{**plain, "setting": {**plain["setting"], "data": facts["fingerprint"]}})
    name = key(spec)
    if facts["fingerprint"] == plain["setting"]["data"] and name != run["id"]:
        raise InputError(f"{path}: run {run['id'][:8]} is {name[:8]} by this code: it was packed by another version")
    if name in results.row_keys(store):
        return False
    outputs = dict(_outputs(run["id"], arrays))
    results.put_outputs(store, name, outputs)
    finished = Finished(
        None, outputs, run["series"], run["measurements"], tuple(Layer(**x) for x in run["layers"]), run["seconds"]
    )
    provenance = {
        "data": study.data.label,
        "model": spec.setting.model.label,
        **{field: run[field] for field in ("seconds", "localization_seconds", "finished_at")},
        **{field: facts[field] for field in ("host", "numerics", "git_commit")},
    }
    results.put_row(store, make_row(name, spec, finished, provenance))
    return True


def _outputs(name: str, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, SplitOutputs]]:
    for split in sorted({part.split("/")[1] for part in arrays if part.startswith(f"{name}/")}):
        logits, labels, true_labels = (arrays[f"{name}/{split}/{kind}"] for kind in ("logits", "labels", "true_labels"))
        yield split, SplitOutputs(logits, labels.astype(np.int64), true_labels.astype(np.int64))
