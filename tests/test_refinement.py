"""Unlearning part by part: which part each stage is given, what is still to be retained, and whose mask it is."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jobs.session import Options, Session, open_session
from orchestrator.data import Examples, Splits
from orchestrator.localization import localize, select
from orchestrator.models import Factory, head_names
from orchestrator.registry import Chosen, InputError
from orchestrator.seeds import generator
from orchestrator.stages import PlainStage, StageMask, performer
from orchestrator.training import clone
from orchestrator.unlearning import METHODS

FORGET = Examples(torch.zeros(7, 1, 1, 1, dtype=torch.uint8), torch.arange(7))
RETAIN = Examples(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.arange(100, 103))
MEMORIZATION = np.array([0.9, 0.1, 0.5, 0.1, 0.0, 1.0, 0.4])  # ranks: 4, 1, 3, 6, 2, 0, 5


class Told(nn.Module):
    """A model that remembers what was done to it; labels say which examples."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[tuple[int, list[int], list[int]]] = []


def stage(number: int) -> Any:
    def tell(model: Told, forget: Examples, retain: Examples) -> Told:
        told = Told()
        told.turns = [*model.turns, (number, forget.labels.tolist(), retain.labels.tolist())]
        return told

    return tell


def turns(name: str, number: int, **given: Any) -> list[tuple[int, list[int], list[int]]]:
    options = {option: given.pop(option) for option in list(given) if option in METHODS[name].options}
    available = {"model": Told(), "forget": FORGET, "retain": RETAIN, "memorization": MEMORIZATION, **given}
    done: Told = METHODS[name]({**available, "stages": [stage(place) for place in range(number)]}, options)
    return done.turns


def test_parts_go_from_low_to_high_and_what_is_to_come_is_retained() -> None:
    assert turns("rum", 3, order="low_to_high") == [
        (0, [1, 3, 4], [100, 101, 102, 0, 2, 5, 6]),
        (1, [2, 6], [100, 101, 102, 0, 5]),
        (2, [0, 5], [100, 101, 102]),
    ]


def test_from_high_to_low_each_part_keeps_its_stage() -> None:
    assert turns("rum", 3, order="high_to_low") == [
        (2, [0, 5], [100, 101, 102, 1, 2, 3, 4, 6]),
        (1, [2, 6], [100, 101, 102, 1, 3, 4]),
        (0, [1, 3, 4], [100, 101, 102]),
    ]


def test_shuffled_parts_are_as_large_and_go_by_the_seed_alone() -> None:
    drawn = [turns("rum_shuffled", 3, generator=generator(seed, "unlearning")) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for found in drawn:
        parts = [part for _, part, _ in found]
        assert [len(part) for part in parts] == [3, 2, 2]
        assert sorted(chain(*parts)) == list(range(7))
        for place, (number, _, retained) in enumerate(found):
            assert number == place
            assert sorted(retained) == sorted([100, 101, 102, *chain(*parts[place + 1 :])])


def test_more_stages_than_examples_are_refused() -> None:
    with pytest.raises(InputError, match="7 examples is to be cut in 8 parts"):
        turns("rum", 8, order="low_to_high")


# ---- with registered methods ---------------------------------------------------------------------------------------

TUNED = Chosen("finetune", {"lr": 0.1, "epochs": 1, "batch_size": 8})
MASK = StageMask(Chosen("weighted_gradient", {}), None, "channel", 0.3, "released", True, False)


@pytest.fixture
def available(model: nn.Module, fresh: Factory, splits: Splits) -> dict[str, Any]:
    return {
        "model": model,
        "forget": splits.forget,
        "retain": splits.retain,
        "fresh": fresh,
        "report": lambda *_: None,
        "num_classes": 3,
        "memorization": np.linspace(1, 0, len(splits.forget)),
    }


def composed(available: Mapping[str, Any], splits: Splits, *stages: PlainStage, seed: int = 5) -> nn.Module:
    made = [performer(each, place, seed, available, splits.train) for place, each in enumerate(stages)]
    result: nn.Module = METHODS["rum"]({**available, "stages": made}, {"order": "low_to_high"})
    return result


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_doing_nothing_three_times_is_doing_nothing(available: dict[str, Any], splits: Splits) -> None:
    nothing = PlainStage(Chosen("identity", {}), None)
    assert same(composed(available, splits, nothing, nothing, nothing), available["model"])


def test_one_stage_is_the_method_on_the_whole_forget_set(available: dict[str, Any], splits: Splits) -> None:
    entry = METHODS["random_labels"]
    method = Chosen("random_labels", {"lr": 0.1, "epochs": 2, "batch_size": 8})
    alone = {**available, "model": clone(available["model"]), "mask": None}
    stream = generator(5, "unlearning", "stage", 0)
    assert same(
        composed(available, splits, PlainStage(method, None)),
        entry({**alone, "generator": stream}, entry.resolve(method.options)),
    )


def test_a_stage_is_masked_by_the_model_and_the_part_that_it_is_given(
    available: dict[str, Any], splits: Splits
) -> None:
    found = composed(available, splits, PlainStage(TUNED, None), PlainStage(TUNED, MASK))
    entry, options = METHODS["finetune"], METHODS["finetune"].resolve(TUNED.options)
    forget = splits.forget
    half = (len(forget) + 1) // 2  # memorization falls with the place, so the first part is the back half
    first, second = (
        forget.take(torch.arange(len(forget) - half, len(forget))),
        forget.take(torch.arange(len(forget) - half)),
    )
    given = {**available, "mask": None, "retain": splits.retain.followed_by(second)}
    between = entry({**given, "generator": generator(5, "unlearning", "stage", 0)}, options)
    scores = localize(
        "weighted_gradient",
        {},
        between,
        Splits(splits.train, second, splits.retain),
        generator=generator(0, "unused"),
        base=None,
        granularity="channel",
    )
    mask = select(scores, 0.3, "channel", head=head_names(between))
    given = {**available, "model": between, "mask": mask, "generator": generator(5, "unlearning", "stage", 1)}
    assert same(found, entry(given, options))
    assert len(first) == half
    assert not same(found, between)


def test_each_stage_draws_for_itself(available: dict[str, Any], splits: Splits) -> None:
    drawn = []

    def watching(place: int) -> nn.Module:
        return composed(available, splits, *[PlainStage(Chosen("identity", {}), None)] * place, PlainStage(TUNED, None))

    for place in range(2):
        drawn.append(watching(place))
    assert not same(*drawn)


# ---- the forget set ------------------------------------------------------------------------------------------------


def test_a_mixed_forget_set_by_hand() -> None:
    from orchestrator.forget_sets import FORGET_SETS

    values = np.array([0.0, 0.9, 0.45, 0.1, 1.0, 0.55, 0.0, 0.2, 0.7, 0.05])
    # least 0, 6 (mean 0), most 4, 1 (mean .95): centre .475, nearest to it 2 (.025) and 5 (.075)
    rule = FORGET_SETS["mixed_memorized"]
    given = {"labels": np.zeros(10, dtype=np.int64), "memorization": values}
    assert rule(given, {"count": 6}).tolist() == [0, 1, 2, 4, 5, 6]
    scaled = {**given, "memorization": 7 * values - 3}
    assert rule(scaled, {"count": 6}).tolist() == [0, 1, 2, 4, 5, 6], "a scale changes nothing"
    for count in (2, 10):
        with pytest.raises(InputError, match=f"count is {count}; allowed: 3 to 9"):
            rule(given, {"count": count})


def test_more_stages_than_a_forget_set_has_examples_are_refused_before_training(tmp_path: Path) -> None:
    drawn = ["forget_sets=mixed_memorized", "forget_sets.mixed_memorized.count=3", "methods=rum"]

    def opened(stages: int) -> Session:
        stated = f"methods.rum.stages={','.join(['identity'] * stages)}"
        return open_session(Options("digits", [*drawn, stated], str(tmp_path)))

    assert opened(3).plan.runs()
    with pytest.raises(InputError, match="method rum has 4 stages and forget set mixed_memorized has 3 examples"):
        opened(4)
