"""Methods in which a model learns from others: to leave its teacher on the forget set, to stay by it elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples
from orchestrator.models import Factory
from orchestrator.registry import Count, Natural, NonNegative, Positive, PositiveShare, ShareBelowOne
from orchestrator.training import Mask, Phase, Report, Training, clone, fit
from orchestrator.unlearning.base import METHODS


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean KL(teacher || student) of softened logits [n, classes], times the square of the temperature."""
    softened = (
        functional.log_softmax(student / temperature, dim=1),
        functional.log_softmax(teacher / temperature, dim=1),
    )
    return functional.kl_div(*softened, reduction="batchmean", log_target=True) * temperature**2


@METHODS
def scrub(
    model: nn.Module,
    mask: Mask | None,
    forget: Examples,
    retain: Examples,
    generator: torch.Generator,
    report: Report,
    *,
    lr: NonNegative = 5e-3,
    epochs: Count = 5,
    max_epochs: Natural = 4,
    temperature: Positive = 4.0,
    gamma: NonNegative = 0.99,
    alpha: NonNegative = 0.001,
    batch_size: Count = 128,
    forget_batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
) -> nn.Module:
    """SCRUB: away from the original on the forget set, then back to it on the retain set (Kurmanji et al. 2023).

    Each of the first `max_epochs` epochs begins with ascent on KL to the original over the forget set; every epoch
    descends gamma x cross-entropy + alpha x KL over the retain set. Rate, epochs, max_epochs and temperature as in
    RUM; for gamma, alpha and the batch sizes no source is at hand. Constant rate.
    """
    teacher = clone(model).eval()

    def away(net: nn.Module, images: Tensor, _: Tensor) -> Tensor:
        return -divergence(net(images), _taught(teacher, images), temperature)

    def back(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = net(images)
        near = divergence(logits, _taught(teacher, images), temperature)
        return gamma * functional.cross_entropy(logits, labels) + alpha * near

    def phases(epoch: int) -> Sequence[Phase]:
        first = [Phase(forget, away, forget_batch_size)] if epoch < max_epochs else []
        return [*first, Phase(retain, back)]

    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=1.0)
    return fit(clone(model), phases, training=training, generator=generator, mask=mask, report=report)


@METHODS
def bad_teacher(
    model: nn.Module,
    mask: Mask | None,
    forget: Examples,
    retain: Examples,
    fresh: Factory,
    generator: torch.Generator,
    report: Report,
    *,
    lr: NonNegative = 0.01,
    epochs: Count = 5,
    retain_share: PositiveShare = 0.3,
    temperature: Positive = 1.0,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
) -> nn.Module:
    """Bad teacher: KL to an untrained model on the forget set, to the original elsewhere (Chundawat et al. 2023).

    Both kinds of examples are shuffled together; `retain_share` of the retain set takes part, drawn once. No source
    for the defaults is at hand; the published optimizer is Adam, this is SGD at a constant rate.
    """
    teachers = clone(model).eval(), fresh(generator).eval()
    count = max(1, round(retain_share * len(retain)))
    kept = retain.take(torch.randperm(len(retain), generator=generator)[:count])
    marks = [torch.full((len(part),), mark, device=retain.labels.device) for mark, part in enumerate((kept, forget))]
    both = kept.followed_by(forget).relabelled(torch.cat(marks))  # labels say which teacher

    def objective(net: nn.Module, images: Tensor, bad: Tensor) -> Tensor:
        good, poor = (_taught(teacher, images) for teacher in teachers)
        return divergence(net(images), torch.where(bad[:, None] == 1, poor, good), temperature)

    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=1.0)
    return fit(
        clone(model), both, training=training, generator=generator, mask=mask, objective=objective, report=report
    )


@torch.no_grad()
def _taught(teacher: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = teacher(images)
    return logits
