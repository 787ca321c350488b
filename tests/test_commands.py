"""What commands say and refuse: bad input, failing runs, signals, help; the README's example as shown."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from jobs.cli import app
from jobs.session import Options, make_study
from orchestrator.cluster import ray_cluster
from orchestrator.registry import InputError
from tests.commands import ROOT, command, rows, run


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
    assert "interrupted; what is finished is kept" in errors
    assert campaign_status(store) == "KILLED"
    assert run(*words).returncode == 0
    assert campaign_status(store) == "FINISHED"
    shown = run("status", "--storage", str(store)).stdout
    line = re.search(r"campaign [0-9a-f]{8} \(digits\) +(\d+) +(\d+) ", shown)
    assert line is not None, shown
    assert int(line[1]) + int(line[2]) >= 40
    assert "workers of campaign" in shown


def campaign_status(store: Path) -> str:
    """What MLflow says of the one run that it holds, a campaign's."""
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    (found,) = client.search_runs(["1"])
    assert found.data.tags["unlearn.kind"] == "campaign"
    return str(found.info.status)


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
    "no such target": ["memorize", "digits", "--target-se", "0"],
    "no storage": ["memorize", "digits", "--storage", ""],
    "nothing to read": ["export", "--storage", ""],
    "nobody listens": ["memorize", "digits", "--address", "127.0.0.1:9"],
    "no client server": ["memorize", "digits", "--address", "ray://127.0.0.1:9"],
    "bucket": ["memorize", "digits", "--storage", "gs://bucket/store"],
    "mlflow": ["sweep", "digits", "--tracking-uri", "http://127.0.0.1:9"],
    "mlflow of a campaign": ["memorize", "digits", "--tracking-uri", "http://127.0.0.1:9", "--workers", "1"],
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


def test_the_recipe_that_the_readme_shows_runs_as_shown(tmp_path: Path) -> None:
    blocks = (ROOT / "README.md").read_text().split("```")
    code = next(block for block in blocks if block.startswith("python\n# mine.py"))
    file, store = tmp_path / "mine.py", tmp_path / "store"
    method = "\n\nfrom orchestrator.unlearning import METHODS\n\n\n@METHODS\ndef leave(model):\n    return model\n"
    file.write_text(code.removeprefix("python\n") + method)
    few = ["training.epochs=1", "references=2", "seeds=0", "forget_sets=random", "methods=finetune,leave"]
    words = ["sweep", f"{file}:three_rates", "--storage", str(store), "--tracking-uri", "none", "--workers", "2"]
    done = run(*words, *[word for assignment in few for word in ("--set", assignment)])
    assert done.returncode == 0, done.stdout + done.stderr
    runs = pq.read_table(store / "exports" / "runs.parquet").to_pylist()
    assert sorted(r["learning_rate"] for r in runs if r["method"] == "finetune") == [0.01, 0.03, 0.1]
    assert [r["status"] for r in runs if r["method"] == "leave"] == ["done"]
    assert {r["recipe"] for r in pq.read_table(store / "exports" / "members.parquet").to_pylist()} == {"three_rates"}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere.py:study", "cannot be read"),
        ("ours.py:three_rate", "has no function 'three_rate'; did you mean 'three_rates'"),
        ("ours.py:not_a_study", "returns int; allowed: an orchestrator.study.Study"),
        ("ours.py:needs_more", "needs_more fails: TypeError: needs_more() missing 1 required positional argument"),
    ],
)
def test_a_recipe_file_without_such_a_study_is_refused_in_one_sentence(
    place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("three_rates(): raise ValueError", "not_a_study(): return 1", "needs_more(some): return some")
    Path("ours.py").write_text("\n".join(f"def {name}" for name in names))
    with pytest.raises(InputError, match=re.escape(said)):
        make_study(Options(place, (), str(tmp_path)))


def stopping(store: Path) -> list[str | None]:
    """What the exported campaigns say of how they stopped."""
    assert run("export", "--storage", str(store)).returncode == 0
    found: list[str | None] = pq.read_table(store / "exports" / "campaigns.parquet")["stopping"].to_pylist()
    return found


def test_a_campaign_grows_to_its_target_and_equals_one_asked_for_at_once(tmp_path: Path) -> None:
    words = ["memorize", "digits", "--set", "training.epochs=1", "--workers", "2", "--tracking-uri", "none"]
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    target = ["--target-se", "0.12", "--models", "200"]
    first = run(*words, *target, "--storage", str(grown))
    assert first.returncode == 0, first.stdout + first.stderr
    found = re.search(r"stopped at (\d+) models: mean standard error (0\.\d+) is at most 0\.12", first.stdout)
    assert found is not None, first.stdout
    assert 10 < int(found[1]) < 200
    enough = run(*words, *target, "--storage", str(grown), "--dry-run").stdout
    assert f"{found[1]} subset models in the store; enough: mean standard error" in enough
    assert run(*words, "--models", found[1], "--storage", str(whole)).returncode == 0
    tables = [pq.read_table(next((store / "scores").glob("*[0-9a-f].parquet"))) for store in (grown, whole)]
    assert tables[0].equals(tables[1])
    assert stopping(whole) == [None]
    assert stopping(grown) == [f"mean standard error {found[2]} is at most 0.12"]
    assert run(*words, "--models", found[1], "--storage", str(grown)).returncode == 0
    assert stopping(grown) != [None], "looking again does not undo how the number was chosen"
    here = [
        "--set",
        "training.epochs=1",
        "--set",
        f"campaign.models={found[1]}",
        "--storage",
        str(grown),
        "--workers",
        "1",
    ]
    held = run("proxies", "digits", *here)
    assert held.returncode == 0, held.stdout + held.stderr
    assert "holdout_retraining" in held.stdout
    assert "1 models trained" in held.stdout
    exported = pq.read_table(grown / "exports" / "proxies.parquet")
    assert len(exported) == 6 * 1200
    assert "0 models trained" in run("proxies", "digits", *here).stdout


ONE_RECIPE = """
from orchestrator.recipes import RECIPES
from orchestrator.study import Study

def mine() -> Study:
    return RECIPES["digits"].function().model_copy(update={"recipe": "mine"})

def helper(): return 3
"""


def test_a_file_without_a_function_gives_its_only_recipe_or_names_those_it_has(tmp_path: Path) -> None:
    def study(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return make_study(Options(str(tmp_path / name), (), "")).recipe

    assert study("only_recipe.py", ONE_RECIPE) == "mine"
    assert study("untyped_recipe.py", ONE_RECIPE.replace(" -> Study", "").replace("helper()", "helper(x)")) == "mine"
    with pytest.raises(InputError, match=r"names no function; allowed: .*two\.py:mine or .*two\.py:also, a function"):
        study("two.py", ONE_RECIPE + "\ndef also() -> Study: return mine()\n")
    with pytest.raises(InputError, match="none there looks like a recipe"):
        study("no_recipe.py", "x = 1\n")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    """Not even what a run keeps beside its rows: a folder, a marker, the files that forget sets name."""
    listed, store = tmp_path / "forget.txt", tmp_path / "store"
    listed.write_text("3\n5\n")
    fields = ["forget_sets=file", f"forget_sets.file.path={listed}", "methods=identity"]
    words = ["--dry-run", *[word for field in fields for word in ("--set", field)], "--storage"]
    assert "runs: 0 in the store, 3 to compute" in as_typed("sweep", "digits", *words, str(store))
    assert not store.exists()
    (store / "rows").mkdir(parents=True)
    for name in ("sweep", "references", "memorize", "proxies", "pack"):
        as_typed(name, "digits", *words, str(store))
    assert [path.name for path in store.rglob("*")] == ["rows"]
    with pytest.raises(InputError, match=r"forget\.txt' is no folder; allowed: a folder that you may write to"):
        as_typed("sweep", "digits", *words, str(listed / "store"))


def test_what_a_job_would_not_take_is_refused_before_it_is_sent() -> None:
    away = ["submit", "--address", "http://127.0.0.1:1", "--"]
    with pytest.raises(InputError, match="unknown command 'swep' after --; did you mean 'sweep'"):
        as_typed(*away, "swep", "digits", "--storage", "/shared")
    for words, said in (
        (["sweep", "digits", "--storge", "/shared"], "No such option"),
        (["sweep", "--storage", "/shared"], "Missing argument"),
        (["sweep", "digits", "--storage", "/shared", "--samples", "0"], "Invalid value"),
    ):
        refused = CliRunner().invoke(app, [*away, *words])
        assert (refused.exit_code, said in refused.output) == (2, True), refused.output
    with pytest.raises(InputError, match="cannot be submitted to"):  # nobody is there: this one would have been sent
        as_typed(*away, "sweep", "digits", "--storage", "/shared", "--search", "random", "--samples", "3")


def test_a_ray_that_does_not_start_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray raises where its raylet is stopped for half a minute: no class of its own."""
    folders: list[Path] = []

    def late(**options: object) -> None:
        folders.append(Path(str(options["_temp_dir"])))
        raise Exception("The current node timed out during startup. This could happen\nbecause ...")

    monkeypatch.setattr("ray.init", late)
    said = "^Ray did not start on this machine: The current node timed out during startup. This could happen; it needs"
    with pytest.raises(InputError, match=f"{said}.*fewer --workers, and give the same command again$"), ray_cluster():
        pass
    assert not folders[0].exists()


def as_typed(*words: str) -> str:
    """What a command says, in this process; what it raises is raised."""
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None:
        raise result.exception
    return result.output
