"""The network for speed: its sizes, its fixed first layer, how it begins."""

import math

import pytest
import torch
from torch.nn import functional

from orchestrator.models import factory
from orchestrator.models.airbench import Whitening, patch_basis
from orchestrator.seeds import generator


def test_the_sizes_of_airbench_are_those_of_the_original_less_what_is_fixed() -> None:
    convolutions = [(24, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)]
    expected = sum(9 * a * b + b for a, b in convolutions) + 12 + 256 * 10  # weights, shifts, patches' shifts, head
    model = factory("airbench", {}, (3, 32, 32), 10)(generator(0))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_patches_are_turned_and_nothing_of_them_is_lost(channels: int) -> None:
    basis = patch_basis(channels).flatten(1).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(4 * channels, dtype=torch.float64), atol=1e-6, rtol=0)
    flat = torch.ones(1, channels, 2, 2)
    found = functional.conv2d(flat, patch_basis(channels)).flatten()
    assert found[0] == pytest.approx(math.sqrt(4 * channels))  # the mean comes first,
    torch.testing.assert_close(found[1:], torch.zeros(4 * channels - 1), atol=1e-6, rtol=0)  # and alone sees it


def test_whitened_patches_of_natural_images_are_nearly_uncorrelated() -> None:
    """As those of eigenvectors would be: on smooth random images, whose neighbouring pixels are alike."""
    noise = torch.randn(64, 3, 40, 40, generator=generator(0))
    images = functional.avg_pool2d(noise, 9, stride=1) + 2 * functional.avg_pool2d(noise.mean(1, True), 9, stride=1)
    net = Whitening(3).train()
    responses = net.norm(functional.conv2d(images, net.basis)).transpose(0, 1).flatten(1)
    raw = functional.unfold(images, 2).transpose(0, 1).flatten(1)
    assert torch.corrcoef(raw).fill_diagonal_(0).abs().max() > 0.8
    assert torch.corrcoef(responses).fill_diagonal_(0).abs().max() < 0.1
    torch.testing.assert_close(responses.var(1, correction=0), torch.ones(12), atol=0.07, rtol=0)


def test_a_new_airbench_hands_its_first_channels_on() -> None:
    model = factory("airbench", {"width": 32}, (3, 32, 32), 10)(generator(0))
    conv = model.get_submodule("group1.conv1")
    x = torch.rand(2, 24, 7, 7)
    torch.testing.assert_close(conv(x)[:, :24], x)


def test_logits_of_airbench_are_scaled_down() -> None:
    model = factory("airbench", {"width": 8}, (3, 32, 32), 10)(generator(0)).eval()
    seen: list[torch.Tensor] = []
    model.get_submodule("head").register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        torch.testing.assert_close(model(torch.rand(2, 3, 32, 32)), seen[0] / 9)
