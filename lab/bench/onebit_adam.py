"""1-bit Adam (Tang et al. 2021) in plain torch, as DeepSpeed had it until September 2026; for comparisons only.

Adam with all-reduced gradients for `freeze_step` steps, without bias correction. Then the variance is constant, and the
momentum of each worker travels in one bit a coordinate with a scale for each tensor, with error feedback on the workers
and on the owner of each chunk ("server"). DeepSpeed's ran on GPUs only; this one runs on any process group.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class OneBitAdam(torch.optim.Optimizer):
    """1-bit Adam over the default process group; gradients are each worker's own. `sent` counts this worker's bytes.

    Bytes are those of a ring all-reduce before `freeze_step`. Afterwards each worker sends one bit a coordinate to the
    owners of the other chunks, and its own chunk's mean to all; scales are not counted.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        freeze_step: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.freeze_step, self.steps, self.sent = freeze_step, 0, 0.0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Apply one update; collective."""
        workers = dist.get_world_size()
        frozen, self.steps = self.steps >= self.freeze_step, self.steps + 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update({name: torch.zeros_like(p) for name in ("m", "v", "worker_error", "server_error")})
                m, v = state["m"], state["v"]

                # The momentum, with the variance before it is frozen.
                if not frozen:
                    dist.all_reduce(p.grad)
                    p.grad /= workers
                    v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                if frozen:
                    m.copy_(mean_of_signs(m, state["worker_error"], state["server_error"]))
                self.sent += 2 * (workers - 1) / workers * p.numel() * (1 / 8 if frozen else 4)

                p -= group["lr"] * (m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p)


def mean_of_signs(m: Tensor, worker_error: Tensor, server_error: Tensor) -> Tensor:
    """Return the mean of m over workers, compressed to signs by workers and by owners; updates both errors in place.

    Every worker computes all owners' chunks from one all-reduce: the numbers are those of DeepSpeed's two phases.
    """
    mean = compressed(m, worker_error)
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    chunks = zip(*(t.view(-1).chunk(dist.get_world_size()) for t in (mean, server_error)), strict=True)
    return torch.cat([compressed(chunk, error) for chunk, error in chunks]).view_as(m)


def compressed(vector: Tensor, error: Tensor) -> Tensor:
    """Return the signs of vector + error, scaled to its root mean square; the residual becomes the error, in place."""
    error += vector
    sent = torch.where(error >= 0, 1.0, -1.0) * error.square().mean().sqrt()
    error -= sent
    return sent
