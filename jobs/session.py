"""What every job starts from: a checked study, a data set, a store and a plan, before anything is trained."""

from __future__ import annotations

import gc
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import isfunction, signature
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from pydantic import ValidationError

from jobs.deadline import Deadline
from orchestrator import checks, contact
from orchestrator import plan as planning
from orchestrator.blocks import remove_leftovers
from orchestrator.data import Dataset
from orchestrator.experiment import Context
from orchestrator.heartbeats import Heart
from orchestrator.overrides import checked, override
from orchestrator.plan import Plan
from orchestrator.pool import MAX_TRIES
from orchestrator.recipes import RECIPES
from orchestrator.registry import InputError, Plugin, load_plugin, read_plugin, suggest
from orchestrator.store import Sketch, Store
from orchestrator.study import Study

Compile = Literal["off", "on", "auto"]
"""Whether subset models are compiled; never part of what is computed, but of `numerics`."""

_STUDY = ("Study", "study.Study", "orchestrator.study.Study", str(Study))  # as an annotation, or the text of one
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the driver of a Ray job


@dataclass(frozen=True)
class Options:
    """The common options of the command line."""

    recipe: str
    assignments: Sequence[str]
    storage: str
    tracking_uri: str | None = None
    workers: int | None = None
    gpus_per_worker: float | Literal["auto"] = 0.0
    address: str | None = None
    plugins: Sequence[str] = ()
    dry_run: bool = False
    compile: Compile = "auto"
    deadline: Deadline = field(default_factory=Deadline)
    max_concurrent: int | None = None  # runs of a sweep at once; None: as many as there are workers
    retries: int = MAX_TRIES - 1  # of a run whose worker died


@dataclass(frozen=True)
class Session:
    """A study held against a data set and a store."""

    options: Options
    study: Study
    dataset: Dataset
    store: Store
    plan: Plan
    context: Context
    heart: Heart

    def refreshed(self) -> Session:
        """The same, against what the store holds now."""
        return replace(self, plan=planning.make(self.study, self.dataset, self.store))


def open_store(storage: str, *, patience_seconds: float = Store.patience_seconds, kind: type[Store] = Store) -> Store:
    """The store at a root that can be written and read, and that outlives the command; InputError otherwise."""
    if JOB_VARIABLE in os.environ and "://" not in storage and not Path(storage).is_absolute():
        raise InputError(
            f"storage is {storage!r}, which ends with the working directory of this Ray job; "
            "give --storage an absolute path that all nodes share, or s3://bucket/prefix"
        )
    store = kind(storage, s3_endpoint(), patience_seconds)
    store.probe()
    store.sweep_up()
    return store


def s3_endpoint() -> str | None:
    """The URL of an S3 other than Amazon's, as its own tools read it; it goes to the workers with the store."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def existing_store(storage: str) -> Store:
    """A store that must be there already, for commands that only read: a full disk or one without leave will do."""
    if "://" in storage:
        return open_store(storage)
    if not Path(storage).is_dir():
        raise InputError(f"storage root {storage!r} does not exist; give --storage the folder that a sweep wrote to")
    return Store(storage)


def load_plugins(names: Sequence[str]) -> tuple[Plugin, ...]:
    """Read and load the user's modules here; workers load them before their first task."""
    plugins = tuple(read_plugin(name) for name in names)
    for plugin in plugins:
        load_plugin(plugin)
    return plugins


def make_study(options: Options) -> Study:
    """The recipe's study with the overrides applied; a recipe of the user's own is `file.py:function`."""
    own = _own_recipe(options.recipe)
    study = checked(lambda: _own_study(*own)) if own else checked(RECIPES[options.recipe].function)
    return override(study, options.assignments)


def recipe_modules(options: Options) -> list[str]:
    """The modules that are loaded here and on every worker: that of the recipe, and the plugins."""
    own = _own_recipe(options.recipe)
    return [*options.plugins, *([own[0]] if own and own[0] not in options.plugins else [])]


def _own_recipe(recipe: str) -> tuple[str, str] | None:
    """Module and function of a recipe of the user's own, the function empty where none is named; None for others."""
    place, colon, name = recipe.rpartition(":")
    if colon:
        return place, name
    return (recipe, "") if recipe.endswith(".py") else None


def _own_study(place: str, name: str) -> Study:
    """What a function in a user's module returns, the only recipe there if none is named; InputError for no study."""
    plugin = read_plugin(place)
    load_plugin(plugin)
    found = vars(sys.modules[plugin.module])
    functions = {n: f for n, f in found.items() if isfunction(f) and f.__module__ == plugin.module}
    if not name:
        name = _only_recipe(place, functions)
    if name not in functions:
        raise InputError(f"{place} has no function {name!r}; {suggest(name, functions)}")
    try:
        study = functions[name]()
    except (InputError, ValidationError):
        raise
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"recipe {place}:{name} fails: {type(error).__name__}: {reason}") from error
    if not isinstance(study, Study):
        raise InputError(f"recipe {place}:{name} returns {type(study).__name__}; allowed: an orchestrator.study.Study")
    return study


def _only_recipe(place: str, functions: Mapping[str, Callable[..., Any]]) -> str:
    """The name of the one function that looks like a recipe; InputError, with what there is, for none or several.

    Those look like one that are said to return a Study; where nothing is said, those that need no argument.
    """
    said = [name for name, f in functions.items() if str(getattr(f, "__annotations__", {}).get("return")) in _STUDY]
    bare = [name for name, f in functions.items() if not name.startswith("_") and not signature(f).parameters]
    looking = [name for name in said if name in bare] or bare
    if len(looking) == 1:
        return looking[0]
    listed = " or ".join(f"{place}:{name}" for name in looking)
    found = f"; allowed: {listed}" if listed else ", and none there looks like a recipe; allowed: FILE.py:FUNCTION"
    raise InputError(
        f"recipe {place} names no function{found}, a function without arguments that returns an "
        "orchestrator.study.Study"
    )


def open_session(options: Options, *, is_tracked: bool = False) -> Session:
    """Check everything that can be known before training: plugins, recipe, overrides, data, store and its rows.

    Of a command that asks MLflow in any case, MLflow is imported meanwhile.
    """
    gc.set_threshold(100_000)  # a plan is a million objects that stay: looking for garbage among them takes seconds
    plugins = load_plugins(recipe_modules(options))
    study = make_study(options)
    store = open_store(options.storage, kind=Sketch if options.dry_run else Store)
    dataset = _dataset(study, options.dry_run)
    study = checks.pinned(study, dataset, store)
    context = Context(store, plugins, study.data.label, git_commit(), marker=f"nodes/{secrets.token_hex(8)}")
    if is_tracked and not options.dry_run and contact.tracking_uri(store, options.tracking_uri):
        Thread(target=contact.load, daemon=True).start()
    heart = Heart(store, f"{''.join(sys.argv[1:2])} {options.recipe}")
    plan = planning.make(study, dataset, store)
    if not options.dry_run:
        remove_leftovers(store, plan.present)
    return Session(options, study, dataset, store, plan, context, heart)


def _dataset(study: Study, dry_run: bool) -> Dataset:
    """The study's data; a dry run downloads nothing, and says so where something is missing."""
    source = study.data
    if not dry_run or not source.options.get("download"):
        dataset: Dataset = source.entry({}, source.options)
        return dataset
    try:
        found: Dataset = source.entry({}, {**source.options, "download": False})
    except InputError as error:
        raise InputError(f"a dry run downloads nothing: {error}") from None
    return found


def git_commit() -> str | None:
    """The commit that this code runs from, `-dirty` if it was edited; None where nothing says so."""
    given = os.environ.get("UNLEARN_GIT_COMMIT")  # a Ray job's working directory has no .git: the submitter says it
    if given:
        return given
    folder = Path(__file__).parent
    if (folder / "COMMIT").is_file():  # an image has none either: who built it said it
        return (folder / "COMMIT").read_text().strip() or None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def ray_job() -> str | None:
    """The submission id of the Ray job that this command is; None where it is none."""
    try:
        found: str | None = json.loads(os.environ.get(JOB_VARIABLE, "{}"))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return found


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
