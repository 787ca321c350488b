import pytest
import torch
from torch import nn

from orchestrator.models import MODELS, factory, head_names
from orchestrator.registry import InputError
from orchestrator.seeds import generator

SHAPES = {"small_cnn": (1, 8, 8)}  # what else is registered gets CIFAR's


def shape_of(name: str) -> tuple[int, int, int]:
    return SHAPES.get(name, (3, 32, 32))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_maps_images_to_class_logits(name: str) -> None:
    model = factory(name, {}, shape_of(name), 7)(generator(0)).eval()
    with torch.no_grad():
        logits = model(torch.rand(5, *shape_of(name)))
    assert logits.shape == (5, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", MODELS)
def test_one_stream_gives_one_initialization_and_leaves_the_global_one_alone(name: str) -> None:
    fresh = factory(name, {}, shape_of(name), 3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = fresh(generator(0, "a")), fresh(generator(0, "a")), fresh(generator(0, "b"))
    assert torch.equal(torch.rand(3), expected)
    assert same(first, again)
    assert not same(first, other)
    stream = generator(0, "a")
    assert not same(fresh(stream), fresh(stream))


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_the_layer_that_gives_the_logits(name: str) -> None:
    model = factory(name, {}, shape_of(name), 7)(generator(0)).eval()
    head = head_names(model)
    parameters = dict(model.named_parameters())
    assert {len(parameters[part]) for part in head} == {7}
    with torch.no_grad():
        for part in head:
            parameters[part].zero_()
        assert not model(torch.rand(2, *shape_of(name))).any()


def test_the_head_of_a_model_without_or_with_nothing_but_a_linear_layer() -> None:
    assert head_names(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())) == frozenset()
    assert head_names(nn.Linear(3, 2)) == {"weight", "bias"}


def test_the_head_is_the_last_of_several_linear_layers() -> None:
    layers = [nn.Linear(4, 4) for _ in range(11)]
    assert head_names(nn.Sequential(*layers)) == {"10.weight", "10.bias"}
    # "1" is a prefix of "10", which is no linear layer
    behind = [nn.BatchNorm1d(4) for _ in range(9)]
    assert head_names(nn.Sequential(*layers[:2], *behind)) == {"1.weight", "1.bias"}


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_sizes_are_those_documented() -> None:
    assert num_parameters(factory("small_cnn", {}, (1, 8, 8), 10)(generator(0))) == 14_458
    # ResNet-9 of width 64 on CIFAR-10, layer by layer: 3x3 convolutions without bias, two numbers of batch norm
    # per channel, a linear layer with bias
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    expected = sum(9 * a * b + 2 * b for a, b in convolutions) + 512 * 10 + 10
    assert num_parameters(factory("resnet9", {}, (3, 32, 32), 10)(generator(0))) == expected


def test_unknown_models_and_options_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'resnet9'"):
        factory("resnet99", {}, (3, 32, 32), 10)
    with pytest.raises(InputError, match="did you mean 'width'"):
        factory("resnet9", {"widht": 8}, (3, 32, 32), 10)
