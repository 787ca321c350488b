"""The commands as a user runs them, for the tests that do: processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "jobs", *words]


def run(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    usual = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return subprocess.run(
        command(*words),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**usual, **(environment or {})},
    )


def here(job: Callable[..., object], *arguments: object) -> str:
    """What a job says, performed in this process, which has imported everything."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        job(*arguments)
    return said.getvalue()


def rows(store: Path) -> dict[str, dict[str, object]]:
    """Rows by key, without provenance."""
    found = {}
    for path in (store / "rows").glob("*.json"):
        body = json.loads(path.read_text())["body"]
        del body["provenance"]
        found[path.stem] = body
    return found


def contents(store: Path, folder: str, ending: str) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in (store / folder).rglob(f"*{ending}")}
