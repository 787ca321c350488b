"""A dry run of every embedded recipe: it counts what golden keys count, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import sweep
from jobs.session import Options
from orchestrator.recipes import RECIPES
from tests import golden

EMBEDDED = [name for name in RECIPES if RECIPES[name].function().data.name == "digits"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_dry_run_counts_all_runs_of_an_empty_store_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.run(Options(name, [], str(tmp_path / "store"), dry_run=True))
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    pinned = json.loads(Path(golden.FILE).read_text(encoding="utf-8"))[name]["runs"]["count"]
    counts = {
        wave: int(said.split(" in the store, ")[1].split()[0])
        for wave, said in lines.items()
        if " in the store, " in said
    }
    assert counts["runs"] > 0
    if not any(wave.startswith("tuning") for wave in counts):
        assert counts["runs"] == pinned
    assert int(lines["models to train"]) == sum(n for wave, n in counts.items() if not wave.endswith("localizations"))
    assert not (tmp_path / "store").exists()
