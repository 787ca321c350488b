"""A work order performed where there is no store: whatever else was performed there before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.pack import _order, unpack
from jobs.session import Options, open_session
from orchestrator import offline, results
from orchestrator.experiment import Workspace
from orchestrator.offline import read_order
from orchestrator.registry import InputError
from orchestrator.specs import key
from orchestrator.store import Store

FEW = ["forget_sets=random", "methods=finetune,random_within_tensor", "references=1", "seeds=0", "epochs=1", "lr=0.1"]


def packed(tmp_path: Path, *assignments: str) -> Path:
    session = open_session(Options("digits", [*FEW, "budget=0.3", *assignments], str(tmp_path / "store"), "none"))
    path = tmp_path / f"order-{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps(_order(session)))
    return path


def performed(order: Path, out: Path, scratch: Path) -> dict[str, Any]:
    """All arrays that an order's runs came to, by name."""
    words = [str(order), "--out", str(out), "--scratch", str(scratch), "--device", "cpu"]
    assert offline.main(words) == 0
    found: dict[str, Any] = {}
    for part in out.glob("*.npz"):
        with np.load(part) as file:
            found |= {name: file[name] for name in file.files if name != "json"}
    return found


def test_what_another_order_left_behind_is_not_used(tmp_path: Path) -> None:
    first, second = packed(tmp_path, "training.epochs=1"), packed(tmp_path, "training.epochs=2")
    performed(first, tmp_path / "first", tmp_path / "shared")
    shared = performed(second, tmp_path / "second", tmp_path / "shared")
    alone = performed(second, tmp_path / "alone", tmp_path / "own")
    assert len(shared) > 6
    assert shared.keys() == alone.keys()
    assert all(np.array_equal(shared[name], alone[name]) for name in shared)


def test_runs_done_before_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = packed(tmp_path, "training.epochs=1")
    performed(order, tmp_path / "out", tmp_path / "scratch")
    capsys.readouterr()
    assert performed(order, tmp_path / "lost", tmp_path / "scratch") == {}
    assert "3 runs were done before, their parts written then (remove " in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{}", '{"format": 99}', "[1]"])
def test_what_is_no_order_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    path.write_text(content)
    with pytest.raises(InputError, match="unlearn pack"):
        read_order(path)
    assert offline.main([str(path), "--out", str(tmp_path / "out")]) == 2


def test_a_run_that_fails_is_kept_as_such_and_the_others_go_on(tmp_path: Path) -> None:
    plugin = tmp_path / "fails_offline.py"
    plugin.write_text(
        "from orchestrator.unlearning import METHODS\n"
        "@METHODS\n"
        "def fails_offline(model, *, rate: float = 1.0):\n"
        '    """Always."""\n'
        "    raise FloatingPointError('not finite')\n"
    )
    assignments = [
        "forget_sets=random",
        "references=1",
        "seeds=0",
        "training.epochs=1",
        "methods=fails_offline,identity",
    ]
    session = open_session(Options("digits", assignments, str(tmp_path / "store"), "none", plugins=[str(plugin)]))
    order = tmp_path / "order.json"
    order.write_text(json.dumps(_order(session)))
    out = tmp_path / "out"
    assert offline.main([str(order), "--out", str(out), "--scratch", str(tmp_path / "s"), "--device", "cpu"]) == 1
    store = Store(str(tmp_path / "store"))
    unpack(sorted(out.glob("*.npz")), store.root)
    assert len(results.row_keys(store)) == 2
    unpack(sorted(out.glob("*.npz")), store.root)
    ((attempt,),) = results.get_attempts(store).values()
    assert attempt.error == "FloatingPointError: not finite"


def test_other_labels_are_refused_and_other_pixels_have_keys_of_their_own(tmp_path: Path) -> None:
    order = packed(tmp_path, "training.epochs=1")
    words = [str(order), "--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "s"), "--device", "cpu"]
    assert offline.main([*words, "--data", "label_noise=0.1"]) == 2
    assert offline.main([*words, "--data", "seed=1"]) == 2
    assert not list(tmp_path.glob("out/*"))


def test_a_composed_run_is_the_same_bit_for_bit_where_there_is_no_store(tmp_path: Path) -> None:
    assignments = [
        *("forget_sets=random", "references=1", "seeds=0", "training.epochs=1"),
        *("methods=rum", "methods.rum.scores=confidence,holdout_retraining"),
        *("methods.rum.stages=identity,finetune,random_labels", "methods.rum.stages.2.epochs=1"),
        *("methods.rum.stages.3.strategy=gradient", "methods.rum.stages.3.granularity=param"),
        *("methods.rum.stages.3.budget=0.5", "methods.rum.stages.3.epochs=1"),
    ]
    here = open_session(Options("digits", assignments, str(tmp_path / "here"), "none"))
    with pytest.raises(InputError, match="method rum needs memorization scores that the store has not"):
        _order(here)
    workspace = Workspace(here.dataset, here.context)
    for task in (*here.plan.rankings(), *here.plan.originals(), *here.plan.references(), *here.plan.runs()):
        assert workspace.perform(task).error is None
    there = open_session(Options("digits", assignments, str(tmp_path / "there"), "none"))
    for task in there.plan.rankings():
        for name in task.objects:
            there.store.put(name, here.store.get(name))
    order = tmp_path / "order.json"
    order.write_text(json.dumps(_order(there)))
    performed(order, tmp_path / "out", tmp_path / "scratch")
    unpack(sorted((tmp_path / "out").glob("*.npz")), there.store.root)
    keys = results.row_keys(here.store)
    assert keys == results.row_keys(there.store)
    assert len(keys) == 3
    for name in keys:
        content = f"outputs/{name}.safetensors"
        assert here.store.get(content) == there.store.get(content)
        assert results.get_row(here.store, name).metrics == results.get_row(there.store, name).metrics
    counts = {results.get_row(here.store, key(task.spec)).measurements["steps"] for task in here.plan.runs()}
    # an epoch each: on 1080 retained and the 40 still to come, and on 1080 with the last 40 under random labels
    assert counts == {1120 // 128 + 1120 // 128}
    by_scores = [results.get_outputs(here.store, key(task.spec))["retain"].logits for task in here.plan.runs()]
    assert not np.array_equal(*by_scores), "another ranking, other parts"


def test_damaged_parts_are_refused_before_anything_is_stored(tmp_path: Path) -> None:
    order = packed(tmp_path, "training.epochs=1")
    performed(order, tmp_path / "out", tmp_path / "scratch")
    (part,) = (tmp_path / "out").glob("*.npz")
    whole = part.read_bytes()
    with np.load(part) as file:
        arrays = {name: file[name] for name in file.files}
    lost = next(name for name in arrays if name.endswith("/forget/logits"))
    damaged = {"cut": whole[:3000], "flipped": bytes(b ^ 255 for b in whole[2000:2040]), "text": b"hello", "empty": b""}
    damaged["flipped"] = whole[:2000] + damaged["flipped"] + whole[2040:]
    for name, content in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.savez(tmp_path / "lost.npz", **{name: array for name, array in arrays.items() if name != lost})
    facts = json.loads(arrays["json"].tobytes())
    for name, change in {
        "unknown": lambda: facts["runs"][0]["spec"]["method"].update(name="nothing"),
        "version": lambda: facts.update(format=0),
        "bare": lambda: facts.pop("format"),
    }.items():
        change()
        np.savez(tmp_path / f"{name}.npz", **{**arrays, "json": np.frombuffer(json.dumps(facts).encode(), np.uint8)})
    store = tmp_path / "other"
    for path in sorted(tmp_path.glob("*.npz")):
        with pytest.raises(InputError, match=path.name):
            unpack([path], str(store))
        assert not (store / "outputs").exists()
    assert len(list(tmp_path.glob("*.npz"))) == 8
