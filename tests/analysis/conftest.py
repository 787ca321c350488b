"""The made export, built once and written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.load import Tables, load
from tests.analysis import made


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the whole made export; not to be changed."""
    return made.sweep().write(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def read(folder: Path) -> Tables:
    return load(folder)
