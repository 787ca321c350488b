"""The promises of every unlearning method, over the registry: a new entry is held to them without another line."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples, Splits
from orchestrator.localization import GRANULARITIES, localize, select
from orchestrator.models import Factory, head_names
from orchestrator.registry import InputError
from orchestrator.seeds import generator
from orchestrator.training import Mask, Training, batches, clone, endless_batches, fit
from orchestrator.unlearning import METHODS
from orchestrator.unlearning.distillation import divergence

SHORT = {"epochs": 2, "batch_size": 8, "momentum": 0.9, "weight_decay": 0.1, "lr": 0.05}
SHORT |= {"selection": 1e-9, "damping": 1e-3}  # SSD shrinks nearly every weight, so that a mask has what to hold back
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
        "initial": lambda: fresh(generator(7, "initial")),
        "generator": generator(0, "unlearning"),
        "training": TRAINING,
        "report": lambda epoch, steps, loss: None,
        "num_classes": 3,
        "memorization": np.linspace(1, 0, len(splits.forget)),
        "stages": [descending(splits, seed) for seed in range(2)],
    }


def descending(splits: Splits, seed: int) -> Callable[[nn.Module, Examples, Examples], nn.Module]:
    """A stage that trains on its part and on what it is to keep, a little more on the first."""

    def stage(model: nn.Module, forget: Examples, retain: Examples) -> nn.Module:
        for part in (forget, forget, retain):
            model = fit(
                clone(model), part, training=replace(TRAINING, batch_size=4), generator=generator(seed, "stage")
            )
        return model

    return stage


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
        if name == "ssd" and not old.any():
            continue  # zero cannot shrink
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


def by_hand(
    start: nn.Module,
    batched: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    rates: Sequence[float],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Plain steps at given rates, in double precision: one epoch of batches after another until the rates end."""
    net, left = clone(start).double().train(), list(rates)
    while left:
        for images, labels in batched():
            gradients = torch.autograd.grad(loss(net, images.double(), labels), list(net.parameters()))
            rate = left.pop(0)
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter -= rate * gradient
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def plain_loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(net(images), labels)


def cosine(steps: int, final: float) -> list[float]:
    """From .1 at the first to `final` x .1 at the last."""
    return [0.1 * (final + (1 - final) * (1 + math.cos(math.pi * i / (steps - 1))) / 2) for i in range(steps)]


def by_epoch(epochs: int, steps: int, final: float) -> list[float]:
    """torch's own cosine, stepped after each epoch, as the released code does."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0.1 * final)
    rates = []
    for _ in range(epochs):
        rates += [float(optimizer.param_groups[0]["lr"])] * steps
        optimizer.step()
        falling.step()
    return rates


TWO_EPOCHS = {"lr": 0.1, "epochs": 2, "batch_size": 8, "momentum": 0.0, "weight_decay": 0.0}  # of three steps each


@pytest.mark.parametrize("schedule", ["step", "epoch"])
@pytest.mark.parametrize("name", ["finetune", "reset_and_finetune", "l1_sparse", "retrain_short"])
def test_rates_fall_to_their_floor_as_the_schedule_says(name: str, schedule: str, available: dict[str, Any]) -> None:
    given: dict[str, Any] = {"l1_sparse": {"gamma": 0.0}, "retrain_short": {"warmup": 0.0}}.get(name, {})
    found = call(name, seeded(available, 3), **TWO_EPOCHS, final=0.2, schedule=schedule, **given)
    stream = generator(3, "unlearning")
    start = available["fresh"](stream) if name.startswith("re") else available["model"]
    rates = cosine(6, 0.2) if schedule == "step" else by_epoch(2, 3, 0.2)
    assert_is_at(found, by_hand(start, lambda: batches(available["retain"], 8, stream), rates, plain_loss))


def test_a_short_retraining_warms_up(available: dict[str, Any]) -> None:
    found = call("retrain_short", seeded(available, 3), **TWO_EPOCHS, warmup=0.3, final=0.5)
    stream = generator(3, "unlearning")
    start = available["fresh"](stream)
    rates = [0.05, 0.1, *cosine(4, 0.5)]  # round(.3 x 6) steps up
    assert_is_at(found, by_hand(start, lambda: batches(available["retain"], 8, stream), rates, plain_loss))


@pytest.mark.parametrize("name", ["gradient_ascent", "neg_grad_plus"])
def test_ascent_keeps_its_rate(name: str, available: dict[str, Any]) -> None:
    """Two epochs of three steps at the same rate; a forget batch is drawn at each step, after the retain batch."""
    given = {"alpha": 0.7} if name == "neg_grad_plus" else {}
    found = call(name, seeded(available, 3), **{**TWO_EPOCHS, "lr": 0.01}, **given)
    stream = generator(3, "unlearning")
    forgotten = endless_batches(available["forget"], 8, stream)

    def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        retained = plain_loss(net, images, labels)
        inputs, given_labels = next(forgotten)
        forget = plain_loss(net, inputs.double(), given_labels)
        return 0.7 * retained - 0.3 * forget if name == "neg_grad_plus" else -forget + 0 * retained

    expected = by_hand(available["model"], lambda: batches(available["retain"], 8, stream), [0.01] * 6, loss)
    assert_is_at(found, expected)


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


# ---- each method against something independent ---------------------------------------------------------------------


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one_gradient(model: nn.Module, examples: Examples) -> Tensor:
    """Of the mean loss in evaluation mode, flat, in double precision."""
    net = clone(model).double().eval()
    functional.cross_entropy(net(examples.images.permute(0, 3, 1, 2).double() / 255), examples.labels).backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("order", ["shuffled", "retain_first"])
@pytest.mark.parametrize(("selection", "damping"), [(1.0, 1.0), (0.5, 0.3), (2.0, 1.0)])
def test_ssd_equals_a_slow_loop(
    selection: float, damping: float, order: str, available: dict[str, Any], splits: Splits
) -> None:
    model, size = available["model"], 5
    everything = Examples(
        torch.cat([splits.retain.images, splits.forget.images]), torch.cat([splits.retain.labels, splits.forget.labels])
    )
    if order == "shuffled":
        everything = everything.take(torch.randperm(len(everything), generator=generator(0, "unlearning")))
    importance = []
    for examples in (splits.forget, everything):
        starts = range(0, len(examples), size)
        gradients = [one_gradient(model, examples.take(torch.arange(s, min(s + size, len(examples))))) for s in starts]
        importance.append(sum(g**2 for g in gradients) / len(gradients))
    expected = []
    for weight, of_forget, of_all in zip(flat(model).tolist(), *(part.tolist() for part in importance), strict=True):  # type: ignore[union-attr]
        shrinks = of_forget > selection * of_all
        expected.append(weight * min(1.0, damping * of_all / of_forget) if shrinks else weight)
    entry = METHODS["ssd"]
    found = entry(
        available, entry.resolve({"selection": selection, "damping": damping, "batch_size": size, "order": order})
    )
    torch.testing.assert_close(flat(found).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    changed = (flat(found) != flat(model)).float().mean()
    assert 0.01 < changed < 0.99


def influence_step(available: Mapping[str, Any], **options: Any) -> Tensor:
    entry = METHODS["influence"]
    return (flat(entry(available, entry.resolve({"alpha": 1.0, **options}))) - flat(available["model"])).double()


def influence_parts(available: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """v, and the gradients of the retain examples in the order in which they are drawn."""
    model, forget, retain = (available[name] for name in ("model", "forget", "retain"))
    total = len(forget) + len(retain)
    v = len(forget) / total * (one_gradient(model, forget) - one_gradient(model, retain))
    order = torch.randperm(len(retain), generator=generator(0, "unlearning"))
    return v, [one_gradient(model, retain.take(order[i : i + 1])) for i in range(len(retain))]


def test_true_woodfisher_equals_a_dense_inverse(available: dict[str, Any]) -> None:
    v, gradients = influence_parts(available)
    keep = torch.arange(len(v)) % 7 == 0  # a mask makes the dense matrix small, and is tested by the way
    start, trainable = 0, {}
    for name, parameter in available["model"].named_parameters():
        trainable[name] = keep[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    rows = torch.stack(gradients)[:, keep]
    fisher = rows.T @ rows / len(rows) + 0.05 * torch.eye(int(keep.sum()), dtype=torch.float64)
    expected = torch.zeros_like(v)
    expected[keep] = torch.linalg.inv(fisher) @ v[keep]
    masked = available | {"mask": Mask(trainable, trainable)}
    found = influence_step(masked, hessian="woodfisher", damping=0.05)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3 * float(expected.abs().max()))


def test_the_released_recursion_equals_a_slow_loop_and_never_leaves_one_direction(available: dict[str, Any]) -> None:
    v, gradients = influence_parts(available)
    step, scale = v.clone(), 1.0  # what the code keeps is the first gradient, scaled
    for gradient in gradients[1:]:
        inner = scale * torch.dot(gradients[0], gradient)
        step = step - scale * torch.dot(step, gradient) / (len(gradients) + inner) * gradients[0]
        scale *= 1 - inner / (len(gradients) + inner)
    found = influence_step(available)
    torch.testing.assert_close(found, step, rtol=1e-2, atol=1e-2 * float(step.abs().max()))
    correction = found - v
    cosine = torch.dot(correction, gradients[0]) / (correction.norm() * gradients[0].norm())
    assert abs(float(cosine)) > 0.99


def test_scrub_leaves_its_teacher_alone_and_drives_the_student_from_it(available: dict[str, Any]) -> None:
    """With max steps alone (no pull back) the student's predictions on the forget set leave the teacher's."""
    model = available["model"]
    before = clone(model)
    entry = METHODS["scrub"]

    def distance(**options: Any) -> float:
        chosen = {"lr": 0.02, "epochs": 3, "batch_size": 8, "forget_batch_size": 4, **options}
        student = entry(seeded(available, 0), entry.resolve(chosen)).eval()
        images = available["forget"].images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            ours, theirs = student(images).softmax(1), before.eval()(images).softmax(1)
        return float((ours - theirs).abs().mean())

    away = distance(gamma=0.0, alpha=0.0, max_epochs=3)
    back = distance(gamma=0.0, alpha=1.0, max_epochs=1)
    assert away > 0.05
    assert back < away
    assert same(model, before.train(model.training))


@pytest.mark.parametrize("max_epochs", [0, 1, 2])
def test_scrub_climbs_in_its_first_epochs_alone(max_epochs: int, available: dict[str, Any]) -> None:
    """Three retain steps an epoch, and three forget steps before them while it climbs."""
    taken: list[int] = []
    told = seeded(available, 0) | {"report": lambda epoch, steps, loss: taken.append(steps)}
    call("scrub", told, epochs=2, batch_size=8, forget_batch_size=4, max_epochs=max_epochs)
    assert taken == [6 if epoch < max_epochs else 3 for epoch in range(2)]


def test_scrub_without_teacher_is_training_at_a_constant_rate(available: dict[str, Any]) -> None:
    options = {**TWO_EPOCHS, "forget_batch_size": 4, "max_epochs": 0, "alpha": 0.0, "gamma": 0.5}
    found = call("scrub", seeded(available, 3), **options)
    stream = generator(3, "unlearning")
    expected = by_hand(
        available["model"],
        lambda: batches(available["retain"], 8, stream),
        [0.1] * 6,
        lambda net, images, labels: 0.5 * plain_loss(net, images, labels),
    )
    assert_is_at(found, expected)


def test_the_divergence_is_that_of_its_definition() -> None:
    student, teacher = torch.randn(4, 3, generator=generator(0)), torch.randn(4, 3, generator=generator(1))
    expected = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / 2.5) for x in row] for row in (theirs, ours))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * 2.5**2 / 4
    assert float(divergence(student, teacher, 2.5)) == pytest.approx(expected, rel=1e-5)


def test_bad_teacher_follows_each_teacher_on_its_own_examples(available: dict[str, Any], fresh: Factory) -> None:
    """With many steps: nearer to the untrained model on the forget set than the original is."""
    trained = fit(clone(available["model"]), available["retain"], training=TRAINING, generator=generator(1))
    entry = METHODS["bad_teacher"]
    options = entry.resolve({"lr": 0.05, "epochs": 20, "batch_size": 8, "retain_share": 1.0})
    found = entry(seeded(available, 3) | {"model": trained}, options).eval()
    bad, good = fresh(generator(3, "unlearning")).eval(), clone(trained).eval()

    def gap(net: nn.Module, teacher: nn.Module, part: str) -> float:
        images = available[part].images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            return float((net(images).softmax(1) - teacher(images).softmax(1)).abs().mean())

    assert gap(found, bad, "forget") < 0.7 * gap(good, bad, "forget")
    assert gap(found, good, "retain") < gap(found, good, "forget")


def test_l1_sparse_shrinks_more_the_larger_its_weight(available: dict[str, Any]) -> None:
    norms = [
        float(flat(call("l1_sparse", seeded(available, 0), gamma=gamma)).abs().sum()) for gamma in (0.0, 1e-3, 1e-2)
    ]
    assert norms[0] > norms[1] > norms[2]
    plain = call("finetune", seeded(available, 0))
    assert torch.equal(flat(call("l1_sparse", seeded(available, 0), gamma=0.0)), flat(plain))


def test_the_weight_of_the_l1_norm_falls_to_nothing_by_epochs(available: dict[str, Any]) -> None:
    """One step by hand: theta - lr (gradient + gamma (1 - 0 / E) sign), in the first epoch of one batch."""
    model, retain = available["model"], available["retain"]
    entry = METHODS["l1_sparse"]
    options = {"gamma": 0.01, "lr": 0.1, "epochs": 1, "batch_size": len(retain), "momentum": 0.0}
    found = entry(available, entry.resolve(options))
    net = clone(model).train()
    functional.cross_entropy(net(retain.images.permute(0, 3, 1, 2).float() / 255), retain.labels).backward()  # type: ignore[no-untyped-call]
    for name, p in net.named_parameters():
        assert p.grad is not None
        expected = p.detach() - 0.1 * (p.grad + 0.01 * p.detach().sign())
        torch.testing.assert_close(found.get_parameter(name), nn.Parameter(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", ["retain", "forget"])
def test_gradient_ascent_raises_the_forget_loss_in_as_many_steps(steps: str, available: dict[str, Any]) -> None:
    taken: list[int] = []
    inputs = available | {"report": lambda epoch, num, loss: taken.append(num)}
    found = call("gradient_ascent", inputs, steps=steps, weight_decay=0.0)
    assert taken == [len(available[steps]) // 8] * 2

    def loss(net: nn.Module) -> float:
        images, labels = available["forget"].images, available["forget"].labels
        with torch.no_grad():
            return float(functional.cross_entropy(clone(net).train()(images.permute(0, 3, 1, 2).float() / 255), labels))

    assert loss(found) > loss(available["model"])


@pytest.mark.parametrize(
    ("statistics", "name"), [("both", "gradient_ascent"), ("forget", "gradient_ascent"), ("", "neg_grad_plus")]
)
def test_batch_norm_sees_the_retain_batch_first_as_released(
    statistics: str, name: str, available: dict[str, Any], splits: Splits
) -> None:
    """With a rate of zero the buffers alone move: replay the batches through a copy."""
    given = {"statistics": statistics} if statistics else {}
    found = call(name, available, lr=0.0, epochs=1, batch_size=len(splits.retain), **given)
    expected = clone(available["model"]).train()
    with torch.no_grad():
        for part in (splits.retain, splits.forget)[statistics == "forget" :]:
            expected(part.images.permute(0, 3, 1, 2).float() / 255)
    for buffer, value in expected.named_buffers():
        torch.testing.assert_close(found.get_buffer(buffer), value, rtol=1e-4, atol=1e-6)


# ---- methods that choose their own parameters ----------------------------------------------------------------------


@pytest.mark.parametrize(("k", "first"), [(1, "head.weight"), (2, "conv3.weight"), (3, "conv2.weight")])
@pytest.mark.parametrize("name", ["cf_k", "eu_k"])
def test_the_last_k_layers_move_and_the_rest_does_not(name: str, k: int, first: str, available: dict[str, Any]) -> None:
    model = available["model"]
    names = [parameter for parameter, _ in model.named_parameters()]
    unlearned = call(name, available, k=k)
    for place, parameter in enumerate(names):
        moved = not torch.equal(unlearned.get_parameter(parameter), model.get_parameter(parameter))
        assert moved == (place >= names.index(first)), parameter


def test_eu_k_draws_layers_anew_and_keeps_the_norm_between_them(available: dict[str, Any], fresh: Factory) -> None:
    model = available["model"]
    unlearned = call("eu_k", seeded(available, 4), k=2, lr=0.0)
    drawn = fresh(generator(4, "unlearning"))
    for name, parameter in unlearned.named_parameters():
        source = drawn if name.startswith(("conv3.", "head.")) else model
        assert torch.equal(parameter, source.get_parameter(name)), name


@pytest.mark.parametrize("name", ["cf_k", "eu_k"])
def test_more_layers_than_there_are_is_refused(name: str, available: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="k is 5; allowed: 1 to 4"):
        call(name, available, k=5)


# ---- options of methods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset_to", ["fresh", "initial", "zero"])
def test_masked_entries_are_reset_to_what_is_asked(
    reset_to: str, available: dict[str, Any], splits: Splits, fresh: Factory
) -> None:
    model = available["model"]
    mask = selected(model, splits, "channel")
    found = call("reset_and_finetune", seeded(available, 5) | {"mask": mask}, reset_to=reset_to, lr=0.0)
    for name, parameter in found.named_parameters():
        sources = {
            "fresh": fresh(generator(5, "unlearning")).get_parameter(name),
            "initial": available["initial"]().get_parameter(name),
            "zero": torch.zeros_like(parameter),
        }
        expected = torch.where(mask.reset[name], sources[reset_to], model.get_parameter(name))
        assert torch.equal(parameter, expected), name


def test_wrong_labels_are_uniform_over_the_wrong_classes(available: dict[str, Any]) -> None:
    """The loss on all classes but the given one: what is drawn is seen through the examples that training gets."""
    seen: list[tuple[int, int]] = []
    given = {
        tuple(image.flatten().tolist()): int(label)
        for image, label in zip(available["forget"].images, available["forget"].labels, strict=True)
    }

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.last = [tuple((image * 255).round().int().flatten().tolist()) for image in x]
            out: Tensor = self.layer(x.flatten(1))
            out.register_hook(self.note)
            return out

        def note(self, gradient: Tensor) -> None:  # the gradient of cross-entropy is negative at the label alone
            for image, row in zip(self.last, gradient, strict=True):
                if image in given:
                    seen.append((given[image], int(row.argmin())))

    # a plain copy would lose the note taking, so what is cloned is the module with its methods
    spy = Spy()
    METHODS["random_labels"](
        available | {"model": spy},
        METHODS["random_labels"].resolve(
            {"epochs": 60, "batch_size": 4, "labels": "wrong", "redraw": True, "lr": 1e-6, "order": "forget_first"}
        ),
    )
    assert len(seen) == 60 * 12
    assert all(old != new for old, new in seen)
    shares = [sum((new - old) % 3 == d for old, new in seen) / len(seen) for d in (1, 2)]
    assert max(shares) < 0.56


def test_forget_first_goes_through_the_forget_set_before_the_retain_set(available: dict[str, Any]) -> None:
    steps: list[int] = []
    inputs = available | {"report": lambda epoch, num, loss: steps.append(num)}
    shuffled = call("random_labels", inputs, order="shuffled")
    first = call("random_labels", seeded(inputs, 0), order="forget_first")
    assert steps == [40 // 8] * 2 + [12 // 8 + 28 // 8] * 2
    assert not same(shuffled, first)


def test_frozen_statistics_stay_and_the_weights_still_move(available: dict[str, Any], splits: Splits) -> None:
    model = available["model"]
    mask = selected(model, splits, "channel")
    frozen = call("finetune", available | {"mask": Mask(mask.reset, mask.trainable, freeze_statistics=True)})
    follows = call("finetune", seeded(available, 0) | {"mask": mask})
    buffers = {name: value for name, value in model.named_buffers() if "running" in name}
    assert all(torch.equal(dict(frozen.named_buffers())[name], value) for name, value in buffers.items())
    assert not any(torch.equal(dict(follows.named_buffers())[name], value) for name, value in buffers.items())
    assert not torch.equal(flat(frozen), flat(model))
    assert frozen.training == model.training or frozen.training
