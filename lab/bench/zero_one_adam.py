"""0/1 Adam (Lu et al. 2022) in plain torch, as DeepSpeed had it until September 2026; for comparisons only.

Until `freeze_step` the variance is updated at intervals that double after `variance_scaler` updates, from all-reduced
gradients; between them gradients travel in one bit a coordinate. Then the variance is constant, workers step on their
own, and every `interval` steps their summed updates travel in one bit; the interval doubles every `local_scaler` steps
up to `longest`. Error feedback is on the workers and on the owner of each chunk, as in `onebit_adam`. Coordinates
whose variance is 0, for which one bit would be a step of any size, are masked, as DeepSpeed's `exp_avg_mask` does.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lab.bench.onebit_adam import mean_of_signs


class ZeroOneAdam(torch.optim.Optimizer):
    """0/1 Adam over the default process group; gradients are each worker's own. `sent` counts this worker's bytes.

    Bytes are those of a ring all-reduce where gradients are uncompressed, and else one bit a coordinate to and from
    the owners of the chunks; scales are not counted. No bias correction.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        freeze_step: int,
        local_scaler: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variance_scaler: int = 16,
        longest: int = 16,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.freeze_step, self.local_scaler = freeze_step, local_scaler
        self.variance_scaler, self.longest = variance_scaler, longest
        self.steps, self.sent = 0, 0.0
        self.variance_interval, self.variance_updates = 1, 0
        self.rates = 0.0  # sum of the learning rates since the last exchange of local steps

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Apply one update; collective where workers exchange."""
        frozen, self.steps = self.steps >= self.freeze_step, self.steps + 1
        updates_variance = not frozen and self.steps % self.variance_interval == 0
        interval = min(self.longest, 2 ** (max(0, self.steps - 1 - self.freeze_step) // self.local_scaler))
        exchanges = frozen and self.steps % interval == 0
        self.rates += self.param_groups[0]["lr"] if frozen else 0.0
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    names = ("m", "v", "local", "worker_error", "server_error")
                    state.update({name: torch.zeros_like(p) for name in names})
                self.update(p, group, updates_variance, frozen, exchanges)
        if exchanges:
            self.rates = 0.0

        # Each interval of the variance lasts for `variance_scaler` updates.
        self.variance_updates += updates_variance
        if self.variance_updates == self.variance_scaler:
            self.variance_updates, self.variance_interval = 0, 2 * self.variance_interval

    def update(self, p: Tensor, group: dict[str, float], updates_variance: bool, frozen: bool, exchanges: bool) -> None:
        """Update one parameter and its state."""
        state, (beta1, beta2), workers = self.state[p], group["betas"], dist.get_world_size()
        m, v, local, errors = state["m"], state["v"], state["local"], (state["worker_error"], state["server_error"])
        assert p.grad is not None
        payload = 2 * (workers - 1) / workers * p.numel()

        # Errors of gradients are not added to those of local steps.
        if frozen and self.steps == self.freeze_step + 1:
            for error in errors:
                error.zero_()

        # The mean gradient, exactly or in one bit; the worker's own where the variance is frozen.
        gradient = p.grad
        if updates_variance:
            dist.all_reduce(gradient)
            gradient /= workers
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            self.sent += 4 * payload
        elif not frozen:
            gradient = mean_of_signs(gradient, *errors) * (v > 0)
            self.sent += payload / 8
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)

        scale = v.sqrt() + group["eps"]
        change = -group["lr"] * (m / scale + group["weight_decay"] * p)
        p += change
        if not frozen:
            return

        # Local steps: the workers' sums of changes are replaced by their mean, which is the momentum, too.
        local += change
        if exchanges:
            p -= local
            mean = mean_of_signs(local * scale, *errors) * (v > 0)
            m.copy_(-mean / self.rates)
            p += mean / scale
            local.zero_()
            self.sent += payload / 8
