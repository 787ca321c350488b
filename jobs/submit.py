"""`unlearn submit`: the same command as a Ray job, its logs streamed and its exit code passed on."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from jobs import parcel
from jobs.parcel import EXCLUDED, PROJECT
from jobs.progress import console
from jobs.session import Options, git_commit, load_plugins, make_study, recipe_modules
from orchestrator import selections
from orchestrator.cluster import prepare_ray
from orchestrator.registry import InputError

_PATIENCE_SECONDS = 300.0  # with a dashboard that does not answer while a job is followed
_LEAST_SECRET = 8  # characters from which on an environment variable's value is looked for in a command
_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|ACCESS_KEY|API_KEY", re.I)
_IN_URL = re.compile(r"\w://\S*:\S+@|[?&][\w-]*(password|passwd|token|secret|key)=", re.I)
_STOPPED = 130  # as of any command that was interrupted
_ID = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)  # part of an address and of a file's name, where Ray checks nothing


def run(words: list[str], address: str, submission_id: str | None, *, wait: bool) -> None:
    """Submit the words after -- as a job; the exit code is that of its driver.

    With an id that a job has already, that job is followed, if its command is the same.
    """
    _check(words)
    if submission_id is not None and not _ID.fullmatch(submission_id):
        raise InputError(
            f"--submission-id is {submission_id!r}; allowed: letters, digits, - and _, and dots but as the first"
        )
    prepare_ray(is_client=True)  # before Ray is imported, for whatever
    packed = parcel.pack(words, _project_files())
    entrypoint = shlex.join(["python", "-m", "jobs", *packed.words])
    client = _client(address)
    job = submission_id if submission_id and _is_there(client, submission_id, entrypoint) else None
    if job is None:
        job = _submit(client, address, packed, entrypoint, submission_id)
        mode = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""  # Ray's own default is none
        console.print(f"job {job}; stop it with: {mode}ray job stop --address {address} {job}", highlight=False)
    else:
        console.print(f"job {job} is there already: following it", highlight=False)
    if wait:
        try:
            code = follow(client, job)
        except KeyboardInterrupt:
            console.print(f"job {job} goes on; follow it again with --submission-id {job} and the same command")
            raise
        raise typer.Exit(code)


def check_study(recipe: str | None, assignments: Sequence[str], plugins: Sequence[str]) -> None:
    """Refuse a recipe, an override or a plugin that the job would refuse, as far as it can be known on this machine.

    What needs a module or a file that only the nodes may have is left to the job.
    """
    options = Options(recipe or "", assignments, "", plugins=plugins)
    modules = recipe_modules(options)
    if not all(name.endswith(".py") or _is_here(name) for name in modules):
        return
    try:
        load_plugins(modules)
        if recipe and (study := make_study(options)).tuning is not None:
            selections.check(study)
    except InputError as error:
        if not isinstance(error.__cause__, ImportError | OSError):
            raise


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _check(words: Sequence[str]) -> None:
    """Refuse what the job itself would refuse, and what must not stand in a command, before anything is sent."""
    if not words:
        raise InputError(
            "nothing to submit; write the command after --: unlearn submit -- sweep digits --storage /shared/runs"
        )
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--storage"]
    given += [word.partition("=")[2] for word in words if word.startswith("--storage=")]
    root = given[-1] if given else os.environ.get("UNLEARN_STORAGE", "./runs")
    _check_secrets([*words, root])
    needs_root = words[0] not in ("list", "submit") and "--help" not in words
    if needs_root and "://" not in root and not Path(root).is_absolute():
        raise InputError(
            f"storage is {root!r}, and a job's working directory is disposable; "
            "give --storage an absolute path that all nodes share, or s3://bucket/prefix"
        )


def _check_secrets(words: Sequence[str]) -> None:
    """Refuse a command that holds a secret: it would be shown to all who can see the dashboard."""
    remedy = "set it in the environment of the nodes, as clusters/ does from Kubernetes secrets"
    if any(_IN_URL.search(word) for word in words):
        raise InputError(
            "the command holds a password inside a URL, which the dashboard would show; for MLflow it is "
            f"MLFLOW_TRACKING_PASSWORD (and _USERNAME), for S3 AWS_SECRET_ACCESS_KEY: {remedy}"
        )
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _LEAST_SECRET and any(value in word for word in words):
            raise InputError(f"the command holds the value of {name}, which the dashboard would show; {remedy}")


def _project_files() -> list[Path]:
    """The project's files as Ray would take them for a working directory; none where this is no checkout."""
    if not (PROJECT / "pyproject.toml").is_file():
        return []
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    found: list[Path] = []
    keeps_ignored = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") == "1"
    _dir_travel(PROJECT, [_get_excludes(PROJECT, EXCLUDED)], found.append, include_gitignore=not keeps_ignored)
    return [path for path in found if path.is_file()]


def _client(address: str) -> Any:
    """A client of the cluster's Jobs API; InputError where it cannot be talked to."""
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        raise InputError(_refusal(address, error)) from None


def _refusal(address: str, error: Exception) -> str:
    reason = str(error).strip().split("\n", 1)[0]
    return (
        f"the job cannot be submitted to {address!r}: {reason}; the address is that of the dashboard, and "
        f"RAY_AUTH_TOKEN or the token file must hold the cluster's token (see `unlearn doctor --address {address}`)"
    )


def _is_there(client: Any, job: str, entrypoint: str) -> bool:
    """Whether a job of that name is there, with that command; InputError if it is another command's."""
    try:
        found = client.get_job_info(job)
    except RuntimeError as error:
        if "404" in str(error):
            return False
        raise
    if found.entrypoint != entrypoint:
        raise InputError(
            f"submission id {job!r} belongs to another command, {found.entrypoint!r}; a name runs once: "
            "choose another, or give that command to follow it"
        )
    return True


def _submit(client: Any, address: str, packed: parcel.Parcel, entrypoint: str, submission_id: str | None) -> str:
    """Send files and command; the job's id."""
    from ray.exceptions import RayError

    variables = {name: os.environ[name] for name in ("UNLEARN_STORAGE",) if name in os.environ}
    if commit := git_commit():
        variables["UNLEARN_GIT_COMMIT"] = commit
    environment: dict[str, Any] = {"env_vars": variables}
    with tempfile.TemporaryDirectory(prefix="submit-") as folder:
        if packed.files:
            archive = Path(folder, "project.zip")
            packed.write(archive)
            environment["working_dir"] = str(archive)
        try:
            job = client.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env=environment)
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            if submission_id and "already exists" in str(error) and _is_there(client, submission_id, entrypoint):
                return submission_id  # another call of the same command came first
            raise InputError(_refusal(address, error)) from None
    return str(job)


def follow(client: Any, job: str) -> int:
    """Print the job's logs as they grow until it ends; its driver's exit code."""
    shown, heard = 0, time.monotonic()
    while True:
        try:
            info, logs = client.get_job_info(job), client.get_job_logs(job)
        except (RuntimeError, OSError) as error:  # of the line, or of a dashboard that starts anew
            if time.monotonic() - heard > _PATIENCE_SECONDS:
                raise InputError(
                    f"the dashboard has not answered for {_PATIENCE_SECONDS:g} s: {str(error).splitlines()[0]}; job "
                    f"{job} may go on: follow it again with --submission-id {job} and the same command"
                ) from None
            time.sleep(5)
            continue
        heard = time.monotonic()
        sys.stdout.write(logs[shown:])
        sys.stdout.flush()
        shown = len(logs)
        if info.status.is_terminal():
            break
        time.sleep(1 + shown / 2**20)  # logs come whole each time
    console.print(f"job {job}: {info.status.value.lower()}", highlight=False)
    if info.status.value == "SUCCEEDED":
        return 0
    if info.status.value == "STOPPED":
        return _STOPPED
    if info.driver_exit_code is None:  # it never began
        console.print(str(info.message), highlight=False, markup=False)
    return int(info.driver_exit_code or 1)
