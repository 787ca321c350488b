import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Augment, Examples, Splits
from orchestrator.models import Factory
from orchestrator.seeds import generator
from orchestrator.training import (
    Mask,
    Training,
    as_input,
    augmented,
    batches,
    clone,
    cropped,
    cross_entropy,
    endless_batches,
    fit,
    predict,
    rate_factor,
    resampled,
    reset,
)

TRAINING = Training(0.1, epochs=3, batch_size=12, momentum=0.9, weight_decay=0.01, warmup=0.3, final=0.05)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def mask_of(model: nn.Module, chosen: Callable[[str, Tensor], Tensor]) -> Mask:
    part = {name: chosen(name, parameter.detach()) for name, parameter in model.named_parameters()}
    return Mask(part, part)


def nothing(_: str, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.bool)


# ---- the schedule --------------------------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    # ten steps, 20 % warm-up: two rising steps, then eight on a cosine from 1 to .1
    rates = [rate_factor(step, 10, 0.2, 0.1) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(3 * math.pi / 7)))
    # five steps without warm-up: cos of 0, 45, 90, 135 and 180 degrees
    rates = [rate_factor(step, 5, 0.0, 0.0) for step in range(5)]
    assert rates == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0])
    assert [rate_factor(step, 4, 0.0, 1.0) for step in range(4)] == [1.0] * 4
    assert rate_factor(0, 1, 0.0, 0.01) == 1.0


# ---- batches -------------------------------------------------------------------------------------------------------


def numbered(count: int) -> Examples:
    return Examples(torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1), torch.arange(count))


@pytest.mark.parametrize(("count", "size", "expected"), [(12, 4, 3), (13, 4, 3), (15, 4, 3), (3, 8, 1), (8, 8, 1)])
def test_batches_are_full_and_no_example_comes_twice(count: int, size: int, expected: int) -> None:
    drawn = list(batches(numbered(count), size, generator(0)))
    assert [len(labels) for _, labels in drawn] == [min(size, count)] * expected
    seen = torch.cat([labels for _, labels in drawn])
    assert len(seen.unique()) == len(seen)
    for images, labels in drawn:
        assert torch.equal(images.flatten(), labels.float() / 255)


def test_epochs_are_shuffled_anew() -> None:
    stream = endless_batches(numbered(10), 5, generator(0))
    epochs = [torch.cat([next(stream)[1], next(stream)[1]]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_pixels_become_shares_of_one_in_channel_order() -> None:
    images = torch.tensor([[[[0, 51], [255, 102]]]], dtype=torch.uint8)  # one image, one row, two columns, two channels
    assert as_input(images).tolist() == [[[[0.0, 1.0]], [[pytest.approx(0.2), pytest.approx(0.4)]]]]


# ---- fit -----------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, examples: Examples, training: Training, stream: torch.Generator) -> list[float]:
    """The loop written out, momentum and weight decay included; returns the mean loss of each epoch."""
    velocity: dict[str, Tensor] = {}
    per_epoch = len(examples) // training.batch_size
    num_steps = per_epoch * training.epochs
    rising = round(training.warmup * num_steps)
    losses, step = [], 0
    model.train()
    for _ in range(training.epochs):
        order = torch.randperm(len(examples), generator=stream)
        total = 0.0
        for batch in range(per_epoch):
            chosen = order[batch * training.batch_size : (batch + 1) * training.batch_size]
            images = examples.images[chosen].permute(0, 3, 1, 2).float() / 255
            loss = nn.functional.cross_entropy(model(images), examples.labels[chosen])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            if step < rising:
                rate = training.learning_rate * ((step + 1) / rising)
            else:
                angle = math.pi * ((step - rising) / (num_steps - rising - 1))
                rate = training.learning_rate * (training.final + (1 - training.final) * 0.5 * (1 + math.cos(angle)))
            with torch.no_grad():
                for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                    slope = gradient.add(parameter, alpha=training.weight_decay)
                    velocity[name] = velocity[name] * training.momentum + slope if name in velocity else slope
                    parameter.add_(velocity[name], alpha=-rate)
            total += float(loss.detach())
            step += 1
        losses.append(total / per_epoch)
    return losses


def plain_torch(model: nn.Module, examples: Examples, training: Training, stream: torch.Generator) -> None:
    """The loop that everyone writes, with torch's optimizer and a schedule from a table."""
    per_epoch = len(examples) // training.batch_size
    num_steps = per_epoch * training.epochs
    table = [rate_factor(step, num_steps, training.warmup, training.final) for step in range(num_steps)]
    optimizer = torch.optim.SGD(
        model.parameters(), training.learning_rate, training.momentum, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: table[min(step, num_steps - 1)])
    model.train()
    for _ in range(training.epochs):
        order = torch.randperm(len(examples), generator=stream)
        for chosen in order.split(training.batch_size)[:per_epoch]:
            images = examples.images[chosen].permute(0, 3, 1, 2).float() / 255
            loss = nn.functional.cross_entropy(model(images), examples.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def test_fit_equals_a_plain_loop_bit_for_bit(fresh: Factory, splits: Splits) -> None:
    ours, theirs = fresh(generator(1)), fresh(generator(1))
    fit(ours, splits.train, training=TRAINING, generator=generator(3))
    plain_torch(theirs, splits.train, TRAINING, generator(3))
    assert same(ours, theirs)


def test_fit_equals_the_arithmetic_written_out(fresh: Factory, splits: Splits) -> None:
    told: list[tuple[int, int, float]] = []
    ours, theirs = fresh(generator(1)), fresh(generator(1))
    fit(ours, splits.train, training=TRAINING, generator=generator(3), report=lambda *args: told.append(args))
    losses = by_hand(theirs, splits.train, TRAINING, generator(3))
    for (name, parameter), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=name)
    # 40 examples in batches of 12: three steps an epoch, the rest is left out
    assert [(epoch, steps) for epoch, steps, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert [loss for *_, loss in told] == pytest.approx(losses, rel=1e-4)


def test_epochs_can_be_cut_so_that_subsets_take_the_same_steps(fresh: Factory, splits: Splits) -> None:
    told: list[int] = []
    model = fresh(generator(1))
    fit(
        model,
        splits.train,
        training=TRAINING,
        generator=generator(3),
        num_batches=2,
        report=lambda _, steps, __: told.append(steps),
    )
    assert told == [2, 2, 2]
    # 24 examples are two batches of 12, so the schedule is the same and only the examples differ
    assert int(model[1].num_batches_tracked) == 6  # type: ignore[index]


def test_no_more_steps_are_reported_than_there_are_batches(fresh: Factory, splits: Splits) -> None:
    told: list[tuple[int, float]] = []
    for cut in (None, 50):
        fit(
            fresh(generator(1)),
            splits.train,
            training=TRAINING,
            generator=generator(3),
            num_batches=cut,
            report=lambda _, steps, loss: told.append((steps, loss)),
        )
    assert told[:3] == told[3:]


def test_examples_may_change_from_epoch_to_epoch(fresh: Factory, splits: Splits) -> None:
    asked: list[int] = []

    def examples(epoch: int) -> Examples:
        asked.append(epoch)
        return splits.train

    changing, constant = fresh(generator(1)), fresh(generator(1))
    fit(changing, examples, training=TRAINING, generator=generator(3))
    fit(constant, splits.train, training=TRAINING, generator=generator(3))
    assert asked == [0, 1, 2]
    assert same(changing, constant)


def test_fewer_examples_than_a_batch_make_one_step(fresh: Factory, splits: Splits) -> None:
    model = fresh(generator(1))
    fit(model, splits.forget.take(torch.arange(5)), training=TRAINING, generator=generator(3))
    assert int(model[1].num_batches_tracked) == TRAINING.epochs  # type: ignore[index]


# ---- the mask ------------------------------------------------------------------------------------------------------


def test_only_trainable_entries_move_and_all_of_them_can(fresh: Factory, splits: Splits) -> None:
    before = fresh(generator(1))
    stream = generator(9)
    whole = list(dict(before.named_parameters()))[3]  # one tensor frozen whole, the others in part
    mask = mask_of(
        before,
        lambda name, p: nothing(name, p) if name == whole else torch.rand(p.shape, generator=stream) < 0.5,
    )
    after = fit(clone(before), splits.train, training=TRAINING, generator=generator(3), mask=mask)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old[~mask.trainable[name]], new[~mask.trainable[name]]), name
        if mask.trainable[name].any():
            assert (old != new)[mask.trainable[name]].float().mean() > 0.8, name


def test_frozen_entries_do_not_feed_back(fresh: Factory, splits: Splits) -> None:
    """A masked step is the free step on the trainable entries, from the frozen entries' old values."""
    one = Training(0.1, epochs=1, batch_size=40, momentum=0.9, weight_decay=0.1, final=1.0)
    before = fresh(generator(1))
    stream = generator(9)
    mask = mask_of(before, lambda _, p: torch.rand(p.shape, generator=stream) < 0.5)
    free = fit(clone(before), splits.train, training=one, generator=generator(3))
    masked = fit(clone(before), splits.train, training=one, generator=generator(3), mask=mask)
    for name, parameter in masked.named_parameters():
        chosen = mask.trainable[name]
        expected = torch.where(chosen, free.get_parameter(name), before.get_parameter(name))
        assert torch.equal(parameter, expected), name


def test_under_an_empty_mask_nothing_moves(model: nn.Module, splits: Splits) -> None:
    after = fit(clone(model), splits.train, training=TRAINING, generator=generator(3), mask=mask_of(model, nothing))
    assert same(model, after)


def test_parameters_that_require_no_gradient_stay(model: nn.Module, splits: Splits) -> None:
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    after = fit(clone(model), splits.train, training=TRAINING, generator=generator(3))
    assert torch.equal(model[0].weight, after[0].weight)  # type: ignore[index]
    assert not after[0].weight.requires_grad  # type: ignore[index]
    assert not torch.equal(model[3].weight, after[3].weight)  # type: ignore[index]


def test_counts_of_a_mask() -> None:
    mask = Mask(
        {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor([False])},
        {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor([True])},
    )
    assert (mask.num_entries, mask.num_reset, mask.num_trainable) == (5, 3, 4)


def exploding(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model, images, labels) * float("nan")


def faulty(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("objective", "raised"), [(exploding, FloatingPointError), (faulty, KeyboardInterrupt)])
def test_after_a_failure_every_parameter_requires_a_gradient_as_before(
    model: nn.Module, splits: Splits, objective: Callable[..., Tensor], raised: type[BaseException]
) -> None:
    model[4].bias.requires_grad_(False)  # type: ignore[index]
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    first = next(iter(before))
    mask = mask_of(model, lambda name, p: torch.full_like(p, name == first, dtype=torch.bool))
    with pytest.raises(raised):
        fit(model, splits.train, training=TRAINING, generator=generator(3), mask=mask, objective=objective)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_diverging_rate_is_named(model: nn.Module, splits: Splits) -> None:
    with pytest.raises(FloatingPointError, match=r"epoch \d+ at learning rate 1e\+20; try a smaller one"):
        fit(model, splits.train, training=Training(1e20, epochs=9, batch_size=12), generator=generator(3))


# ---- prediction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 40, 512])
def test_predictions_equal_the_model_in_evaluation_mode(model: nn.Module, splits: Splits, batch_size: int) -> None:
    with torch.no_grad():
        expected = clone(model).eval()(splits.train.images.permute(0, 3, 1, 2).float() / 255)
    logits = predict(model.train(), splits.train, batch_size=batch_size)
    assert logits.dtype == np.float32
    assert logits.shape == (40, 3)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["training", "evaluation", "mixed"])
def test_prediction_leaves_a_model_as_it_was(model: nn.Module, splits: Splits, mode: str) -> None:
    model.train(mode != "evaluation")
    if mode == "mixed":
        model[1].eval()  # type: ignore[index]
    before, modes = clone(model), [module.training for module in model.modules()]
    predict(model, splits.train)
    assert [module.training for module in model.modules()] == modes
    assert same(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_clone_shares_nothing(model: nn.Module) -> None:
    before, copy = clone(model), clone(model)
    with torch.no_grad():
        for value in copy.state_dict().values():
            value.add_(1)
    assert same(model, before)


def test_reset_takes_the_masked_entries_and_leaves_buffers(model: nn.Module, fresh: Factory) -> None:
    source, stream = fresh(generator(5)), generator(9)
    mask = mask_of(model, lambda _, p: torch.rand(p.shape, generator=stream) < 0.5)
    changed, whole = reset(clone(model), mask, source), reset(clone(model), None, source)
    for name, parameter in changed.named_parameters():
        old, new, chosen = model.get_parameter(name), source.get_parameter(name), mask.reset[name]
        assert torch.equal(parameter[chosen], new[chosen])
        assert torch.equal(parameter[~chosen], old[~chosen])
        assert torch.equal(whole.get_parameter(name), new)
    for after in (changed, whole):
        assert all(torch.equal(a, b) for a, b in zip(after.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize("epochs", [1, 4, 30])
def test_the_schedule_by_epochs_is_torchs_cosine_as_the_code_of_del_uses_it(epochs: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=0.001)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = [0.1 * rate_factor(epoch, epochs + 1, 0.0, 0.01) for epoch in range(epochs)]
    assert ours == pytest.approx(rates)


def test_within_an_epoch_the_rate_stays_where_the_schedule_says_so(model: nn.Module, splits: Splits) -> None:
    """Without momentum and decay, epochs of two steps each at the rate that torch's own cosine has for it."""
    training = Training(0.1, epochs=3, batch_size=14, momentum=0.0, final=0.0, schedule="epoch")
    found = fit(clone(model), splits.retain, training=training, generator=generator(0))
    net, stream = clone(model).train(), generator(0)
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 3)
    for _ in range(3):
        for images, labels in batches(splits.retain, 14, stream):
            plain.zero_grad()
            functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
            plain.step()
        cosine.step()
    for name, value in net.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, rtol=1e-5, atol=1e-7)


# ---- augmentation --------------------------------------------------------------------------------------------------


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.randint(256, (count, height, width, 3), generator=generator(5, "pictures"), dtype=torch.uint8)


def test_crops_are_those_of_torchvision() -> None:
    from torchvision.transforms.functional import crop as torchvisions
    from torchvision.transforms.functional import hflip, pad

    images = pictures(6, 9, 7)
    top, left = torch.tensor([0, 8, 4, 3, 1, 7]), torch.tensor([8, 0, 4, 6, 2, 5])
    flips = torch.tensor([True, False, True, False, False, True])
    found = cropped(images, top, left, flips).permute(0, 3, 1, 2)
    for image, here, y, x, flip in zip(images.permute(0, 3, 1, 2), found, top, left, flips, strict=True):
        expected = torchvisions(pad(image, [4]), int(y), int(x), 9, 7)
        assert torch.equal(here, hflip(expected) if flip else expected)


def test_resized_crops_are_those_of_torchvision_inside() -> None:
    """At its border a box sees its neighbours here, where torchvision sees the box alone."""
    from torchvision.transforms.functional import hflip, resized_crop

    images = pictures(4, 24, 16)
    boxes = torch.tensor([[0.0, 0, 24, 16], [3, 2, 12, 10], [10, 5, 12, 8], [1, 0, 20, 16]])
    flips = torch.tensor([False, True, False, True])
    found = resampled(images, *boxes.T, flips=flips).permute(0, 3, 1, 2).float()
    for image, here, (top, left, tall, wide), flip in zip(images, found, boxes.int().tolist(), flips, strict=True):
        box = image.permute(2, 0, 1).float()
        expected = resized_crop(box, top, left, tall, wide, [24, 16], antialias=False)
        expected = hflip(expected) if flip else expected
        torch.testing.assert_close(here[:, 3:-3, 3:-3], expected[:, 3:-3, 3:-3], atol=0.6, rtol=0)
    assert torch.equal(found[0].byte(), images[0].permute(2, 0, 1)), "the whole image is the image"


@pytest.mark.parametrize("augment", ["crop_flip", "resized_crop_flip"])
def test_augmentation_is_drawn_anew_for_each_image_and_by_the_seed(augment: Augment) -> None:
    images = pictures(1, 12, 12).expand(200, -1, -1, -1)
    first, again = (augmented(images, augment, generator(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in first}) > 100
    assert not torch.equal(first, augmented(images, augment, generator(1)))
    uncut = torch.full((400, 12, 12, 3), 200, dtype=torch.uint8)
    shown = augmented(uncut, augment, generator(0)).float().mean(dim=(1, 2, 3)) / 200
    if augment == "crop_flip":
        assert float(shown.min()) == pytest.approx((8 / 12) ** 2)  # four black rows and columns at most
        assert 0.6 < float(shown.mean()) < 0.9
    else:
        assert (shown == 1).all(), "a resized crop shows no border"


def test_training_sees_augmented_images_and_nothing_else_does(model: nn.Module, splits: Splits) -> None:
    plain = fit(clone(model), splits.retain, training=Training(0.1, 2, 8), generator=generator(0))
    seen = fit(clone(model), splits.retain.augmented("crop_flip"), training=Training(0.1, 2, 8), generator=generator(0))
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), seen.parameters(), strict=True))
    kept = splits.augmented("crop_flip")
    assert np.array_equal(np.asarray(predict(model, splits.retain)), np.asarray(predict(model, kept.retain)))
    parts = (
        kept.forget.take(torch.arange(3)),
        kept.retain.followed_by(kept.forget),
        kept.train.relabelled(kept.train.labels),
    )
    assert {part.augment for part in parts} == {"crop_flip"}


def test_dropout_draws_from_the_stream_of_its_training_whatever_was_drawn_before(splits: Splits) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    training = Training(0.1, epochs=2, batch_size=8)
    before = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(found) + 1)  # another worker, with another past
        state = torch.get_rng_state()
        found.append(fit(copy.deepcopy(net), splits.train, training=training, generator=generator(seed, "dropout")))
        assert torch.equal(torch.get_rng_state(), state), "what others draw is changed"
    torch.set_rng_state(before)
    first, again, other = (torch.cat([p.flatten() for p in each.parameters()]) for each in found)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
