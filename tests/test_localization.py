import dataclasses
import math
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples, Splits
from orchestrator.localization import (
    GRANULARITIES,
    STRATEGIES,
    Scores,
    granularities,
    has_own_budget,
    localize,
    rank,
    select,
)
from orchestrator.localization.positions import random_within_tensor
from orchestrator.models import head_names
from orchestrator.registry import InputError
from orchestrator.seeds import generator
from orchestrator.specs import MaskSpec, Strategy
from orchestrator.training import Mask, Training, as_input, clone, fit

BUDGETS = (0.001, 0.01, 0.05, 0.07, 0.1, 0.14, 0.28, 0.29, 0.3, 0.55, 0.57, 0.58, 0.7, 0.9, 0.999, 1.0)


PAIRS = [(name, granularity) for name in STRATEGIES for granularity in granularities(STRATEGIES[name])]


def scores_of(name: str, model: nn.Module, splits: Splits, seed: int = 0, granularity: str = "channel") -> Scores:
    base = None
    if "base" in STRATEGIES[name].inputs:
        base = localize("weighted_gradient", {}, model, splits, generator=generator(0), base=None)
    stream = generator(seed, "localization")
    return localize(name, {}, model, splits, generator=stream, base=base, granularity=granularity)


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


@pytest.mark.parametrize(("name", "granularity"), PAIRS)
def test_a_mask_holds_exactly_its_budget(name: str, granularity: str, model: nn.Module, splits: Splits) -> None:
    scores = scores_of(name, model, splits)
    for budget in BUDGETS:
        mask = select(scores, budget, granularity, head=head_names(model))
        entries = sum(parameter.numel() for parameter in model.parameters())
        expected = math.floor(Decimal(str(budget)) * entries)  # the decimal that was asked, not its float
        assert (mask.num_entries, mask.num_reset) == (entries, expected), budget
        assert int(chosen(mask).sum()) == expected


@pytest.mark.parametrize(("name", "granularity"), PAIRS)
def test_masks_nest_as_the_budget_grows(name: str, granularity: str, model: nn.Module, splits: Splits) -> None:
    scores = scores_of(name, model, splits)
    masks = [select(scores, budget, granularity, head=head_names(model)) for budget in BUDGETS]
    for smaller, larger in pairwise(masks):
        for parts in ("reset", "trainable"):
            inner, outer = getattr(smaller, parts), getattr(larger, parts)
            assert all((inner[part] <= outer[part]).all() for part in inner)


@pytest.mark.parametrize(("name", "granularity"), PAIRS)
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
        image = splits.forget.images[i].permute(2, 0, 1)[None].double() / 255
        slow.double().zero_grad()
        functional.cross_entropy(slow(image), splits.forget.labels[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        for total, parameter in zip(sums, slow.parameters(), strict=True):
            assert parameter.grad is not None
            total += parameter.grad.numpy() / batch_size
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


def test_as_released_leaves_out_what_does_not_fill_a_batch_and_nothing_else(model: nn.Module, splits: Splits) -> None:
    def found(examples: Examples, size: int, as_released: bool) -> Scores:
        options = {"batch_size": size, "as_released": as_released}
        part = dataclasses.replace(splits, forget=examples)
        return localize("gradient", options, model, part, generator=generator(0), base=None)

    for size in (4, 13):  # whole batches alone, or none: nothing to leave out
        for name, part in found(splits.forget, size, True).items():
            torch.testing.assert_close(part, found(splits.forget, size, False)[name], rtol=1e-3, atol=1e-6)
    kept = torch.randperm(12, generator=generator(0, "released batches"))[:10]
    for name, part in found(splits.forget, 5, True).items():
        torch.testing.assert_close(part, found(splits.forget.take(kept), 5, False)[name], rtol=1e-3, atol=1e-6)


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


BLIND = {"random", "shallowest", "deepest"}  # strategies that look at no value of the model


@pytest.mark.parametrize("name", [n for n in STRATEGIES if "model" in STRATEGIES[n].inputs and n not in BLIND])
def test_scores_that_are_not_finite_are_refused(name: str, model: nn.Module, splits: Splits) -> None:
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))  # type: ignore[index]
    with pytest.raises(ValueError, match=f"strategy {name} .* not finite"):
        scores_of(name, model, splits)


# ---- the rule for a channel's score --------------------------------------------------------------------------------


@pytest.mark.parametrize("h", ["released", "all", 1, 3, 1000, 0.25, 0.01, 0.99])
def test_a_channels_score_is_the_mean_of_its_highest(h: str | int | float) -> None:
    """Against sorted lists: channels in the order of their scores, ties by position."""
    scores = {name: torch.randint(0, 24, s, generator=generator(1, name)).float() / 8 for name, s in SHAPES.items()}
    found = []
    for name, part in scores.items():
        for unit, row in enumerate(part.reshape(len(part), -1).tolist()):
            number = {"released": int(0.1 * len(part)), "all": len(row)}[h] if isinstance(h, str) else h
            number = int(number * len(row)) if isinstance(number, float) else number
            number = min(max(number, 1), len(row))
            found.append((sum(sorted(row, reverse=True)[:number]) / number, name, unit, len(row)))
    start = 0
    ranking = rank(scores, "channel", h)
    for _, name, unit, size in sorted(found, key=lambda item: -item[0]):  # sorted is stable
        assert ranking.ranks[name][unit].flatten().tolist() == list(range(start, start + size))
        start += size


# ---- the further strategies ----------------------------------------------------------------------------------------


def test_depth_takes_whole_layers_from_one_end(model: nn.Module, splits: Splits) -> None:
    layer_of = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
    layers = list(dict.fromkeys(layer_of.values()))
    sizes = dict.fromkeys(layers, 0)
    for name, parameter in model.named_parameters():
        sizes[layer_of[name]] += parameter.numel()
    total = sum(sizes.values())
    for strategy, order in (("shallowest", layers), ("deepest", layers[::-1])):
        scores = scores_of(strategy, model, splits)
        budget = (sizes[order[0]] + sizes[order[1]] + 0.5) / total  # not on a boundary
        for granularity in GRANULARITIES:
            mask = select(scores, budget, granularity, head=frozenset())
            assert {layer_of[name] for name, part in mask.reset.items() if part.any()} == set(order[:2])
        # inside the boundary layer by position: the first entries of its first tensor
        half = select(scores, (sizes[order[0]] + 7.5) / total, "param", head=frozenset())
        first = next(name for name, layer in layer_of.items() if layer == order[1])
        assert half.reset[first].flatten().nonzero().flatten().tolist() == list(range(7))


def test_the_training_sets_gradient_is_the_forget_sets_where_all_is_forgotten(model: nn.Module, splits: Splits) -> None:
    everything = Splits(splits.train, splits.train, splits.retain)
    ours, theirs = (
        scores_of("weighted_gradient_train", model, splits),
        scores_of("weighted_gradient", model, everything),
    )
    other = scores_of("weighted_gradient", model, splits)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], other[name]) for name in ours)


def test_random_takes_whole_channels_or_entries_as_asked(model: nn.Module, splits: Splits) -> None:
    by_channel = scores_of("random", model, splits)
    by_entry = scores_of("random", model, splits, granularity="param")
    for name, part in by_channel.items():
        rows = part.reshape(len(part), -1)
        assert (rows == rows[:, :1]).all()
        assert by_entry[name].unique().numel() > 0.9 * part.numel()
    shares = []
    for seed in range(40):  # no tensor is favoured: each is masked by the budget, on average
        mask = select(scores_of("random", model, splits, seed), 0.3, "channel", head=frozenset())
        shares.append([float(part.float().mean()) for part in mask.reset.values()])
    for share in np.mean(shares, axis=0):
        assert 0.15 < share < 0.45


# ---- CritMem -------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Logits = three pixels, each through its own row: what zeroing a row does is plain to see."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.rows.weight.copy_(torch.diag(torch.tensor([4.0, 3.0, 0.5])))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rows(x.flatten(1)[:, :3])
        return out


def pixels(rows: list[list[int]], labels: list[int]) -> Examples:
    return Examples(torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 3, 1), torch.tensor(labels))


def test_critical_channels_by_hand() -> None:
    """Class 0 hangs on row 0, class 1 on row 1: each falls when its own row is zero. A wrong example needs none."""
    train = pixels([[255, 0, 9], [0, 255, 9], [9, 9, 255]], [0, 1, 2])
    forget = pixels([[255, 0, 9], [200, 0, 9], [0, 255, 9], [0, 255, 9]], [0, 0, 1, 0])

    def found(**options: Any) -> Tensor:
        options |= {"batch_size": 4, "noise": 0.0, "draws": 1}
        scores = localize("critmem", options, Rows(), Splits(train, forget, train), generator=generator(0), base=None)
        return scores["rows.weight"]

    counts = found()
    assert counts[:, 0].floor().tolist() == [2, 1, 0]
    assert (counts == counts[:, :1]).all()
    mask = rank({"rows.weight": counts}, "channel").mask(None, head=frozenset())
    assert mask.reset["rows.weight"].all(dim=1).tolist() == [True, True, False], "its own budget is the union"
    assert mask.num_reset == 6
    assert found(num_examples=1)[:, 0].floor().tolist() == [1, 0, 0]


def test_a_prediction_that_nothing_flips_ends_the_search_with_each_channel_once() -> None:
    """Class 0 wins every tie at zero: all three rows go, once each, and what is zero is not zeroed again."""
    examples = pixels([[255, 0, 0]], [0])
    options = {"batch_size": 2, "noise": 0.0, "draws": 1}
    part = Splits(examples, examples, examples)
    scores = localize("critmem", options, Rows(), part, generator=generator(0), base=None)
    assert scores["rows.weight"][:, 0].floor().tolist() == [1, 1, 1]


def by_search(trained: nn.Module, splits: Splits, rest: int, stream: torch.Generator) -> list[set[tuple[str, int]]]:
    """The critical channels of each forget example from the definition: one loss at a time, one greedy step."""
    sets = []
    for index in range(len(splits.forget)):
        others = splits.train.take(torch.randint(len(splits.train), (rest,), generator=stream))
        images = as_input(torch.cat([splits.forget.images[index : index + 1], others.images]))
        labels = torch.cat([splits.forget.labels[index : index + 1], others.labels])
        copy, gone = clone(trained), set[tuple[str, int]]()
        while copy(images[:1]).argmax() == labels[0] and len(gone) < 100:
            copy.zero_grad()
            losses = [functional.cross_entropy(copy(images[i : i + 1]), labels[i : i + 1]) for i in range(rest + 1)]
            (torch.stack(losses[1:]).sum() / (rest + 1) - losses[0]).backward()  # type: ignore[no-untyped-call]
            candidates = {
                (name, unit): float((p[unit] * p.grad[unit]).sum().detach())
                for name, p in copy.named_parameters()
                for unit in range(len(p))
                if p.grad is not None and (name, unit) not in gone
            }
            name, unit = max(candidates, key=candidates.__getitem__)
            gone.add((name, unit))
            with torch.no_grad():
                copy.get_parameter(name)[unit] = 0
        sets.append(gone)
    return sets


def test_critmem_equals_a_slow_search(model: nn.Module, splits: Splits) -> None:
    trained = fit(model, splits.train, training=Training(0.05, 30, 8), generator=generator(3)).eval()
    sets = by_search(trained, splits, 5, generator(0, "critical channels"))
    assert max(map(len, sets)) > 1, "the toy is too easy: nobody needs two channels"
    options = {"batch_size": 6, "noise": 0.0, "draws": 1}
    found = localize("critmem", options, trained, splits, generator=generator(1), base=None)
    counted = {
        (name, unit): int(rows[unit, 0])
        for name, rows in ((name, part.reshape(len(part), -1)) for name, part in found.items())
        for unit in range(len(rows))
        if rows[unit, 0] >= 1
    }
    assert counted == Counter(place for one in sets for place in one)


def test_only_critmem_has_a_budget_of_its_own_and_it_has_channels_only() -> None:
    assert [name for name in STRATEGIES if has_own_budget(STRATEGIES[name])] == ["critmem"]
    assert granularities(STRATEGIES["critmem"]) == ("channel",)
    with pytest.raises(ValueError, match="granularity of strategy critmem is param; allowed: channel"):
        MaskSpec(strategy=Strategy(name="critmem"), granularity="param", budget=0.1)
    with pytest.raises(ValueError, match="strategy gradient has no budget of its own"):
        MaskSpec(strategy=Strategy(name="gradient"), granularity="param", budget=None)
