import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Splits
from orchestrator.localization import GRANULARITIES, STRATEGIES, Scores, localize, random_within_tensor, select
from orchestrator.models import head_names
from orchestrator.registry import InputError
from orchestrator.seeds import generator
from orchestrator.training import Mask, clone

BUDGETS = (0.001, 0.01, 0.05, 0.07, 0.1, 0.14, 0.28, 0.29, 0.3, 0.55, 0.57, 0.58, 0.7, 0.9, 0.999, 1.0)


def scores_of(name: str, model: nn.Module, splits: Splits, seed: int = 0) -> Scores:
    base = None
    if "base" in STRATEGIES[name].inputs:
        base = localize("weighted_gradient", {}, model, splits, generator=generator(0), base=None)
    return localize(name, {}, model, splits, generator=generator(seed, "localization"), base=base)


def chosen(mask: Mask) -> Tensor:
    return torch.cat([part.flatten() for part in mask.reset.values()])


# ---- promises over the registry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_scores_every_entry_and_touches_nothing(name: str, model: nn.Module, splits: Splits) -> None:
    model.train()
    model[4].eval()  # type: ignore[index]
    before, modes = clone(model), [module.training for module in model.modules()]
    scores = scores_of(name, model, splits)
    assert list(scores) == [parameter for parameter, _ in model.named_parameters()]
    for parameter, part in scores.items():
        assert part.shape == model.get_parameter(parameter).shape
        assert part.dtype == torch.float32
        assert not part.requires_grad
        assert (part >= 0).all()
    assert [module.training for module in model.modules()] == modes
    for value, old in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(value, old)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_gives_the_same_scores(name: str, model: nn.Module, splits: Splits) -> None:
    first, again, other = (scores_of(name, model, splits, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[part], again[part]) for part in first)
    draws = "generator" in STRATEGIES[name].inputs
    assert all(torch.equal(first[part], other[part]) for part in first) != draws


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_mask_holds_exactly_its_budget(name: str, granularity: str, model: nn.Module, splits: Splits) -> None:
    scores = scores_of(name, model, splits)
    for budget in BUDGETS:
        mask = select(scores, budget, granularity, head=head_names(model))
        entries = sum(parameter.numel() for parameter in model.parameters())
        expected = math.floor(Decimal(str(budget)) * entries)  # the decimal that was asked, not its float
        assert (mask.num_entries, mask.num_reset) == (entries, expected), budget
        assert int(chosen(mask).sum()) == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_masks_nest_as_the_budget_grows(name: str, granularity: str, model: nn.Module, splits: Splits) -> None:
    scores = scores_of(name, model, splits)
    masks = [select(scores, budget, granularity, head=head_names(model)) for budget in BUDGETS]
    for smaller, larger in pairwise(masks):
        for parts in ("reset", "trainable"):
            inner, outer = getattr(smaller, parts), getattr(larger, parts)
            assert all((inner[part] <= outer[part]).all() for part in inner)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_head_trains_whole_but_is_reset_only_where_masked(
    name: str, granularity: str, model: nn.Module, splits: Splits
) -> None:
    scores, head = scores_of(name, model, splits), head_names(model)
    budget = 0.005  # fewer entries than the head has
    with_head = select(scores, budget, granularity, head=head)
    without = select(scores, budget, granularity, head=head, train_head=False)
    for part in scores:
        assert torch.equal(with_head.reset[part], without.reset[part])
        assert torch.equal(without.trainable[part], without.reset[part])
        expected = torch.ones_like(with_head.reset[part]) if part in head else with_head.reset[part]
        assert torch.equal(with_head.trainable[part], expected)
    extra = sum(int((~without.reset[part]).sum()) for part in head)
    assert extra > 0
    assert with_head.num_trainable == with_head.num_reset + extra


# ---- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hundredths", range(1, 101))
@pytest.mark.parametrize("entries", [100, 1000])
def test_awkward_decimals_are_not_rounded_down(hundredths: int, entries: int) -> None:
    mask = select({"a": torch.rand(entries)}, hundredths / 100, "param", head=frozenset())
    assert mask.num_reset == hundredths * entries // 100


def test_ties_break_by_position() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 1.0, 2.0]), "b": torch.tensor([[2.0, 1.0], [1.0, 2.0]])}
    mask = select(scores, 0.375, "param", head=frozenset())
    assert mask.reset["a"].tolist() == [False, True, False, True]
    assert mask.reset["b"].tolist() == [[True, False], [False, False]]
    flat = select({"a": torch.zeros(1000)}, 0.25, "param", head=frozenset())
    assert flat.reset["a"].nonzero().flatten().tolist() == list(range(250))


def by_loop(scores: Scores, budget: float) -> dict[str, list[int]]:
    """Channel selection as sentences: DEL's mean over the h highest entries of each channel, whole channels in turn."""
    ranked: list[tuple[float, int, str, list[int]]] = []  # minus the score, order of definition, tensor, its entries
    for name, part in scores.items():
        array = part.numpy()
        if array.ndim < 2:
            ranked += [(-float(array[i]), len(ranked) + i, name, [i]) for i in range(array.size)]
            continue
        fan_in = array.size // array.shape[0]
        h = min(max(1, int(0.1 * array.shape[0])), fan_in)
        for channel in range(array.shape[0]):
            highest = sorted((float(x) for x in array[channel].ravel()), reverse=True)[:h]
            members = list(range(channel * fan_in, (channel + 1) * fan_in))
            ranked.append((-sum(highest) / h, len(ranked), name, members))
    ranked.sort()
    left = math.floor(Fraction(str(budget)) * sum(part.numel() for part in scores.values()))
    taken: dict[str, list[int]] = {name: [] for name in scores}
    for _, _, name, members in ranked:
        taken[name] += members[:left]
        left -= min(left, len(members))
    return {name: sorted(members) for name, members in taken.items()}


SHAPES = {
    "0.weight": (30, 2, 3, 3),  # h = 3
    "0.bias": (30,),
    "1.weight": (40, 3),  # h = 3, the fan-in, where a tenth of the channels would be 4
    "2.weight": (10, 4),  # h = 1, exactly a tenth
    "3.weight": (9, 5),  # h = 1, where a tenth rounds down to 0
    "4.scale": (7,),
    "5.weight": (28, 11, 1, 1),  # h = 2, where a tenth rounds to 3
}


@pytest.mark.parametrize("budget", [0.001, 0.03, 0.1, 0.29, 0.5, 0.58, 0.9, 1.0])
def test_channels_are_selected_as_by_a_slow_loop(budget: float) -> None:
    # eighths add up exactly, and tie often
    scores = {
        name: torch.randint(0, 24, shape, generator=generator(0, name)).float() / 8 for name, shape in SHAPES.items()
    }
    mask = select(scores, budget, "channel", head=frozenset())
    expected = by_loop(scores, budget)
    for name, part in mask.reset.items():
        assert part.flatten().nonzero().flatten().tolist() == expected[name], name


def test_at_most_one_channel_is_cut(model: nn.Module, splits: Splits) -> None:
    scores = scores_of("weighted_gradient", model, splits)
    for budget in BUDGETS:
        mask = select(scores, budget, "channel", head=frozenset())
        cut = [
            (name, channel)
            for name, part in mask.reset.items()
            if part.ndim > 1
            for channel in range(len(part))
            if part[channel].any() and not part[channel].all()
        ]
        assert len(cut) <= 1


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.0001, 2, float("nan")])
def test_budgets_that_are_no_share_are_refused(budget: float) -> None:
    with pytest.raises(InputError, match="budget is"):
        select({"a": torch.rand(10)}, budget, "param", head=frozenset())


def test_a_budget_that_selects_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"budget 0.09 of 10 entries selects nothing; allowed: 0.1 or more"):
        select({"a": torch.rand(10)}, 0.09, "param", head=frozenset())
    assert select({"a": torch.rand(10)}, 0.1, "param", head=frozenset()).num_reset == 1


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(InputError, match="allowed: param, channel"):
        select({"a": torch.rand(10)}, 0.5, "layer", head=frozenset())


# ---- the strategies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [5, 12, 128])
def test_gradient_scores_equal_a_slow_loop(model: nn.Module, splits: Splits, batch_size: int) -> None:
    """One backward pass per example: the gradient of a batch mean is the mean of the gradients of its examples."""
    slow, names = clone(model).eval(), [name for name, _ in model.named_parameters()]
    sums = [np.zeros(parameter.shape) for parameter in slow.parameters()]
    count = len(splits.forget)
    for i in range(count):
        start = i // batch_size * batch_size
        in_batch = min(start + batch_size, count) - start
        image = splits.forget.images[i].permute(2, 0, 1)[None].double() / 255
        slow.double().zero_grad()
        functional.cross_entropy(slow(image), splits.forget.labels[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        for total, parameter in zip(sums, slow.parameters(), strict=True):
            assert parameter.grad is not None
            total += parameter.grad.numpy() / in_batch
    options = {"batch_size": batch_size}
    plain = localize("gradient", options, model, splits, generator=generator(0), base=None)
    weighted = localize("weighted_gradient", options, model, splits, generator=generator(0), base=None)
    for name, total in zip(names, sums, strict=True):
        weight = model.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(plain[name].numpy(), np.abs(total), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(weighted[name].numpy(), np.abs(weight * total), rtol=1e-3, atol=1e-6)


def test_the_batches_of_a_gradient_matter_only_through_their_sum(model: nn.Module, splits: Splits) -> None:
    """Two batches of six sum two means; one batch of twelve has one mean, half of that."""
    twice, once = (
        localize("gradient", {"batch_size": size}, model, splits, generator=generator(0), base=None) for size in (6, 12)
    )
    for name, part in twice.items():
        torch.testing.assert_close(part, 2 * once[name], rtol=1e-3, atol=1e-6)


def ragged_scores(seed: int, ties: bool) -> Scores:
    stream = generator(seed, "ragged")
    if ties:
        return {name: torch.randint(0, 5, shape, generator=stream).float() for name, shape in SHAPES.items()}
    return {name: torch.rand(shape, generator=stream) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("ties", [False, True])
def test_the_control_keeps_the_layer_profile_at_every_budget(granularity: str, ties: bool) -> None:
    base = ragged_scores(0, ties)
    entries = sum(part.numel() for part in base.values())
    moved = 0
    for seed in range(3):
        control = random_within_tensor(base, generator(seed))
        for count in range(1, entries + 1, 7):
            budget = min(1.0, (count + 0.5) / entries)  # not on a boundary, where a float falls on either side
            ours = select(control, budget, granularity, head=frozenset()).reset
            theirs = select(base, budget, granularity, head=frozenset()).reset
            assert {n: int(p.sum()) for n, p in ours.items()} == {n: int(p.sum()) for n, p in theirs.items()}
            moved += any(not torch.equal(ours[name], theirs[name]) for name in base)
    assert moved > 100


def test_the_control_permutes_whole_channels() -> None:
    base = ragged_scores(0, ties=False)
    control = random_within_tensor(base, generator(0))
    for name, part in base.items():
        rows, permuted = part.flatten(1) if part.ndim > 1 else part[:, None], control[name]
        permuted = permuted.flatten(1) if permuted.ndim > 1 else permuted[:, None]
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, permuted.tolist()))
        assert not torch.equal(rows, permuted)


def test_the_control_keeps_the_profile_of_a_model(model: nn.Module, splits: Splits) -> None:
    base, control = scores_of("weighted_gradient", model, splits), scores_of("random_within_tensor", model, splits)
    for budget in BUDGETS:
        for granularity in GRANULARITIES:
            ours = select(control, budget, granularity, head=frozenset()).reset
            theirs = select(base, budget, granularity, head=frozenset()).reset
            assert [int(part.sum()) for part in ours.values()] == [int(part.sum()) for part in theirs.values()]


@pytest.mark.parametrize("name", [n for n in STRATEGIES if "model" in STRATEGIES[n].inputs])
def test_scores_that_are_not_finite_are_refused(name: str, model: nn.Module, splits: Splits) -> None:
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))  # type: ignore[index]
    with pytest.raises(ValueError, match=f"strategy {name} .* not finite"):
        scores_of(name, model, splits)
