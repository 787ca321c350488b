"""The commands as a user runs them: processes of their own, a real Ray, a real MLflow; killed, resumed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["campaign.models=20", "training.epochs=4", "references=2", "seeds=0,1", "epochs=1"]
SMALL += ["forget_sets=random,most_memorized", "methods=identity,del,finetune,random_within_tensor", "budget=0.1,0.3"]
OPTIONS = [word for assignment in SMALL for word in ("--set", assignment)]
NUM_RUNS = 2 * 2 * (1 + 4 + 2 + 4) + 2 * 2  # forget sets x seeds x settings, and the references


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "jobs", *words]


def run(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **(environment or {})},
    )


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
    assert f"subset models: {finished_models} in the store, {20 - finished_models} to compute" in left
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


def test_a_termination_signal_exits_130_and_the_next_command_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "store"
    words = ["memorize", "digits", "--set", "campaign.models=40", "--set", "training.epochs=3", "--storage", str(store)]
    process = subprocess.Popen(command(*words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not list(store.glob("campaigns/*/blocks/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert run(*words).returncode == 0


def test_a_run_that_fails_leaves_an_attempt_and_exit_code_1_and_is_tried_again(tmp_path: Path) -> None:
    plugin, switch = tmp_path / "mine.py", tmp_path / "works"
    plugin.write_text(
        "from pathlib import Path\n"
        "from orchestrator.training import clone\n"
        "from orchestrator.unlearning import METHODS\n"
        "@METHODS\n"
        "def moody(model):\n"
        '    """Fails until a file is there."""\n'
        f"    if not Path({str(switch)!r}).exists():\n"
        '        raise RuntimeError("not in the mood")\n'
        "    return clone(model)\n"
    )
    store = tmp_path / "store"
    few = ["training.epochs=1", "references=2", "seeds=0", "forget_sets=random", "methods=identity,moody"]
    words = [
        "sweep",
        "digits",
        "--plugin",
        str(plugin),
        "--storage",
        str(store),
        "--workers",
        "2",
        "--tracking-uri",
        "none",
    ]
    words += [word for assignment in few for word in ("--set", assignment)]
    first = run(*words)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "not in the mood" in first.stdout
    assert "Traceback" not in first.stdout + first.stderr
    assert len(rows(store)) == 3
    statuses = [line["status"] for line in pq.read_table(store / "exports" / "runs.parquet").to_pylist()]
    assert sorted(statuses) == ["done"] * 3 + ["failed"]
    assert "not in the mood" in run("status", "--storage", str(store)).stdout
    switch.touch()
    second = run(*words)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "1 models trained" in second.stdout
    assert len(rows(store)) == 4


def test_what_kills_its_workers_or_lacks_its_mask_is_a_failure_and_the_others_go_on(tmp_path: Path) -> None:
    plugin, store = tmp_path / "mine.py", tmp_path / "store"
    plugin.write_text(
        "import os\n"
        "from orchestrator.unlearning import METHODS\n"
        "@METHODS\n"
        "def deadly(model):\n"
        '    """Ends its process."""\n'
        "    os._exit(1)\n"
        "from orchestrator.localization import STRATEGIES\n"
        "@STRATEGIES\n"
        "def broken(model):\n"
        '    """Scores nothing."""\n'
        "    raise KeyError('no score')\n"
    )
    few = ["training.epochs=1", "references=2", "seeds=0", "forget_sets=random", "methods=deadly,identity,del"]
    few += ["methods.del.strategy=broken", "methods.del.budget=0.1,0.3", "methods.del.lr=0.1"]
    words = ["sweep", "digits", "--plugin", str(plugin), "--storage", str(store), "--workers", "2"]
    words += [word for assignment in few for word in ("--set", assignment)]
    ended = run(*words, "--tracking-uri", "none")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "3 workers died on it" in " ".join(ended.stdout.split())
    assert "failed localization" in ended.stdout
    assert "(broken on random): KeyError: 'no score'" in ended.stdout
    assert "2 runs are not started: what they need has failed" in ended.stdout
    assert "2 failed; the first: KeyError" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert len(rows(store)) == 3
    statuses = [line["status"] for line in pq.read_table(store / "exports" / "runs.parquet").to_pylist()]
    assert sorted(statuses) == ["done"] * 3 + ["failed"]


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


BAD = {
    "recipe": ["sweep", "digit"],
    "field": ["sweep", "digits", "--set", "traning.epochs=3"],
    "method": ["sweep", "digits", "--set", "methods=dell"],
    "value": ["sweep", "digits", "--set", "training.epochs=many"],
    "budget": ["sweep", "digits", "--set", "budget=0.1,1.5"],
    "no budget": ["sweep", "digits", "--set", "budget=0"],
    "data file": ["sweep", "cifar10_small", "--set", "data.train=/nowhere.parquet"],
    "forget set": ["references", "digits", "--set", "data.label_noise=0"],
    "plugin": ["sweep", "digits", "--plugin", "/nowhere.py"],
    "storage": ["memorize", "digits", "--storage", "/dev/null/store"],
    "too deep": ["sweep", "digits", "--set", "methods=eu_k", "--set", "k=2,99"],
    "no storage": ["memorize", "digits", "--storage", ""],
    "nothing to read": ["export", "--storage", ""],
    "nobody listens": ["memorize", "digits", "--address", "127.0.0.1:9"],
    "no client server": ["memorize", "digits", "--address", "ray://127.0.0.1:9"],
    "bucket": ["memorize", "digits", "--storage", "gs://bucket/store"],
    "mlflow": ["sweep", "digits", "--tracking-uri", "http://127.0.0.1:9"],
    "cluster": ["memorize", "digits", "--address", "http://127.0.0.1:9"],
    "batch": ["memorize", "digits", "--set", "training.batch_size=5000"],
    "catalogue": ["list", "methodes"],
    "submission": ["submit", "--", "sweep", "digits", "--storage", "relative"],
}


@pytest.mark.parametrize("words", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_and_exit_code_2_before_any_training(words: list[str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    extra = [] if "--storage" in words or words[0] in ("list", "submit") else ["--storage", str(store)]
    refused = run(*words, *extra)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.startswith("unlearn: ")
    assert "Traceback" not in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (store / "campaigns").exists()
    assert not (store / "models").exists()


def test_a_corrupt_data_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    words = ["--set", f"data.train={broken}", "--set", f"data.test={broken}", "--storage", str(tmp_path / "store")]
    refused = run("memorize", "cifar10_small", *words)
    assert refused.returncode == 2
    assert "not a readable Parquet file" in refused.stderr


def test_a_relative_root_is_refused_inside_a_ray_job() -> None:
    refused = run("memorize", "digits", environment={"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"})
    assert refused.returncode == 2
    assert "absolute path" in refused.stderr


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


def test_help_is_there_for_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from jobs.cli import app; from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help']); print(result.output)\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pyarrow', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text()
    for name in (
        "demo",
        "memorize",
        "references",
        "sweep",
        "status",
        "track",
        "export",
        "report",
        "list",
        "submit",
        "pack",
        "unpack",
    ):
        assert name in done.stdout
        assert f"unlearn {name}" in readme
        assert run(name, "--help").returncode == 0


def test_the_catalogue_lists_what_is_registered() -> None:
    listed = run("list")
    assert listed.returncode == 0
    for name in ("digits", "cifar10_small", "reset_and_finetune", "weighted_gradient", "most_memorized", "tug_of_war"):
        assert name in listed.stdout


def test_explain_names_the_fields_that_differ(finished: Path) -> None:
    runs = pq.read_table(finished / "exports" / "runs.parquet").to_pylist()
    arm = [r for r in runs if r["method"] == "finetune" and r["forget_set"] == "random" and r["seed"] == 0]
    explained = run("explain", arm[0]["key"], arm[1]["key"], "--storage", str(finished))
    assert explained.stdout.strip() in ("method.options.lr: 0.03 and 0.1", "method.options.lr: 0.1 and 0.03")


def test_the_method_that_the_readme_shows_runs_as_shown(tmp_path: Path) -> None:
    blocks = (ROOT / "README.md").read_text().split("```")
    code = next(block for block in blocks if block.startswith("python\n# shrink.py"))
    plugin, store = tmp_path / "shrink.py", tmp_path / "store"
    plugin.write_text(code.removeprefix("python\n"))
    few = ["training.epochs=1", "references=2", "seeds=0", "forget_sets=random", "methods=shrink"]
    few += [
        "methods.shrink.strategy=weighted_gradient",
        "methods.shrink.budget=0.1,0.3",
        "methods.shrink.factor=0.5,0.8",
    ]
    words = ["sweep", "digits", "--plugin", str(plugin), "--storage", str(store), "--tracking-uri", "none"]
    done = run(*words, *[word for assignment in few for word in ("--set", assignment)])
    assert done.returncode == 0, done.stdout + done.stderr
    runs = pq.read_table(store / "exports" / "runs.parquet").to_pylist()
    assert sorted(r["options"] for r in runs if r["method"] == "shrink") == sorted(
        f'{{"batch_size":64,"epochs":5,"factor":{factor},"lr":0.03}}' for factor in (0.5, 0.5, 0.8, 0.8)
    )
    assert all(r["steps_ratio"] > 0 for r in runs if r["method"] == "shrink")
