"""MLflow's runs, as a sweep and a campaign both write them: found by tags, their driver, data set and files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import logged

if TYPE_CHECKING:
    from mlflow import MlflowClient

DRIVER_TAG = "unlearn.driver"  # of a run that is being written: by whom


def search(client: MlflowClient, experiment_id: str, filter_string: str) -> list[Any]:
    """All runs that match."""
    token, found = None, list[Any]()
    while True:
        page = client.search_runs([experiment_id], filter_string, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def driver_of(run: Any) -> str | None:
    """The process that writes a run, empty where it is not known; None for one that is over."""
    return run.data.tags.get(DRIVER_TAG, "") if run.info.status == "RUNNING" else None


def release(client: MlflowClient, run: str) -> None:
    """Take its driver's mark off a run; another command may have done so."""
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):
        client.delete_tag(run, DRIVER_TAG)


def add_dataset(client: MlflowClient, run: str, name: str, fingerprint: str, source: str) -> None:
    """Make a data set an input of a run; its digest is the start of its fingerprint."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = fingerprint[: logged.DIGEST]
    dataset = Dataset(logged.cut(name, 500), digest, "code", logged.cut(source, 10_000))
    client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def attach(client: MlflowClient, run: str, files: Mapping[str, bytes]) -> None:
    """Put files at a run, by name; one of that name that is there is replaced."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            inside = str(Path(name).parent)
            client.log_artifact(run, str(path), None if inside == "." else inside)
