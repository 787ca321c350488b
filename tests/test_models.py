import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from orchestrator.data import Examples
from orchestrator.models import MODELS, factory, head_names
from orchestrator.models.vit import LocalAttention, Shifts, moves, patches, shifted
from orchestrator.registry import InputError
from orchestrator.seeds import generator
from orchestrator.training import Training, clone, fit

SHAPES = {"small_cnn": (1, 8, 8)}  # what else is registered gets CIFAR's
TORCHVISION = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}


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
    assert 7 in {len(parameters[part]) for part in head}
    assert hasattr(model, "head_prefix") or {len(parameters[part]) for part in head} == {7}
    with torch.no_grad():
        for part in head:
            parameters[part].zero_()
        assert not model(torch.rand(2, *shape_of(name))).any()


@pytest.mark.parametrize("name", MODELS)
def test_convolutions_are_channels_last_and_the_rest_is_contiguous(name: str) -> None:
    model = factory(name, {}, shape_of(name), 3)(generator(0))
    for parameter in model.parameters():
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        assert parameter.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_the_layout(name: str) -> None:
    model = factory(name, {}, shape_of(name), 3)(generator(0)).double().eval()
    plain = clone(model).to(memory_format=torch.contiguous_format)
    images = torch.rand(2, *shape_of(name), generator=generator(1), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), plain(images))


def test_all_models_but_the_plain_transformer_are_made_without_torchvision() -> None:
    others = sorted(set(MODELS) - {"vit"})
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import torch\n"
        "from orchestrator.models import factory\n"
        f"for name in {others}: factory(name, {{}}, (3, 32, 32), 2)(torch.Generator())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


# ---- residual networks against torchvision's -----------------------------------------------------------------------


def theirs(name: str, small: bool, num_classes: int = 10) -> nn.Module:
    """torchvision's network, changed for small images as the code of DEL changes it."""
    net: nn.Module = TORCHVISION[name](num_classes=num_classes)
    if small:
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


@pytest.mark.parametrize(("stem", "side"), [("small", 32), ("standard", 64), ("auto", 32), ("auto", 64)])
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_resnet_is_torchvisions(name: str, stem: str, side: int) -> None:
    ours = factory(name, {"stem": stem}, (3, side, side), 10)(generator(0))
    reference = theirs(name, side == 32).to(memory_format=torch.channels_last)
    assert [(n, t.shape) for n, t in ours.state_dict().items()] == [
        (n, t.shape) for n, t in reference.state_dict().items()
    ]
    reference.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, side, side, generator=generator(1)).to(memory_format=torch.channels_last)
    for mode in (False, True):
        ours.train(mode)
        reference.train(mode)
        assert torch.equal(ours(images), reference(images))


@pytest.mark.parametrize("stem", ["small", "standard"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_resnet_begins_as_torchvisions_does(name: str, stem: str) -> None:
    torch.manual_seed(3)
    reference = theirs(name, stem == "small")
    torch.manual_seed(3)
    ours = MODELS[name]({"image_shape": (3, 64, 64), "num_classes": 10}, {"stem": stem})
    assert same(ours, reference)


@pytest.mark.parametrize(
    ("height", "width", "small"), [(63, 63, True), (63, 64, True), (64, 63, True), (64, 64, False)]
)
def test_the_stem_is_the_small_one_where_a_side_is_under_64_pixels(height: int, width: int, small: bool) -> None:
    model = factory("resnet18", {}, (3, height, width), 2)(generator(0))
    assert dict(model.named_parameters())["conv1.weight"].shape[-1] == (3 if small else 7)


def test_the_convolutions_of_vgg16_are_torchvisions() -> None:
    ours = factory("vgg16", {}, (3, 32, 32), 10)(generator(0)).get_submodule("features")
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    reference = layers.to(memory_format=torch.channels_last)
    assert list(ours.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 64, 64, generator=generator(1)).to(memory_format=torch.channels_last)
    for mode in (False, True):
        assert torch.equal(ours.train(mode)(images), reference.train(mode)(images))


def test_the_convolutions_of_vgg16_begin_at_the_spread_that_torchvision_gives_them() -> None:
    modules = factory("vgg16", {}, (3, 32, 32), 10)(generator(0)).modules()
    for layer in (module for module in modules if isinstance(module, nn.Conv2d)):
        assert layer.bias is not None
        assert not layer.bias.any()
        # kaiming-normal by fan-out; the fewest weights, 1,728, give their deviation to 1.7%
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * layer.out_channels)), rel=0.07)


def test_resnet18_on_cifar_has_the_parameters_of_the_paper() -> None:
    assert num_parameters(factory("resnet18", {}, (3, 32, 32), 10)(generator(0))) == 11_173_962


# ---- transformers --------------------------------------------------------------------------------------------------


def test_the_parameters_of_the_small_data_vit_by_hand() -> None:
    patches, length, inner = 16, 5 * 3 * 8 * 8, 8 * 64
    tokens = 2 * length + length * 512 + 512  # layer norm, projection
    positions = (patches + 1) * 512 + 512  # and the class token
    attention = 1 + 2 * 512 + 512 * 3 * inner + inner * 512 + 512  # temperature, norm, q k v without bias, output
    feed_forward = 2 * 512 + 512 * 1536 + 1536 + 1536 * 512 + 512
    head = 2 * 512 + 512 * 10 + 10
    expected = tokens + positions + 4 * (attention + feed_forward) + head
    model = factory("vit_small_data", {}, (3, 32, 32), 10)(generator(0))
    assert num_parameters(model) == expected
    assert head_names(model) == {"mlp_head.0.weight", "mlp_head.0.bias", "mlp_head.1.weight", "mlp_head.1.bias"}


def test_local_attention_equals_a_loop_over_queries() -> None:
    torch.manual_seed(0)
    layer = LocalAttention(dim=6, heads=2, dim_head=3, dropout=0.0).double()
    with torch.no_grad():
        layer.temperature.fill_(0.3)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    normed = functional.layer_norm(x, (6,), layer.norm.weight, layer.norm.bias)
    q, k, v = (normed @ layer.to_qkv.weight.T).chunk(3, dim=-1)
    expected = torch.zeros(2, 5, 6, dtype=torch.float64)
    for n in range(2):
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            for i in range(5):
                others = [j for j in range(5) if j != i]  # no token looks at itself
                scores = torch.stack([q[n, i, part] @ k[n, j, part] for j in others]) / math.exp(0.3)
                weights = scores.softmax(0)
                expected[n, i, part] = sum(w * v[n, j, part] for w, j in zip(weights, others, strict=True))
    out = layer.to_out[0]
    torch.testing.assert_close(layer(x), expected @ out.weight.T + out.bias)


def test_the_small_data_vit_equals_its_formula_written_out() -> None:
    options = {"patch_size": 4, "dim": 6, "depth": 2, "heads": 2, "dim_head": 3, "mlp": 5}
    model = factory("vit_small_data", options, (2, 8, 12), 4)(generator(0)).double().eval()
    p = dict(model.named_parameters())

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        spread = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return spread * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = torch.rand(3, 2, 8, 12, generator=generator(1), dtype=torch.float64)
    stack = torch.cat([x, *(torch.zeros_like(x) for _ in range(4))], dim=1)
    stack[:, 2:4, :, 1:], stack[:, 4:6, :, :-1] = x[..., :-1], x[..., 1:]  # right, left
    stack[:, 6:8, 1:], stack[:, 8:10, :-1] = x[:, :, :-1], x[:, :, 1:]  # down, up
    squares = [stack[:, :, r : r + 4, c : c + 4].permute(0, 2, 3, 1).flatten(1) for r in (0, 4) for c in (0, 4, 8)]
    tokens = linear(norm(torch.stack(squares, dim=1), "to_tokens.norm"), "to_tokens.project")
    tokens = torch.cat([p["cls_token"].expand(3, 1, 6), tokens], dim=1) + p["pos_embedding"]
    for block in ("blocks.0", "blocks.1"):
        assert p[f"{block}.0.temperature"].exp().item() == pytest.approx(math.sqrt(3))  # begins at the usual scale
        q, k, v = (norm(tokens, f"{block}.0.norm") @ p[f"{block}.0.to_qkv.weight"].T).chunk(3, dim=-1)
        heads = []
        for part in (slice(0, 3), slice(3, 6)):
            scores = (q[..., part] @ k[..., part].mT / p[f"{block}.0.temperature"].exp()).exp() * (1 - torch.eye(7))
            heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., part])
        tokens = tokens + linear(torch.cat(heads, dim=-1), f"{block}.0.to_out.0")
        hidden = linear(norm(tokens, f"{block}.1.0"), f"{block}.1.1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + linear(hidden, f"{block}.1.4")
    torch.testing.assert_close(model(x), linear(norm(tokens[:, 0], "mlp_head.0"), "mlp_head.1"))


def test_dropout_acts_in_training_alone() -> None:
    options = {"patch_size": 4, "dim": 16, "depth": 1, "mlp": 8}
    plain, dropping = (
        factory("vit_small_data", {**options, "dropout": share}, (1, 8, 8), 3)(generator(0)) for share in (0.0, 0.5)
    )
    images = torch.rand(2, 1, 8, 8, generator=generator(1))
    assert torch.equal(dropping.eval()(images), plain(images))
    assert not torch.equal(dropping.train()(images), plain(images))


def test_the_parameters_of_the_plain_transformer_by_hand() -> None:
    options = {"patch_size": 8, "dim": 12, "depth": 2, "heads": 4, "mlp": 20}
    tokens = 3 * 8 * 8 * 12 + 12 + 12 + 17 * 12  # projection, class token, positions
    block = 2 * 2 * 12 + 4 * (12 * 12 + 12) + 12 * 20 + 20 + 20 * 12 + 12  # two norms, attention, two linear layers
    model = factory("vit", options, (3, 32, 32), 5)(generator(0))
    assert num_parameters(model) == tokens + 2 * block + 2 * 12 + 12 * 5 + 5


@pytest.mark.parametrize(("pooling", "weight"), [("class_token", [1, 0, 0, 0, 0]), ("mean", [0.2] * 5)])
def test_the_head_sees_the_class_token_or_the_mean_of_all(pooling: str, weight: list[float]) -> None:
    options = {"patch_size": 4, "dim": 16, "depth": 1, "mlp": 8, "pooling": pooling}
    model = factory("vit_small_data", options, (1, 8, 8), 3)(generator(0)).eval()
    last = model.get_submodule("blocks.0.1")
    seen: list[torch.Tensor] = []
    last.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0] + output))
    with torch.no_grad():
        logits = model(torch.rand(2, 1, 8, 8, generator=generator(1)))
        expected = model.get_submodule("mlp_head")(torch.einsum("ntd,t->nd", seen[0], torch.tensor(weight).float()))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("shifts", "patch_size", "expected"),
    [
        ("half_patch", 4, {(2, 2), (2, -2), (-2, 2), (-2, -2)}),
        ("half_patch", 7, {(3, 3), (3, -3), (-3, 3), (-3, -3)}),
        ("pixel", 4, {(0, 1), (0, -1), (1, 0), (-1, 0)}),
    ],
)
def test_the_shifts_stand_beside_the_image_and_let_zeros_in(
    shifts: Shifts, patch_size: int, expected: set[tuple[int, int]]
) -> None:
    image = 1 + torch.arange(2.0 * 8 * 9).view(1, 2, 8, 9)
    parts = shifted(image, moves(shifts, patch_size))[0].split(2)
    assert torch.equal(parts[0], image[0])
    found = set()
    for part in parts[1:]:
        y, x = (part[0] == image[0, 0, 4, 4]).nonzero()[0].tolist()
        found.add((y - 4, x - 4))
        for row in range(8):
            for column in range(9):
                source = row - (y - 4), column - (x - 4)
                inside = 0 <= source[0] < 8 and 0 <= source[1] < 9
                assert torch.equal(part[:, row, column], image[0, :, *source] if inside else torch.zeros(2))
    assert found == expected


def test_patches_hold_the_pixels_of_their_square() -> None:
    image = torch.rand(2, 3, 4, 6)
    cut = patches(image, 2)
    assert cut.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            square = image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(cut[:, 3 * row + column].sort().values, square.flatten(1).sort().values)


@pytest.mark.parametrize(
    ("name", "options", "shape", "words"),
    [
        ("vit_small_data", {"patch_size": 8}, (1, 28, 28), "patch_size is 8, images are 28x28; allowed: a divisor"),
        ("vit", {}, (3, 30, 30), "patch_size is 4"),
        ("vit", {}, (1, 32, 32), "allowed: three channels, square"),
        ("vit", {"dim": 100, "heads": 3}, (3, 32, 32), "allowed: a dim that heads divides"),
        ("vgg16", {}, (3, 28, 28), "images are 28x28; allowed: 32 pixels a side or more"),
        ("small_cnn", {}, (1, 1, 8), "images are 1x8; allowed: 2 pixels"),
        ("resnet9", {}, (3, 7, 32), "images are 7x32; allowed: 8 pixels"),
        ("airbench", {}, (3, 8, 32), "images are 8x32; allowed: 9 pixels"),
        ("resnet18", {}, (1, 7, 7), "images are 7x7; allowed: 8 pixels"),
        ("vit_small_data", {}, (3, 32, 28), "patch_size is 8, images are 32x28"),
        ("vit_small_data", {"patch_size": 40}, (3, 32, 32), "patch_size is 40"),
        ("resnet18", {"stem": "standard"}, (1, 28, 28), "allowed: 32 pixels"),
        ("resnet50", {"stem": "standard"}, (3, 28, 28), "allowed: 32 pixels"),
    ],
)
def test_images_that_a_model_cannot_take_are_refused(
    name: str, options: dict[str, object], shape: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        factory(name, options, shape, 10)(generator(0))


SMALLEST = {"small_cnn": 2, "resnet9": 8, "airbench": 9, "resnet18": 8, "resnet50": 8, "vgg16": 32}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_images_allowed_train(name: str) -> None:
    shape = (1, SMALLEST[name], SMALLEST[name])
    model = factory(name, {}, shape, 3)(generator(0)).train()
    assert model(torch.rand(2, *shape)).shape == (2, 3)


# ---- the pairs of the paper, and others ----------------------------------------------------------------------------

PAIRS = [
    ("resnet18", {}, (3, 32, 32), 10),  # CIFAR-10
    ("vit_small_data", {}, (3, 32, 32), 10),  # SVHN
    ("resnet50", {}, (3, 128, 128), 100),  # ImageNet-100
    ("resnet50", {}, (3, 32, 32), 100),  # CIFAR-100
    ("resnet18", {}, (1, 28, 28), 10),  # Fashion-MNIST
    ("vit_small_data", {"patch_size": 7}, (1, 28, 28), 10),
    ("vit_small_data", {"shifts": "half_patch"}, (3, 32, 32), 10),
    ("vgg16", {}, (3, 32, 32), 10),
    ("vit", {}, (3, 32, 32), 10),
    ("airbench", {}, (3, 32, 32), 10),
    ("airbench", {"width": 8}, (1, 28, 28), 10),
]


@pytest.mark.parametrize(("name", "options", "shape", "num_classes"), PAIRS)
def test_two_steps_of_training_move_every_parameter(
    name: str, options: dict[str, object], shape: Any, num_classes: int
) -> None:
    """Two, since the head of the plain transformer begins at zero and lets no gradient through in the first."""
    model = factory(name, options, shape, num_classes)(generator(0))
    channels, height, width = shape
    images = torch.randint(256, (2, height, width, channels), generator=generator(1), dtype=torch.uint8)
    training = Training(learning_rate=0.01, epochs=2, batch_size=2, final=1.0)
    trained = fit(
        clone(model), Examples(images, torch.tensor([0, num_classes - 1])), training=training, generator=generator(2)
    )
    for (parameter, before), after in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert not torch.equal(before, after), parameter
        assert torch.isfinite(after).all(), parameter
