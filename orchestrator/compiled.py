"""One model object whose compiled loss serves every subset model of a worker; eager, with a warning, where it fails."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from orchestrator.data import Examples
from orchestrator.training import Objective, Training, as_input, autocast_of, cross_entropy

BACKEND = "inductor"
TRIALS = 3  # torch warms up, records and replays a CUDA graph: whatever fails, fails in these


class Reused:
    """A model that is compiled once, and takes the weights of others.

    Compiled is the loss, and with it its gradient; on cuda as CUDA graphs ("reduce-overhead"). Weights are copied in
    place, so that a second model costs no compilation and graphs find them where they were. What compiling needs to
    see is shown to the model before it has weights that matter: trials move neither weights nor a random stream.
    """

    def __init__(self, model: nn.Module, training: Training, examples: Examples) -> None:
        """Compile for batches as `training` takes them from `examples`, which are looked at for their shape alone."""
        self.model = model.train()
        self._on_cuda = next(model.parameters()).is_cuda
        torch._dynamo.reset()  # what was compiled for another model counts against torch's limit
        mode = "reduce-overhead" if self._on_cuda else None
        self._loss: Objective = torch.compile(cross_entropy, fullgraph=True, dynamic=False, backend=BACKEND, mode=mode)
        self.mode = "compiled"
        try:
            self._try(training, examples)
        except Exception as error:  # compilers fail in many ways, and training goes on without one
            self._loss, self.mode = cross_entropy, "eager"
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            warnings.warn(f"subset models are trained without compiling: {reason}", RuntimeWarning, stacklevel=2)

    def loaded(self, other: nn.Module) -> nn.Module:
        """The model, with the weights and buffers of another; who had it before has it no more."""
        self.model.load_state_dict(other.state_dict())
        return self.model

    def objective(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of one batch, for `fit`."""
        if self._on_cuda and self.mode == "compiled":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._loss(model, images, labels)

    def _try(self, training: Training, examples: Examples) -> None:
        device = examples.labels.device
        first = torch.arange(training.batch_size, device=device) % len(examples)
        images, labels = as_input(examples.images[first]), examples.labels[first]
        autocast = autocast_of(device, training.precision)
        # a worker has one core: torch would start a process per core of the machine for each worker, to compile in
        from torch._inductor import config as inductor  # takes a second: for those who compile

        one_thread = inductor.patch(compile_threads=1)
        with one_thread, torch.random.fork_rng([device] if self._on_cuda else []):
            for _ in range(TRIALS):
                with autocast():
                    loss = self.objective(self.model, images, labels)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self.model.zero_grad(set_to_none=True)
        if self._on_cuda:
            torch.cuda.synchronize(device)


ENOUGH = 100  # models of a campaign for which about a minute of each worker is worth it


def pays(device: str, models: int) -> bool:
    """Whether compiling is worth it for a campaign of so many models: on cuda, for a hundred or more.

    The campaign decides, not what is missing of it or how many workers there are: else one that was interrupted would
    go on in other numerics. On a CPU it brought nothing (ResNet-9, one thread), so there it is for those who ask.
    """
    return device.startswith("cuda") and models >= ENOUGH
