"""The commands as a user runs them: processes of their own, a real Ray, a real MLflow; killed, resumed, refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.commands import ROOT, command, contents, rows, run

SMALL = ["campaign.models=20", "training.epochs=4", "references=2", "seeds=0,1", "epochs=1"]
SMALL += ["forget_sets=random,most_memorized", "methods=identity,del,finetune,random_within_tensor", "budget=0.1,0.3"]
OPTIONS = [word for assignment in SMALL for word in ("--set", assignment)]
NUM_RUNS = 2 * 2 * (1 + 4 + 2 + 4) + 2 * 2  # forget sets x seeds x settings, and the references


def kill_when(words: list[str], ready: Path, pattern: str, count: int) -> None:
    """Start a command and kill -9 its driver as soon as `count` files match."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while len(list(ready.glob(pattern))) < count:
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a small sweep that nothing disturbed."""
    store = tmp_path_factory.mktemp("whole") / "store"
    done = run("sweep", "digits", *OPTIONS, "--storage", str(store), "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return store


def test_a_sweep_stores_tracks_and_exports_every_run(finished: Path) -> None:
    from mlflow import MlflowClient

    assert len(rows(finished)) == NUM_RUNS
    runs = pq.read_table(finished / "exports" / "runs.parquet").to_pylist()
    assert len(runs) == NUM_RUNS
    assert {run["status"] for run in runs} == {"done"}
    members = pq.read_table(finished / "exports" / "members.parquet").to_pylist()
    assert {member["key"] for member in members} == {run["key"] for run in runs}
    client = MlflowClient(tracking_uri=f"sqlite:///{finished}/mlflow.db")
    tracked = client.search_runs(["1"], max_results=1000)
    keys = [run.data.tags["unlearn.key"] for run in tracked if run.data.tags["unlearn.kind"] == "run"]
    assert sorted(keys) == sorted(rows(finished))
    assert {run.info.status for run in tracked} == {"FINISHED"}
    by_key = {run["key"]: run for run in runs}
    reset = [run for run in runs if run["budget"] is not None]
    assert reset
    for line in reset:
        assert line["realised_budget"] == int(line["budget"] * 14458) / 14458
        assert line["effective_budget"] >= line["realised_budget"]
    identity = [run for run in runs if run["method"] == "identity"]
    compared = pq.read_table(finished / "exports" / "comparisons.parquet").to_pylist()
    for line in compared:
        if line["metric"] == "probability_distance":
            assert line["reference_key"] == "all"
            continue
        assert by_key[line["reference_key"]]["method"] == "retrain"
    assert len({line["reference_key"] for line in compared if line["key"] == identity[0]["key"]} - {"all"}) == 2


def test_a_complete_sweep_trains_nothing_and_starts_no_ray(finished: Path) -> None:
    before = contents(finished, "rows", ".json")
    again = run(
        "sweep", "digits", *OPTIONS, "--storage", str(finished), environment={"RAY_ADDRESS": "127.0.0.1:1"}
    )  # any use of Ray would fail at that address
    assert again.returncode == 0, again.stderr
    assert "0 models trained" in again.stdout
    assert contents(finished, "rows", ".json") == before


def test_a_killed_sweep_goes_on_and_ends_with_the_same_rows_and_scores(finished: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    words = ["sweep", "digits", *OPTIONS, "--storage", str(store), "--workers", "2"]
    kill_when(command(*words), store, "campaigns/*/blocks/*.safetensors", 1)  # in memorize
    models = contents(store, "campaigns", ".safetensors")  # a block, and single models of the next
    blocks = {name: content for name, content in models.items() if "/blocks/" in name}
    finished_models = 10 * len(blocks) + len(models) - len(blocks)
    assert not (store / "scores").exists()
    left = run("sweep", "digits", *OPTIONS, "--storage", str(store), "--dry-run").stdout
    found = re.search(r"subset models: (\d+) in the store, (\d+) to compute", left)
    assert found is not None, left
    assert int(found[1]) >= finished_models, "a worker may have finished what it was at"
    assert int(found[1]) + int(found[2]) == 20
    kill_when(command(*words), store, "rows/*.json", 12)  # in the sweep: there are four references
    stamps = {path: path.stat().st_mtime_ns for path in (store / "rows").glob("*.json")}
    assert 12 <= len(stamps) < NUM_RUNS
    done = run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = contents(store, "campaigns", ".safetensors")
    assert blocks.items() <= whole.items(), "a block was trained twice"
    assert not any("/parts/" in name for name in whole), "models that are in a block are kept twice"
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "a run was computed twice"
    assert rows(store) == rows(finished)
    assert contents(store, "outputs", ".safetensors") == contents(finished, "outputs", ".safetensors")
    tables = [pq.read_table(next((root / "scores").glob("*[0-9a-f].parquet"))) for root in (store, finished)]
    assert tables[0].equals(tables[1])


def test_a_row_cut_in_half_is_named_and_nothing_else_is_lost(finished: Path, tmp_path: Path) -> None:
    import shutil

    store = tmp_path / "copy"
    shutil.copytree(finished, store)
    victim = sorted((store / "rows").glob("*.json"))[3]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    refused = run("sweep", "digits", *OPTIONS, "--storage", str(store), "--tracking-uri", "none")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert victim.name in refused.stderr
    victim.unlink()
    mended = run("sweep", "digits", *OPTIONS, "--storage", str(store), "--tracking-uri", "none")
    assert mended.returncode == 0, mended.stderr
    assert "1 models trained" in mended.stdout
    assert rows(store) == rows(finished)


def test_damaged_outputs_are_named_and_the_last_export_stays_whole(finished: Path, tmp_path: Path) -> None:
    import shutil

    store = tmp_path / "copy"
    shutil.copytree(finished, store)
    victim = sorted((store / "outputs").glob("*.safetensors"))[2]
    exports = contents(store, "exports", ".parquet")
    victim.write_bytes(victim.read_bytes()[:50])
    refused = run("export", "--storage", str(store))
    assert refused.returncode == 2, refused.stderr
    assert f"rows/{victim.stem}.json" in refused.stderr
    assert contents(store, "exports", ".parquet") == exports
    fewer = rows(store)
    for name in set(fewer) - {victim.stem}:  # work is left to do: nothing is trained before the damage is named
        (store / "rows" / f"{name}.json").unlink()
        break
    before = len(rows(store))
    refused = run("sweep", "digits", *OPTIONS, "--storage", str(store), "--tracking-uri", "none")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"rows/{victim.stem}.json" in refused.stderr
    assert len(rows(store)) == before
    runs = rows(finished)  # references among them, whose models nothing reads
    model = next(path for path in (store / "models").glob("*.safetensors") if path.stem not in runs)
    whole = model.read_bytes()
    model.write_bytes(whole[:-9])
    (store / "rows" / f"{victim.stem}.json").unlink()  # as the message says
    refused = run("sweep", "digits", *OPTIONS, "--storage", str(store), "--tracking-uri", "none")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"models/{model.name} is damaged" in refused.stderr
    model.write_bytes(whole)
    mended = run("sweep", "digits", *OPTIONS, "--storage", str(store), "--tracking-uri", "none")
    assert mended.returncode == 0, mended.stderr
    assert rows(store) == rows(finished)
    assert run("export", "--storage", str(store)).returncode == 0


def test_a_dry_run_says_what_is_missing_and_trains_nothing(finished: Path, tmp_path: Path) -> None:
    empty = run("sweep", "digits", *OPTIONS, "--storage", str(tmp_path / "store"), "--dry-run")
    assert empty.returncode == 0
    assert f"runs: 0 in the store, {NUM_RUNS - 4} to compute" in empty.stdout
    assert f"models to train: {20 + 2 + NUM_RUNS}" in empty.stdout
    full = run("sweep", "digits", *OPTIONS, "--storage", str(finished), "--dry-run")
    assert "models to train: 0" in full.stdout


NOT_THERE = "boto3 jinja2 matplotlib mlflow PIL polars pydantic ray rich safetensors torchvision typer"


def test_runs_performed_where_only_torch_and_numpy_are_come_back_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    import shutil

    store, far = tmp_path / "copy", tmp_path / "far"
    shutil.copytree(finished, store)
    gone = sorted((store / "rows").glob("*.json"))[::6]  # of both forget sets and all methods, references among them
    for path in gone:
        path.unlink()
        (store / "outputs" / f"{path.stem}.safetensors").unlink()
    order = tmp_path / "order.json"
    packed = run("pack", "digits", *OPTIONS, "--storage", str(store), "--out", str(order))
    assert f"{len(gone)} runs" in packed.stdout, packed.stderr
    far.mkdir()
    (far / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {NOT_THERE.split()!r}:\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    words = [sys.executable, "-m", "orchestrator.offline", str(order), "--out", "parts", "--device", "cpu"]
    told = {**os.environ, "PYTHONPATH": f"{far}{os.pathsep}{ROOT}"}

    def perform(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, *more], cwd=far, env=told, capture_output=True, text=True, timeout=200)

    some = perform("--seconds", "0")
    assert (some.returncode, f"{len(gone) - 1} runs are left" in some.stdout) == (3, True), some.stderr
    rest = perform()
    assert (rest.returncode, "all runs are done" in rest.stdout) == (0, True), rest.stderr
    parts = sorted(str(path) for path in (far / "parts").glob("*.npz"))
    assert len(parts) == 2
    unpacked = run("unpack", *parts, "--storage", str(store))
    assert f"{len(gone)} of {len(gone)} runs were new" in unpacked.stdout, unpacked.stderr
    assert rows(store) == rows(finished)
    assert contents(store, "outputs", ".safetensors") == contents(finished, "outputs", ".safetensors")
    assert "0 models trained" in run("sweep", "digits", *OPTIONS, "--storage", str(store)).stdout
    assert f"0 of {len(gone)} runs were new" in run("unpack", *parts, "--storage", str(store)).stdout
    cut = far / "parts" / "cut.npz"
    cut.write_bytes(Path(parts[0]).read_bytes()[:999])
    refused = run("unpack", str(cut), "--storage", str(store))
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)


def test_explain_names_the_fields_that_differ(finished: Path) -> None:
    runs = pq.read_table(finished / "exports" / "runs.parquet").to_pylist()
    arm = [r for r in runs if r["method"] == "finetune" and r["forget_set"] == "random" and r["seed"] == 0]
    explained = run("explain", arm[0]["key"], arm[1]["key"], "--storage", str(finished))
    assert explained.stdout.strip() in ("method.options.lr: 0.03 and 0.1", "method.options.lr: 0.1 and 0.03")
