"""The first contact with MLflow: where it is, our experiment there, and in one sentence what is in the way."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestrator.outbox import RefusedError
from orchestrator.registry import InputError
from orchestrator.store import StorageError, Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "unlearn"

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # the defaults keep a caller for minutes when the server is gone
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a run may be made although the answer was lost: we look before we repeat
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines and another request for each row
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
_NO_CONNECTION = re.compile(  # at the end of what urllib3 and requests wrap around it
    r"(?:Max retries exceeded|Connection aborted|HTTPConnectionPool).*?"
    r"(?:\[Errno -?\d+\] (?P<system>[\w ]+)|(?P<slow>timed out|closed connection without response))",
    re.DOTALL,
)
_USER, _PASSWORD, _TOKEN = (f"MLFLOW_TRACKING_{name}" for name in ("USERNAME", "PASSWORD", "TOKEN"))


def tracking_uri(store: Store, given: str | None) -> str | None:
    """Where to track: what is given, else MLFLOW_TRACKING_URI, else SQLite beside a local store; None for nowhere."""
    if given == "none":
        return None
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    return f"sqlite:///{store.path('mlflow.db')}" if store.is_local else None


def load() -> None:
    """Import MLflow, which takes seconds: in a thread, beside other work."""
    import mlflow.tracking  # noqa: F401


def redacted(text: str) -> str:
    """A text without the passwords of the addresses in it, nor those of the environment."""
    plain = re.sub(r"(?<=//)[^\s'\"]*@", "***@", text)  # up to the last @: a password may hold one, and a slash
    plain = re.sub(r"(?i)([?&][\w-]*(?:password|passwd|token|secret|key)=)[^&\s'\"]*", r"\1***", plain)
    for name in (_PASSWORD, _TOKEN):
        if secret := os.environ.get(name):
            plain = plain.replace(secret, "***")
    return plain


def open_experiment(uri: str, store: Store) -> tuple[MlflowClient, str]:
    """A client, and the id of our experiment there, made where it is missing."""
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is said once, by who catches it
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    artifacts = None  # a server knows its own place; MLflow's own for SQLite is the working directory
    if uri.startswith("sqlite:///"):
        beside = Path(store.root) if store.is_local else Path(uri.removeprefix("sqlite:///")).absolute().parent
        artifacts = (beside / "mlflow-artifacts").as_uri()
        _make_database(Path(uri.removeprefix("sqlite:///")))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # another command may make it at the same time
            client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise InputError(
            f"the MLflow experiment {EXPERIMENT!r} at {redacted(uri)} is deleted; restore it, or use another server"
        )
    return client, experiment.experiment_id


def _make_database(path: Path) -> None:
    """Make a SQLite database, where there is none, as one whole: MLflow's own making fails two commands at once."""
    from mlflow import MlflowClient

    if path.exists() or not path.parent.is_dir():
        return
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(6)}")
    try:
        MlflowClient(tracking_uri=f"sqlite:///{fresh}").search_experiments(max_results=1)
        with contextlib.suppress(OSError):  # there is one by now, or the file system has no links: MLflow makes it then
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def attempted() -> Iterator[None]:
    """Raise RefusedError where MLflow answers that it will not have this, RuntimeError for what may pass."""
    try:
        yield
    except Exception as error:
        status = _status(error) or 500
        kind = RefusedError if 400 <= status < 500 and status not in (408, 429) else RuntimeError
        raise kind(reason(error)) from None


def _status(error: Exception) -> int:
    """The HTTP status that an error of MLflow stands for; 0 for any other error."""
    from mlflow.exceptions import MlflowException

    return int(error.get_http_status_code()) if isinstance(error, MlflowException) else 0  # type: ignore[no-untyped-call]


def reason(error: Exception) -> str:
    """What an error says, in a few words and without passwords; of a connection, only why there is none."""
    text = str(error).strip() or type(error).__name__
    if found := _NO_CONNECTION.search(text):
        return (found["system"] or found["slow"]).lower()
    return redacted(text.split("\n", 1)[0])[:300]


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Say in one sentence, with a remedy, why MLflow cannot be had at the URI."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except Exception as error:  # mlflow raises whatever its store raises (sqlalchemy, requests, its own)
        raise InputError(_sentence(uri, error)) from None


def _sentence(uri: str, error: Exception) -> str:
    said, place = reason(error), repr(redacted(uri))
    status = _status(error)
    address, user = urlsplit(uri), os.environ.get(_USER)
    if "://" in uri and address.scheme.partition("+")[0] not in _SCHEMES:
        return f"--tracking-uri is {place}; allowed: {', '.join(_SCHEMES)} addresses, or none"
    if status == 403 and "Host header" in str(error):
        host = (address.hostname or "").strip("[]")
        return (
            f"MLflow at {place} refuses requests for the host {host!r} (403, Invalid Host header); start "
            f"`mlflow server` with --allowed-hosts '{host},{address.netloc.rpartition('@')[2]}', or use its IP address"
        )
    if status == 401:
        got = f"refuses the password of {user!r}" if user else "asks for a user and a password"
        return (
            f"MLflow at {place} {got} (401); set {_USER} and {_PASSWORD} (or {_TOKEN}) in the environment, "
            "never on a command line"
        )
    if status == 403:
        return (
            f"MLflow at {place} does not let {user or 'you'!r} write (403): {said}; have the permission EDIT for the "
            f"experiment {EXPERIMENT!r} given to that user"
        )
    if "out-of-date database schema" in str(error):
        return f"the MLflow database at {place} is of another version; run `mlflow db upgrade` on it, after a backup"
    if isinstance(error, ModuleNotFoundError):
        return f"MLflow at {place} needs a driver that is not installed ({said}); pip install it, or use a server"
    if status == 404:
        return f"something answers at {place}, but not as MLflow does (404): {said}; check the address"
    if 400 <= status < 500:
        return f"MLflow at {place} refuses what we ask of it ({status}): {said}; its version may be too old"
    remedy = "start `mlflow server` there" if address.scheme.startswith("http") else "check the address"
    return (
        f"MLflow does not answer at {place} ({said}); {remedy}, or give --tracking-uri none, and `unlearn track` later"
    )
