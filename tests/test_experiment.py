"""What a worker holds is not changed by what it runs: rows are the same whatever ran before them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator import campaigns, export, results
from orchestrator import plan as planning
from orchestrator.arrays import pack, unpack
from orchestrator.blocks import get_block, parts_of
from orchestrator.costs import Outcome
from orchestrator.data import DATASETS, Dataset, Examples, Outputs
from orchestrator.experiment import Context, Workspace, memorization_scores
from orchestrator.localization import STRATEGIES
from orchestrator.metrics import METRICS
from orchestrator.models import MODELS
from orchestrator.pipeline import BrokenWorkerError, Lab
from orchestrator.plan import Plan
from orchestrator.recipes import RECIPES
from orchestrator.registry import InputError
from orchestrator.specs import (
    CampaignSpec,
    ForgetSet,
    ForgetSpec,
    MaskSpec,
    Method,
    Model,
    ProxiesSpec,
    Proxy,
    RunSpec,
    ScoresSpec,
    Setting,
    StandInSpec,
    Strategy,
    TrainingSpec,
    key,
)
from orchestrator.store import Store
from orchestrator.tasks import Task, scores_object
from orchestrator.training import clone
from orchestrator.unlearning import METHODS


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Two hundred digits to train on."""
    whole: Dataset = DATASETS["digits"]({}, DATASETS["digits"].resolve({}))
    return replace(whole, splits={**whole.splits, "train": whole.splits["train"][:200]})


@pytest.fixture
def registered() -> Iterator[Callable[[Callable[..., object]], str]]:
    """Registers a method or a strategy for one test."""
    added = []

    def register(function: Callable[..., object]) -> str:
        registry = METHODS if function.__name__.startswith("method") else STRATEGIES
        registry(function)  # type: ignore[arg-type]
        added.append((registry, function.__name__))
        return function.__name__

    yield register
    for registry, name in added:
        del registry._entries[name]


def run_of(dataset: Dataset, method: str, mask: MaskSpec | None = None) -> RunSpec:
    options = {"epochs": 1, "batch_size": 32} if method in ("finetune", "reset_and_finetune") else {}
    training = TrainingSpec(learning_rate=0.1, epochs=1, batch_size=32)
    return RunSpec(
        setting=Setting(
            data=dataset.fingerprint, model=Model(name="small_cnn", options={"width": 4}), training=training
        ),
        forget=ForgetSpec(rule=ForgetSet(name="random")),
        method=Method(name=method, options=options),
        original_seed=0,
        mask=mask,
        seed=0,
    )


def performed(dataset: Dataset, folder: Path, *runs: RunSpec) -> tuple[list[Outcome], Store]:
    """The outcomes of runs that one worker performs one after another, and its store."""
    store = Store(str(folder))
    workspace = Workspace(dataset, Context(store))
    assert runs[0].original is not None
    assert workspace.perform(Task("original", runs[0].original)).error is None
    outcomes = []
    for run in runs:
        if run.localization is not None:
            outcomes.append(workspace.perform(Task("localization", run.localization)))
        outcomes.append(workspace.perform(Task("run", run)))
    return outcomes, store


def metrics_of(store: Store, run: RunSpec) -> object:
    row = results.get_row(store, key(run))
    return row.metrics, row.measurements


def test_a_method_that_changes_its_model_in_place_changes_no_other_run(
    dataset: Dataset, registered: Callable[..., str], tmp_path: Path
) -> None:
    def method_in_place(model: nn.Module) -> nn.Module:
        """Zeroes what it is given."""
        for parameter in model.parameters():
            parameter.data.zero_()
        return model

    rude, polite = run_of(dataset, registered(method_in_place)), run_of(dataset, "finetune")
    outcomes, store = performed(dataset, tmp_path / "both", rude, polite)
    _, alone = performed(dataset, tmp_path / "alone", polite)
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert metrics_of(store, polite) == metrics_of(alone, polite)
    moved = results.get_row(store, key(rude)).measurements
    assert moved["moved"] > 0, "what moved is counted against the original as it was"


def test_a_broken_device_asks_for_another_process_and_a_full_one_does_not(
    dataset: Dataset, registered: Callable[..., str], tmp_path: Path
) -> None:
    def method_on_a_broken_device(model: nn.Module) -> nn.Module:
        """Fails as CUDA does."""
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def method_out_of_memory(model: nn.Module) -> nn.Module:
        """Fails as CUDA does when it is full."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(BrokenWorkerError, match="illegal memory access"):
        performed(dataset, tmp_path / "broken", run_of(dataset, registered(method_on_a_broken_device)))
    outcomes, _ = performed(dataset, tmp_path / "full", run_of(dataset, registered(method_out_of_memory)))
    assert "out of memory" in str(outcomes[0].error)


@pytest.mark.parametrize("how", ["plain", "data", "numpy", "images", "and fails"])
def test_a_method_that_changes_its_examples_in_place_fails_and_changes_no_other_run(
    how: str, dataset: Dataset, registered: Callable[..., str], tmp_path: Path
) -> None:
    def method_relabelling(model: nn.Module, forget: Examples, retain: Examples) -> nn.Module:
        """Relabels in place."""
        if how in ("plain", "and fails"):
            retain.labels.fill_(3)
        elif how == "data":
            retain.labels.data.fill_(3)
        elif how == "numpy":
            retain.labels.numpy()[:] = retain.labels.numpy()[::-1].copy()
        else:
            retain.images.numpy()[0] = 255 - retain.images.numpy()[0]
        if how == "and fails":
            raise RuntimeError("boom")
        return clone(model)

    rude, polite = run_of(dataset, registered(method_relabelling)), run_of(dataset, "finetune")
    outcomes, store = performed(dataset, tmp_path / "both", rude, polite)
    _, alone = performed(dataset, tmp_path / "alone", polite)
    assert "method method_relabelling changed the examples that it was given" in str(outcomes[0].error)
    assert outcomes[1].error is None
    assert metrics_of(store, polite) == metrics_of(alone, polite)


def test_what_a_method_sets_in_torch_ends_with_it(
    dataset: Dataset, registered: Callable[..., str], tmp_path: Path
) -> None:
    def method_setting(model: nn.Module) -> nn.Module:
        """Leaves torch otherwise than it found it."""
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(3)
        torch.manual_seed(7)
        return model

    rude, polite = run_of(dataset, registered(method_setting)), run_of(dataset, "finetune")
    last = rude.model_copy(update={"seed": 1})
    outcomes, store = performed(dataset, tmp_path / "both", rude, polite, last)
    left = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    _, alone = performed(dataset, tmp_path / "alone", polite)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert metrics_of(store, polite) == metrics_of(alone, polite)
    assert left == (True, torch.float32, 1)


def test_a_strategy_that_changes_its_model_in_place_changes_no_run(
    dataset: Dataset, registered: Callable[..., str], tmp_path: Path
) -> None:
    def strategy_in_place(model: nn.Module) -> dict[str, torch.Tensor]:
        """Magnitudes, and then nothing is left of them."""
        scores = {name: parameter.detach().abs().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data.zero_()
        return scores

    masks = [
        MaskSpec(strategy=Strategy(name=name), granularity="channel", budget=0.3)
        for name in (registered(strategy_in_place), "weight_magnitude")
    ]
    rude, polite = (run_of(dataset, "reset_and_finetune", mask) for mask in masks)
    outcomes, store = performed(dataset, tmp_path / "both", rude, polite)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    first, second = (results.get_row(store, key(run)) for run in (rude, polite))
    assert first.metrics == second.metrics, "the same scores, so the same mask and run"


def test_what_a_plugin_set_in_torch_when_it_was_loaded_changes_no_run(dataset: Dataset, tmp_path: Path) -> None:
    polite = run_of(dataset, "finetune")
    _, alone = performed(dataset, tmp_path / "alone", polite)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        outcomes, store = performed(dataset, tmp_path / "after", polite)
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
    assert outcomes[0].error is None
    assert metrics_of(store, polite) == metrics_of(alone, polite)


@pytest.mark.parametrize(
    ("returned", "said"),
    [(None, "TypeError: method method_odd returned NoneType, not the unlearned model"), ("exit", "SystemExit: 3")],
)
def test_a_method_that_gives_no_model_is_a_failed_run_that_says_so(
    returned: str | None, said: str, dataset: Dataset, registered: Callable[..., str], tmp_path: Path
) -> None:
    def method_odd(model: nn.Module) -> nn.Module:
        """Returns what is no model, or ends."""
        if returned == "exit":
            raise SystemExit(3)
        return returned  # type: ignore[return-value]

    outcomes, _ = performed(dataset, tmp_path, run_of(dataset, registered(method_odd)))
    assert outcomes[0].error == said
    assert outcomes[0].label == "method_odd on random, seed 0"


def test_a_task_is_named_by_what_tells_it_from_others_of_its_sweep(dataset: Dataset) -> None:
    plain, named = run_of(dataset, "finetune"), Strategy(name="weighted_gradient")
    masked = plain.model_copy(update={"mask": MaskSpec(strategy=named, granularity="channel", budget=0.3)})
    assert Task("run", plain).label == "finetune(epochs=1, batch_size=32) on random, seed 0"
    assert Task("run", masked).label == "finetune(epochs=1, batch_size=32) by weighted_gradient 0.3 on random, seed 0"


def test_originals_references_and_unlearning_train_on_augmented_images(dataset: Dataset, tmp_path: Path) -> None:
    plain = run_of(dataset, "finetune")
    setting = plain.setting.model_copy(
        update={"training": plain.setting.training.model_copy(update={"augment": "crop_flip"})}
    )
    shifted = plain.model_copy(update={"setting": setting})
    assert key(shifted) != key(plain)
    _, store = performed(dataset, tmp_path / "plain", plain)
    _, other = performed(dataset, tmp_path / "augmented", shifted)
    assert plain.original is not None
    assert shifted.original is not None
    before = unpack(store, Task("original", plain.original).object_name)
    after = unpack(other, Task("original", shifted.original).object_name)
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert metrics_of(store, plain) != metrics_of(other, shifted)


def test_localizations_are_shared_by_seeds_unless_they_draw(dataset: Dataset) -> None:
    def keys(strategy: str) -> set[str]:
        mask = MaskSpec(strategy=Strategy(name=strategy), granularity="channel", budget=0.3)
        runs = [run_of(dataset, "reset_and_finetune", mask).model_copy(update={"seed": seed}) for seed in range(3)]
        return {key(run.localization) for run in runs if run.localization is not None}

    assert [len(keys(name)) for name in ("weighted_gradient", "critmem", "random")] == [1, 1, 3]


def test_a_metric_that_came_later_is_computed_once(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(dataset, "finetune")
    _, store = performed(dataset, tmp_path, run)
    calls = []

    def accuracy(outputs: Outputs) -> dict[str, float]:
        calls.append(set(outputs))
        return {"forget": 0.25}

    entry = METRICS["accuracy"]
    monkeypatch.setitem(METRICS._entries, "accuracy", replace(entry, function=accuracy, version="later"))
    tables = []
    for _ in range(2):
        export.export(store)
        table = results.get_table(store, "exports/metrics.parquet").to_pylist()
        tables.append([line["value"] for line in table if line["metric"] == "accuracy"])
    assert tables == [[0.25], [0.25]]
    assert len(calls) == 1
    assert results.get_row(store, key(run)).metric_versions["accuracy"] == entry.version, "rows are never written again"


def test_a_forget_set_by_a_proxy_is_the_top_of_its_stored_values(dataset: Dataset, tmp_path: Path) -> None:
    original = run_of(dataset, "finetune").original
    assert original is not None
    stand_in = StandInSpec(original=original, proxy=Proxy(name="confidence"))
    store = Store(str(tmp_path))
    workspace = Workspace(dataset, Context(store))
    task = Task("proxies", ProxiesSpec(original=original, proxies=(stand_in.proxy,)))
    assert workspace.perform(task).error is None
    values = results.get_table(store, scores_object(stand_in)).column("confidence").to_numpy()
    assert np.ptp(values) > 0
    rule = ForgetSet(name="most_memorized", options={"count": 7})
    indices, splits = workspace.forget(ForgetSpec(rule=rule, scores=stand_in))
    assert indices.tolist() == sorted(np.argsort(-values, kind="stable")[:7].tolist())
    assert len(splits.retain) == 193


def test_proxies_are_stored_one_by_one_and_computed_once(dataset: Dataset, tmp_path: Path) -> None:
    original = run_of(dataset, "finetune").original
    assert original is not None
    names = ("confidence", "loss_curvature", "entropy")
    stores = [Store(str(tmp_path / name)) for name in ("together", "apart")]

    def perform(store: Store, *chosen: str) -> tuple[Task, Outcome]:
        task = Task("proxies", ProxiesSpec(original=original, proxies=tuple(Proxy(name=name) for name in chosen)))
        return task, Workspace(dataset, Context(store)).perform(task)

    whole, _ = perform(stores[0], *names)
    perform(stores[1], *names[:1])
    stamp = Path(stores[1].path(whole.objects[0])).stat().st_mtime_ns
    task, outcome = perform(stores[1], *names)
    assert outcome.error is None
    assert task.objects == whole.objects == tuple(scores_object(each) for each in task.spec.each)
    assert Path(stores[1].path(whole.objects[0])).stat().st_mtime_ns == stamp, "what was there is computed again"
    for name, stored in zip(names, whole.objects, strict=True):
        values = [results.get_table(store, stored).column(name).to_numpy() for store in stores]
        assert np.array_equal(*values)
        assert np.ptp(values[0]) > 0


def test_a_subset_model_that_predicts_nan_is_a_failure_and_not_a_class(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*, width: int = 4) -> nn.Module:
        """Finite in training, NaN in evaluation."""
        return Diverging()

    MODELS(diverging)
    try:
        setting = Setting(
            data=dataset.fingerprint,
            model=Model(name="diverging"),
            training=TrainingSpec(learning_rate=0.1, epochs=1, batch_size=32),
        )
        outcome = Workspace(dataset, Context(Store(str(tmp_path)))).perform(
            Task("model", CampaignSpec(setting=setting), 0, 3)
        )
    finally:
        del MODELS._entries["diverging"]
    assert "predicts NaN for 200 of 200 examples" in str(outcome.error)
    assert not Store(str(tmp_path)).names("campaigns")


class Diverging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.head(images.flatten(1))
        return made if self.training else made * float("nan")


# ---- blocks of subset models ---------------------------------------------------------------------------------------


def campaign_of(dataset: Dataset) -> CampaignSpec:
    return CampaignSpec(setting=run_of(dataset, "finetune").setting)


def block_from(
    dataset: Dataset, folder: Path, order: Sequence[int], workers: int = 1
) -> tuple[bytes, list[Outcome], Store]:
    """A block whose models are trained in an order, dealt to workers in turn, without what says how long they took."""
    store, campaign = Store(str(folder)), campaign_of(dataset)
    workspaces = [Workspace(dataset, Context(store)) for _ in range(workers)]
    tasks = [Task("model", campaign, 3, member) for member in order]
    outcomes = [workspaces[place % workers].perform(task) for place, task in enumerate(tasks)]
    arrays = unpack(store, Task("block", campaign, 3).object_name)
    return pack({name: array for name, array in arrays.items() if name != "seconds"}), outcomes, store


def test_a_block_is_the_same_whatever_the_order_and_the_workers_of_its_models(dataset: Dataset, tmp_path: Path) -> None:
    first, outcomes, store = block_from(dataset, tmp_path / "one", range(10))
    assert [outcome.models for outcome in outcomes] == [1] * 10
    assert {outcome.error for outcome in outcomes} == {None}
    assert [name for name in store.names("campaigns") if "/parts/" in name] == []
    assert first == block_from(dataset, tmp_path / "other", [7, 3, 9, 0, 1, 8, 2, 6, 5, 4], workers=3)[0]
    arrays = unpack(store, Task("block", campaign_of(dataset), 3).object_name)
    assert (arrays["membership"].sum(axis=0) == 7).all()
    right = arrays["train"].argmax(axis=2) == dataset.split_labels("train")
    shares = [right[member][arrays["membership"][member].astype(bool)].mean() for member in range(10)]
    assert arrays["in_accuracy"].ravel().tolist() == pytest.approx(shares)
    block = get_block(store, key(campaign_of(dataset)), 3, dataset, ["test"])
    assert list(block.outputs) == ["test"]
    assert [model.in_accuracy for model in block.models] == pytest.approx(shares)
    assert [model.stream for model in block.models] == [f'[0,"subset model",3,{member}]' for member in range(10)]
    assert {(model.host, model.numerics) for model in block.models} == {(socket.gethostname(), Lab(dataset).numerics)}


def test_what_a_killed_campaign_left_is_gone_on_from(dataset: Dataset, tmp_path: Path) -> None:
    """Models of an incomplete block count; a block that was never put together is, without training."""
    whole, _, store = block_from(dataset, tmp_path / "one", range(10))
    campaign, other = campaign_of(dataset), Store(str(tmp_path / "two"))
    workspace = Workspace(dataset, Context(other))
    for member in (4, 0):
        assert workspace.perform(Task("model", campaign, 3, member)).error is None
    plan = replace_present(dataset, other)
    assert [task.member for task in plan.models([Task("block", campaign, 3)])] == [1, 2, 3, 5, 6, 7, 8, 9]
    for member in (1, 2, 3, 5, 6, 7, 8):
        workspace.perform(Task("model", campaign, 3, member))
    arrays = unpack(store, Task("block", campaign, 3).object_name)
    last = {name: array[9] for name, array in arrays.items() if name != "membership"}
    other.put(Task("model", campaign, 3, 9).object_name, pack(last))  # and then it was killed
    (left,) = replace_present(dataset, other).models([Task("block", campaign, 3)])
    assert workspace.perform(left).models == 0
    found = unpack(other, Task("block", campaign, 3).object_name)
    assert whole == pack({name: array for name, array in found.items() if name != "seconds"})
    assert [name for name in other.names("campaigns") if "/parts/" in name] == []


def replace_present(dataset: Dataset, store: Store) -> Plan:
    present = frozenset(f"campaigns/{name}" for name in store.names("campaigns"))
    return Plan(RECIPES["digits"].function(), dataset.fingerprint, present)


def test_both_kinds_of_scores_come_from_the_same_block(dataset: Dataset, tmp_path: Path) -> None:
    _, _, store = block_from(dataset, tmp_path, range(10))
    campaign, labels = campaign_of(dataset), dataset.split_labels("train")
    arrays = unpack(store, Task("block", campaign, 3).object_name)
    store.put(Task("block", campaign, 0).object_name, store.get(Task("block", campaign, 3).object_name))
    logits, inside = torch.tensor(arrays["train"]).double(), arrays["membership"].astype(bool)
    probability = logits.softmax(2)[:, torch.arange(200), torch.tensor(labels)].numpy()
    correct = (arrays["train"].argmax(axis=2) == labels).astype(float)
    for estimator, values in (("correctness", correct), ("probability", probability)):
        spec = ScoresSpec(campaign=campaign, blocks=1, estimator=estimator)
        summary = campaigns.scores(store, spec, dataset)
        table = results.get_table(store, f"scores/{key(spec)}.parquet")
        expected = [values[inside[:, i], i].mean() - values[~inside[:, i], i].mean() for i in range(200)]
        assert table.column("score").to_numpy() == pytest.approx(expected, abs=1e-6)  # exponentials in float32
        assert (summary.estimator, summary.in_accuracy) == (estimator, pytest.approx(correct[inside].mean()))
        assert np.array_equal(memorization_scores(store, spec), table.column("score").to_numpy())


def test_models_of_a_block_that_another_driver_put_together_are_neither_trained_nor_kept(
    dataset: Dataset, tmp_path: Path
) -> None:
    _, _, store = block_from(dataset, tmp_path, range(10))
    campaign = campaign_of(dataset)
    workspace = Workspace(dataset, Context(store))
    assert workspace.perform(Task("model", campaign, 3, 4)).models == 0
    late = Task("model", campaign, 3, 5)
    store.put(late.object_name, b"trained at the same time")
    assert workspace.perform(late).error is None
    assert [name for name in store.names("campaigns") if "/parts/" in name] == []


def test_other_files_beside_the_models_of_a_block_are_not_counted_and_cut_models_are_named(
    dataset: Dataset, tmp_path: Path
) -> None:
    store, campaign = Store(str(tmp_path)), campaign_of(dataset)
    workspace = Workspace(dataset, Context(store))
    store.put(f"{parts_of(key(campaign), 0)}/.DS_Store", b"")
    for member in range(9):
        assert workspace.perform(Task("model", campaign, 0, member)).error is None
    part = Task("model", campaign, 0, 4).object_name
    store.put(part, store.get(part)[:999])
    study = RECIPES["digits"].function()
    setting = campaign.setting
    rules = (ForgetSet(name="most_memorized"),)
    study = study.model_copy(update={"model": setting.model, "training": setting.training, "forget_sets": rules})
    with pytest.raises(InputError, match=r"4\.safetensors is damaged"):
        planning.make(study, dataset, store)
