import copy

import pytest
import torch
from torch import nn

from orchestrator.descent import Descent
from orchestrator.seeds import generator


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_descent_equals_torch_to_the_bit(momentum: float, weight_decay: float) -> None:
    stream = generator(0)
    network = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(28, 5))
    ours = list(network.to(memory_format=torch.channels_last).parameters())
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    optimizer, rival = Descent(ours, **options), torch.optim.SGD(theirs, **options)
    for step in range(8):
        optimizer.zero_grad(set_to_none=True)
        rival.zero_grad(set_to_none=True)
        assert all(parameter.grad is None for parameter in ours)
        for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            # one has no gradient at first, one now and then, and one step has none at all
            if step == 5 or (place == 1 and step < 3) or (place == 2 and step % 2):
                continue
            mine.grad = torch.randn(mine.shape, generator=stream) * 10.0 ** (step - 4)
            other.grad = mine.grad.clone()
        for group, other_group in zip(optimizer.param_groups, rival.param_groups, strict=True):
            group["lr"] = other_group["lr"] = 0.1 / (step + 1)
        gradients = [None if p.grad is None else p.grad.clone() for p in ours]
        for _ in range(2):  # twice on the same gradients: neither may keep them as its own
            optimizer.step()
            rival.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
        kept = [p.grad for p in ours]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
