"""Computation of the gradients of all simulated workers in one pass through the network."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from lab.runs.config import Config
from lab.tasks.models import Task, WorkerBatchNorm2d
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.simulation import SimulatedGroup

Tensors = dict[str, Tensor]


def why_not_batched(config: Config) -> str:
    """Return the reason why a run's gradients cannot be computed in one pass; "" if they can."""
    if config.local is not None:
        return "local: workers have an x each, and batched gradients are all at one x"
    if config.model.name.startswith("resnet") and config.model.norm == "worker":
        return "model.norm = 'worker': workers have running statistics each, and batched gradients have one set"
    return ""


class BatchedGradients:
    """The gradients of the W workers of a serial simulation, computed together by `torch.func.vmap` over their batches.

    All workers must have equal parameters. The gradients equal those of W separate passes up to rounding. Batch
    normalization over all workers shares its running statistics between the workers' models. The ledger of each worker
    counts the bytes that its exchanges would have sent.
    """

    def __init__(
        self,
        task: Task,
        group: SimulatedGroup,
        batch: Callable[[Tensor], tuple[Tensor, Tensor]],
        channel: Communicator,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self._task, self._group, self._batch, self._channel = task, group, batch, channel
        self._autocast = autocast
        self._parameters = dict(task.named_parameters())
        self._norms = [module for module in task.modules() if isinstance(module, WorkerBatchNorm2d)]
        shared = group.computed_at_once(torch.zeros(0), lambda _: [dict(task.named_buffers())] * group.size)
        for name, buffer in shared.items():
            owner, _, attribute = name.rpartition(".")
            setattr(task.get_submodule(owner), attribute, buffer)

    def evaluate(self, index: Tensor) -> Tensor:
        """Set `.grad` to the gradients of this worker's mean loss on examples `index`, int64[b]; return the loss."""
        loss, gradients = self._group.computed_at_once(index, self._of_all)
        for name, p in self._parameters.items():
            # The gradient needs the parameter's memory format, so that it can be a view of the optimizer's flat vector.
            last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            p.grad = gradients[name].contiguous(memory_format=layout)
        for norm in self._norms:
            for _ in ("forward", "backward"):
                # A layer exchanges two moments of each channel.
                self._channel.count_mean(norm.weight.expand(2, -1), "batch norm")
        return loss

    def _of_all(self, indices: list[Tensor]) -> Sequence[tuple[Tensor, Tensors]]:
        together = self._batch(torch.cat(indices))
        inputs, targets = (t.view(len(indices), -1, *t.shape[1:]) for t in together)
        # Use contiguous parameters, since channels_last is slower under vmap and causes warnings.
        parameters = {name: p.detach().contiguous() for name, p in self._parameters.items()}
        of_each = vmap(grad_and_value(self._loss), in_dims=(None, None, 0, 0))
        gradients, losses = of_each(parameters, dict(self._task.named_buffers()), inputs, targets)
        return [(losses[w], {name: g[w] for name, g in gradients.items()}) for w in range(len(indices))]

    def _loss(self, parameters: Tensors, buffers: Tensors, inputs: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            loss: Tensor = functional_call(self._task, {**parameters, **buffers}, (inputs, targets))
        return loss
