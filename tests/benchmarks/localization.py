"""Masks for a ResNet-18 at six budgets, ours against the released way, both from one pass of scores.

Released with SalUn and DEL: for every budget, all entries are concatenated, sorted by two full argsorts (the second
turns the order into ranks), and cut into tensors again; for channels every entry first gets its channel's score.
`python -m tests.benchmarks.localization`
"""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from orchestrator.localization import rank
from orchestrator.models import factory
from orchestrator.seeds import generator

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


def released(scores: Mapping[str, Tensor], budget: float, granularity: str) -> dict[str, Tensor]:
    """One mask as the released code makes it."""
    spread = {}
    for name, part in scores.items():
        spread[name] = part
        if granularity == "channel" and part.ndim > 1:
            rows = part.flatten(1)
            h = min(max(1, int(0.1 * len(rows))), rows.shape[1])
            mean = rows.sort(dim=1, descending=True).values[:, :h].mean(dim=1)
            spread[name] = mean.view(-1, *[1] * (part.ndim - 1)).expand_as(part)
    flat = torch.cat([part.flatten() for part in spread.values()])
    positions = torch.argsort(flat, descending=True, stable=True)
    ranks = torch.argsort(positions)
    chosen = ranks < int(budget * len(flat))
    pieces = torch.split(chosen, [part.numel() for part in scores.values()])
    return {name: piece.view(part.shape) for (name, part), piece in zip(scores.items(), pieces, strict=True)}


def ours(scores: Mapping[str, Tensor], granularity: str) -> list[Mapping[str, Tensor]]:
    """All masks from one ranking."""
    ranking = rank(scores, granularity)
    return [ranking.mask(budget, head=frozenset()).reset for budget in BUDGETS]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    model = factory("resnet18", {}, (3, 32, 32), 10)(generator(0))
    scores = {name: torch.rand(p.shape, generator=generator(1, name)) for name, p in model.named_parameters()}
    for granularity in ("channel", "param"):
        for mine, budget in zip(ours(scores, granularity), BUDGETS, strict=True):
            theirs = released(scores, budget, granularity)
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs), "not the same masks"
        fast, slow = [], []
        for _ in range(3):
            slow.append(seconds(lambda: [released(scores, budget, granularity) for budget in BUDGETS]))  # noqa: B023
            fast.append(seconds(lambda: ours(scores, granularity)))  # noqa: B023
        print(
            f"{granularity}: {len(BUDGETS)} masks of a ResNet-18: ours {median(fast):.2f} s, "
            f"two argsorts a budget {median(slow):.2f} s, ratio {median(slow) / median(fast):.1f}"
        )


if __name__ == "__main__":
    main()
