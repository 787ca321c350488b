"""`unlearn submit`: the same command as a Ray job, its logs streamed and its exit code passed on."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import typer

from jobs.progress import console
from jobs.session import git_commit
from orchestrator.pool import prepare_ray
from orchestrator.registry import InputError

_PROJECT = Path(__file__).parent.parent
_EXCLUDED = [".git", ".venv", "runs", "tests", "analysis/*.png", "*.parquet", "**/__pycache__"]


def run(words: list[str], address: str, submission_id: str | None, *, wait: bool) -> None:
    """Submit the words after -- as a job; the exit code is that of its driver."""
    _check(words)
    prepare_ray(is_client=True)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "jobs", *words]),
            submission_id=submission_id,
            runtime_env=_runtime_env(),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(
            f"the job cannot be submitted to {address!r}: {reason}; the address is that of the dashboard, "
            "and RAY_AUTH_TOKEN or the token file must hold the cluster's token"
        ) from None
    console.print(f"job {job}; stop it with: ray job stop --address {address} {job}", highlight=False)
    if wait:
        raise typer.Exit(_follow(client, job))


def _check(words: list[str]) -> None:
    """Refuse what the job itself would refuse, before it is submitted."""
    if not words:
        raise InputError(
            "nothing to submit; write the command after --: unlearn submit -- sweep digits --storage /shared/runs"
        )
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--storage"]
    given += [word.partition("=")[2] for word in words if word.startswith("--storage=")]
    root = given[-1] if given else os.environ.get("UNLEARN_STORAGE", "./runs")
    needs_root = words[0] not in ("list", "submit") and "--help" not in words
    if needs_root and "://" not in root and not Path(root).is_absolute():
        raise InputError(
            f"storage is {root!r}, and a job's working directory is disposable; "
            "give --storage an absolute path that all nodes share, or s3://bucket/prefix"
        )


def _runtime_env() -> dict[str, Any]:
    """The project's own code as working directory, when it runs from a checkout; else the cluster's installed one."""
    variables = {name: os.environ[name] for name in ("UNLEARN_STORAGE",) if name in os.environ}
    commit = git_commit()
    if commit:
        variables["UNLEARN_GIT_COMMIT"] = commit
    env: dict[str, Any] = {"env_vars": variables}
    if (_PROJECT / "pyproject.toml").is_file():
        env |= {"working_dir": str(_PROJECT), "excludes": _EXCLUDED}
    return env


def _follow(client: Any, job: str) -> int:
    """Print the job's logs as they grow until it ends; its driver's exit code."""
    shown = 0
    while True:
        info = client.get_job_info(job)
        logs = client.get_job_logs(job)
        sys.stdout.write(logs[shown:])
        sys.stdout.flush()
        shown = len(logs)
        if info.status.is_terminal():
            break
        time.sleep(1)
    console.print(f"job {job}: {info.status.value.lower()}", highlight=False)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    return 0 if info.status.value == "SUCCEEDED" else 1
