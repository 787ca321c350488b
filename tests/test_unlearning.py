"""The promises of every unlearning method, over the registry: a new entry is held to them without another line."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples, Splits
from orchestrator.localization import GRANULARITIES, localize, select
from orchestrator.models import Factory, head_names
from orchestrator.seeds import generator
from orchestrator.training import Mask, Training, clone
from orchestrator.unlearning import METHODS

SHORT = {"epochs": 2, "batch_size": 8, "momentum": 0.9, "weight_decay": 0.1, "lr": 0.05}
TRAINING = Training(0.1, epochs=2, batch_size=8, momentum=0.9, weight_decay=0.1)
MASKED = [name for name in METHODS if "mask" in METHODS[name].inputs]
GIVEN_A_MODEL = [name for name in METHODS if "model" in METHODS[name].inputs]
DRAWING = [name for name in METHODS if "generator" in METHODS[name].inputs]


def call(name: str, available: Mapping[str, Any], **options: Any) -> nn.Module:
    """Run a method for a short while, with weight decay and momentum on where it has them."""
    entry = METHODS[name]
    short = {option: value for option, value in SHORT.items() if option in entry.options}
    result: nn.Module = entry(available, entry.resolve(short | options))
    return result


@pytest.fixture
def available(model: nn.Module, fresh: Factory, splits: Splits) -> dict[str, Any]:
    """All that a method may ask for; without a mask."""
    return {
        "model": model,
        "mask": None,
        "forget": splits.forget,
        "retain": splits.retain,
        "validation": splits.retain.take(torch.arange(8)),
        "fresh": fresh,
        "generator": generator(0, "unlearning"),
        "training": TRAINING,
        "report": lambda epoch, steps, loss: None,
        "num_classes": 3,
    }


def seeded(available: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {**available, "generator": generator(seed, "unlearning")}


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether parameters and buffers agree bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def filled(model: nn.Module, value: bool) -> dict[str, Tensor]:
    return {name: torch.full(p.shape, value) for name, p in model.named_parameters()}


def selected(model: nn.Module, splits: Splits, granularity: str) -> Mask:
    scores = localize("weighted_gradient", {}, model, splits, generator=generator(0), base=None)
    return select(scores, 0.2, granularity, head=head_names(model))


def scattered(model: nn.Module, splits: Splits) -> Mask:
    """Some tensors frozen whole, the others half; what trains is more than what is reset."""
    stream = generator(4, "mask")
    reset, trainable = {}, {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        drawn = torch.rand(parameter.shape, generator=stream)
        frozen = number % 3 == 1
        reset[name], trainable[name] = (drawn < 0.3) & (not frozen), (drawn < 0.5) & (not frozen)
    return Mask(reset, trainable)


MASKS: dict[str, Callable[[nn.Module, Splits], Mask]] = {
    "param": lambda model, splits: selected(model, splits, "param"),
    "channel": lambda model, splits: selected(model, splits, "channel"),
    "scattered": scattered,
    "head alone": lambda model, _: Mask(
        filled(model, False), {n: torch.full(p.shape, n in head_names(model)) for n, p in model.named_parameters()}
    ),
}


def test_the_masks_of_these_tests_are_the_hard_ones(model: nn.Module, splits: Splits) -> None:
    assert set(GRANULARITIES) < set(MASKS)
    for name, make in MASKS.items():
        parts = list(make(model, splits).trainable.values())
        whole = [part for part in parts if not part.any()]
        mixed = [part for part in parts if part.any() and not part.all()]
        assert whole or name == "param", "a tensor frozen whole"
        assert mixed or name == "head alone", "a tensor frozen in part"


# ---- promises ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", MASKED)
def test_what_is_not_trainable_does_not_move_by_a_bit(
    name: str, kind: str, available: dict[str, Any], splits: Splits
) -> None:
    model = available["model"]
    mask = MASKS[kind](model, splits)
    unlearned = call(name, available | {"mask": mask})
    moved = 0
    for parameter, old in model.named_parameters():
        new, trainable = unlearned.get_parameter(parameter), mask.trainable[parameter]
        assert torch.equal(new[~trainable], old[~trainable]), parameter
        moved += int((new != old).sum())
    assert moved > 0.5 * mask.num_trainable, "the mask held back what it should let go"


@pytest.mark.parametrize("name", MASKED)
def test_without_a_mask_every_tensor_moves(name: str, available: dict[str, Any]) -> None:
    unlearned = call(name, available)
    for parameter, old in available["model"].named_parameters():
        assert not torch.equal(unlearned.get_parameter(parameter), old), parameter


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_mask_returns_an_unchanged_copy(name: str, training: bool, available: dict[str, Any]) -> None:
    model = available["model"].train(training)
    nothing = Mask(filled(model, False), filled(model, False))
    unlearned = call(name, available | {"mask": nothing})
    assert unlearned is not model
    assert same(unlearned, model)
    ours = {value.data_ptr() for value in unlearned.state_dict().values()}
    assert ours.isdisjoint(value.data_ptr() for value in model.state_dict().values())
    assert unlearned.training == training


MASKING = [(name, kind) for name in GIVEN_A_MODEL for kind in (None, *(MASKS if name in MASKED else ()))]


@pytest.mark.parametrize(("name", "kind"), MASKING)
def test_the_given_model_and_examples_are_not_mutated(
    name: str, kind: str | None, available: dict[str, Any], splits: Splits
) -> None:
    model = available["model"].train()
    available["mask"] = None if kind is None else MASKS[kind](model, splits)
    model[4].eval()
    model[4].bias.requires_grad_(False)
    before, modes = clone(model), [module.training for module in model.modules()]
    flags = {parameter: p.requires_grad for parameter, p in model.named_parameters()}
    examples = [
        getattr(available[part], field).clone() for part in ("forget", "retain") for field in ("images", "labels")
    ]
    call(name, available)
    assert same(model, before)
    assert {parameter: p.requires_grad for parameter, p in model.named_parameters()} == flags
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    after = [getattr(available[part], field) for part in ("forget", "retain") for field in ("images", "labels")]
    assert all(torch.equal(a, b) for a, b in zip(examples, after, strict=True))


@pytest.mark.parametrize("name", GIVEN_A_MODEL)
def test_the_result_shares_nothing_with_the_given_model(name: str, available: dict[str, Any]) -> None:
    model = available["model"]
    given = {value.data_ptr() for value in model.state_dict().values()}
    assert given.isdisjoint(value.data_ptr() for value in call(name, available).state_dict().values())


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_the_result_can_be_trained_on(name: str, available: dict[str, Any], splits: Splits) -> None:
    if name in MASKED:
        available["mask"] = scattered(available["model"], splits)
    assert all(parameter.requires_grad for parameter in call(name, available).parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_result(name: str, available: dict[str, Any]) -> None:
    first, again = (call(name, seeded(available, 7)) for _ in range(2))
    assert same(first, again)


@pytest.mark.parametrize("name", DRAWING)
def test_another_seed_gives_another_result(name: str, available: dict[str, Any]) -> None:
    assert not same(call(name, seeded(available, 7)), call(name, seeded(available, 8)))


@pytest.mark.parametrize("name", METHODS)
def test_the_global_generator_has_no_say(name: str, available: dict[str, Any]) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(call(name, seeded(available, 7)))
    assert same(*results)


class Trap:
    """Springs whenever anyone looks at it."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"touched: {name}")

    def __len__(self) -> int:
        raise AssertionError("touched: its length")

    def __call__(self, *_: Any) -> Any:
        raise AssertionError("touched: called")


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_does_not_declare_it_never_touches(name: str, available: dict[str, Any]) -> None:
    inputs = METHODS[name].inputs
    trapped = {part: value if part in inputs else Trap() for part, value in available.items()}
    assert same(call(name, trapped), call(name, seeded(available, 0)))
    if "retain" in inputs:
        with pytest.raises(AssertionError, match="touched"):
            call(name, {**available, "retain": Trap()})


@pytest.mark.parametrize("name", [name for name in METHODS if "report" in METHODS[name].inputs])
def test_each_epoch_is_reported_once(name: str, available: dict[str, Any]) -> None:
    told: list[tuple[int, int, float]] = []
    call(name, available | {"report": lambda *args: told.append(args)})
    assert [epoch for epoch, *_ in told] == [1, 2]
    assert all(steps >= 1 for _, steps, _ in told)


# ---- what each method does, from its published definition ----------------------------------------------------------


def test_identity_keeps_every_bit(available: dict[str, Any]) -> None:
    assert same(call("identity", available), available["model"])


@pytest.mark.parametrize("kind", [None, "param", "channel", "scattered"])
def test_del_resets_the_masked_entries_to_a_new_initialization(
    kind: str | None, available: dict[str, Any], splits: Splits, fresh: Factory
) -> None:
    model = available["model"]
    mask = None if kind is None else MASKS[kind](model, splits)
    # at rate zero nothing but the reset is left
    unlearned = call("reset_and_finetune", seeded(available, 3) | {"mask": mask}, lr=0.0)
    new = fresh(generator(3, "unlearning"))
    for name, old in model.named_parameters():
        drawn = new.get_parameter(name)
        expected = drawn if mask is None else torch.where(mask.reset[name], drawn, old)
        assert torch.equal(unlearned.get_parameter(name), expected), name


def test_references_depend_on_the_retain_set_alone(available: dict[str, Any], splits: Splits) -> None:
    for name in ("retrain", "retrain_short"):
        assert {"model", "forget"}.isdisjoint(METHODS[name].inputs)
        plain = call(name, seeded(available, 3))
        other = Examples(splits.retain.images.flip(0), splits.retain.labels.flip(0))
        assert not same(plain, call(name, seeded(available, 3) | {"retain": other}))


ONE_STEP = {"epochs": 1, "batch_size": 64, "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1}


def descended(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """One plain step of rate .1 down a loss, in double precision."""
    copy = clone(model).double().train()
    gradients = torch.autograd.grad(loss(copy), list(copy.parameters()))
    pairs = zip(copy.named_parameters(), gradients, strict=True)
    return {name: parameter.detach() - 0.1 * gradient for (name, parameter), gradient in pairs}


def mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model(images.permute(0, 3, 1, 2).double() / 255), labels)


def assert_is_at(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(name).double(), value, rtol=1e-4, atol=1e-6, msg=name)


def test_finetuning_descends_the_retain_loss(available: dict[str, Any], splits: Splits) -> None:
    retain = splits.retain
    expected = descended(available["model"], lambda net: mean_loss(net, retain.images, retain.labels))
    assert_is_at(call("finetune", available, **ONE_STEP), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_neg_grad_plus_ascends_the_forget_loss(alpha: float, available: dict[str, Any], splits: Splits) -> None:
    forget, retain = splits.forget, splits.retain
    expected = descended(
        available["model"],
        lambda net: (
            alpha * mean_loss(net, retain.images, retain.labels)
            - (1 - alpha) * mean_loss(net, forget.images, forget.labels)
        ),
    )
    assert_is_at(call("neg_grad_plus", available, alpha=alpha, **ONE_STEP), expected)


def test_random_labels_trains_on_everything_under_drawn_labels(available: dict[str, Any], splits: Splits) -> None:
    drawn = torch.randint(3, (12,), generator=generator(5, "unlearning"))
    images = torch.cat([splits.retain.images, splits.forget.images])
    labels = torch.cat([splits.retain.labels, drawn])
    expected = descended(available["model"], lambda net: mean_loss(net, images, labels))
    assert_is_at(call("random_labels", seeded(available, 5), **ONE_STEP), expected)


def test_random_labels_redraws_only_where_asked(available: dict[str, Any]) -> None:
    once, anew = (
        call("random_labels", seeded(available, 5), **(ONE_STEP | {"epochs": epochs}), redraw=redraw, final=1.0)
        for epochs, redraw in ((1, False), (1, True))
    )
    assert same(once, anew), "the first epoch's labels are drawn alike"
    once, anew = (
        call("random_labels", seeded(available, 5), **(ONE_STEP | {"epochs": 2}), redraw=redraw)
        for redraw in (False, True)
    )
    assert not same(once, anew)
