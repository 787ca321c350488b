"""`unlearn pack` and `unlearn unpack`: runs performed elsewhere by `python -m orchestrator.offline`, and back."""

from __future__ import annotations

import io
import json
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.progress import console
from jobs.session import Options, Session, existing_store, open_session, open_store
from orchestrator import export, results
from orchestrator.data import SplitOutputs
from orchestrator.experiment import forget_indices, memorization_scores
from orchestrator.offline import FORMAT, ORDER_FORMAT, labels_digest, load_plugins
from orchestrator.overrides import checked
from orchestrator.pipeline import Finished, Layer
from orchestrator.plan import Plan
from orchestrator.registry import InputError
from orchestrator.rows import make_row
from orchestrator.specs import RunSpec, ScoresSpec, StandInSpec, key
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.tasks import scores_object


def run(options: Options, out: Path) -> None:
    """Write what is missing of a study as a work order: references first, then the runs."""
    session = open_session(options)
    if session.plan.tuning is not None:
        raise InputError("pack cannot choose settings; --set tuning=none packs them all, `unlearn sweep` tunes")
    order = _order(session)
    if options.dry_run or not order["runs"]:
        console.print(f"{len(order['runs']) or 'no'} runs are missing in {session.store.root}", highlight=False)
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
    if session.study.searched():
        raise InputError("Optuna chooses runs by what came of others, so none can be packed; use --search random")
    plan, fingerprint = session.plan, session.dataset.fingerprint
    missing = {key(task.spec) for task in plan.missing([*plan.references(), *plan.runs()])}
    named = [("reference", spec) for spec in session.study.reference_runs(fingerprint)]
    named += session.study.runs(fingerprint)
    chosen = {key(spec): (arm, spec) for arm, spec in named if key(spec) in missing}
    forget_sets: dict[str, list[int]] = {}
    memorization: dict[str, list[float]] = {}
    for _, spec in chosen.values():
        if key(spec.forget) not in forget_sets:
            forget_sets[key(spec.forget)] = _indices(session, spec)
        name = _values_key(spec)
        if spec.memorization is not None and name not in memorization:
            values = _scores(session, spec.memorization, f"method {spec.method.name}")
            memorization[str(name)] = values[forget_sets[key(spec.forget)]].tolist()
    study = session.study
    return {
        "format": ORDER_FORMAT,
        "recipe": study.recipe,
        "study": study.model_dump(mode="json"),
        "data": {"name": study.data.name, "options": dict(study.data.options)},
        "fingerprint": fingerprint,
        "plugins": [asdict(plugin) for plugin in session.context.plugins],
        "git_commit": session.context.git_commit,
        "labels": labels_digest(session.dataset),
        "forget_sets": forget_sets,
        "memorization": memorization,
        "runs": [_packed(name, arm, spec) for name, (arm, spec) in chosen.items()],
    }


def _indices(session: Session, spec: RunSpec) -> list[int]:
    scores = None
    if spec.forget.scores is not None:
        scores = _scores(session, spec.forget.scores, f"forget set {spec.forget.rule.name}")
    indices: list[int] = forget_indices(session.dataset, spec.forget, scores, session.store).tolist()
    return indices


def _scores(session: Session, spec: ScoresSpec | StandInSpec, who: str) -> np.ndarray:
    if not session.store.exists(scores_object(spec)):
        command = "memorize" if isinstance(spec, ScoresSpec) else "references"
        raise InputError(
            f"{who} needs memorization scores that the store has not; "
            f"run `unlearn {command} {session.options.recipe}` with the same options first"
        )
    return memorization_scores(session.store, spec)


def _values_key(spec: RunSpec) -> str | None:
    return None if spec.memorization is None else f"{key(spec.forget)} {key(spec.memorization)}"


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
        "memorization": _values_key(spec),
        "localizations": localizations,
    }


def unpack(parts: Sequence[Path], storage: str) -> None:
    """Put runs performed elsewhere into a store, each under its own key, with their sweep; then export."""
    store = open_store(storage)
    read = [(path, *_read(path)) for path in parts]
    added = 0
    for path, facts, arrays in read:
        study = _study(facts, path)
        checked_runs = [_spec(facts, run, path) for run in facts["runs"]]
        outputs = [_outputs(run["id"], arrays, path) for run in facts["runs"]]
        for run, spec, found in zip(facts["runs"], checked_runs, outputs, strict=True):
            added += _put(store, study, facts, run, spec, found)
        for run in facts["failed"]:
            _put_failed(store, facts, run, _spec(facts, run, path))
        now = time.time()
        sweep = Plan(study, facts["fingerprint"], frozenset()).sweep(
            {"command": "unlearn unpack", "host": facts["host"], "created_at": now}
        )
        if results.get_sweep(store, sweep.key) is None:
            results.put_sweep(store, sweep)
    total = sum(len(facts["runs"]) for _, facts, _ in read)
    failed = sum(len(facts["failed"]) for _, facts, _ in read)
    export.export(existing_store(storage))
    more = f"; {failed} failed there, `unlearn status` shows them" if failed else ""
    console.print(f"{added} of {total} runs were new to {store.root}; exports are written{more}", highlight=False)


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
_FACTS = {"study", "plugins", "fingerprint", "numerics", "host", "git_commit", "runs", "failed"}
_RUN = {"id", "arm", "spec", "series", "measurements", "layers", "seconds", "localization_seconds", "finished_at"}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts: dict[str, Any] = json.loads(arrays.pop("json").tobytes())
        known = facts.get("format")
    except _UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged, or no part"
        raise InputError(f"{path} cannot be read ({reason}); give part-*.npz that orchestrator.offline wrote") from None
    if known != FORMAT:
        raise InputError(f"{path} is of another version of this code ({known}); here it is {FORMAT}")
    if not set(facts) >= _FACTS or not all(set(run) >= _RUN for run in facts["runs"]):
        raise InputError(f"{path} is not whole: facts are missing; have its runs performed again")
    return facts, arrays


def _study(facts: Mapping[str, Any], path: Path) -> Study:
    load_plugins(facts["plugins"])
    try:
        return checked(lambda: Study(**facts["study"]))
    except InputError as error:
        raise InputError(f"{path} is of a study that this code does not know: {error}") from None


def _spec(facts: Mapping[str, Any], run: Mapping[str, Any], path: Path) -> RunSpec:
    """What a run is by this code, on the data that it was performed on."""
    plain = run["spec"]
    try:
        spec = checked(lambda: RunSpec(**{**plain, "setting": {**plain["setting"], "data": facts["fingerprint"]}}))
    except InputError as error:
        raise InputError(f"{path}: run {run['id'][:8]} is none that this code knows: {error}") from None
    if facts["fingerprint"] == plain["setting"]["data"] and key(spec) != run["id"]:
        raise InputError(f"{path}: run {run['id'][:8]} is {key(spec)[:8]} by this code: another version packed it")
    return spec


def _put(
    store: Store,
    study: Study,
    facts: Mapping[str, Any],
    run: Mapping[str, Any],
    spec: RunSpec,
    outputs: Mapping[str, SplitOutputs],
) -> bool:
    name = key(spec)
    if store.exists(f"rows/{name}.json"):
        return False
    layers = tuple(Layer(**layer) for layer in run["layers"])
    finished = Finished(None, outputs, run["series"], run["measurements"], layers, run["seconds"])
    provenance = {
        "data": study.data.label,
        "model": spec.setting.model.label,
        **{field: run[field] for field in ("seconds", "localization_seconds", "finished_at")},
        **{field: facts[field] for field in ("host", "numerics", "git_commit")},
    }
    results.put_outputs(store, name, outputs)
    results.put_row(store, make_row(name, spec, finished, provenance))
    return True


def _put_failed(store: Store, facts: Mapping[str, Any], run: Mapping[str, Any], spec: RunSpec) -> None:
    provenance = {"host": facts["host"], "time": run["time"], "kind": "run", "traceback": run["traceback"]}
    attempt = results.Attempt(key(spec), spec.model_dump(mode="json"), "failed", run["error"], provenance)
    known = results.get_attempts(store).get(key(spec), [])
    if all(other.provenance.get("time") != run["time"] for other in known):
        results.put_attempt(store, attempt)


def _outputs(name: str, arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, SplitOutputs]:
    found = {}
    for split in sorted({part.split("/")[1] for part in arrays if part.startswith(f"{name}/")}):
        try:
            logits, *labels = (arrays[f"{name}/{split}/{kind}"] for kind in ("logits", "labels", "true_labels"))
            found[split] = SplitOutputs(logits, *(part.astype(np.int64) for part in labels))
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: the outputs of run {name[:8]} are not whole ({error})") from None
    if not {"forget", "retain", "test"} <= set(found):
        raise InputError(f"{path}: the outputs of run {name[:8]} are not there")
    return found
