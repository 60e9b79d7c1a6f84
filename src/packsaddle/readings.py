"""What can be read off a `CompressedSGD` between steps."""

import torch
from torch import Tensor

from packsaddle.checkpointed import Checkpointed
from packsaddle.compress import Identity, RandomK
from packsaddle.drift import Drift
from packsaddle.skips import Skip


class Readings(Checkpointed):
    """The counts, sizes and points of an optimizer of these parts."""

    @property
    def steps(self) -> int:
        """t, the number of steps taken."""
        return self._step

    @property
    def skips(self) -> list[Skip]:
        """The steps that were left out since the optimizer was made or loaded (see `max_skipped`)."""
        return self.guard.skips.list

    @property
    def skipped(self) -> int:
        """How many steps were left out, all in all."""
        return self.guard.skips.count

    @property
    def spare_bytes(self) -> int:
        """Memory that only a step which is left out needs: what `max_skipped=None` saves."""
        return self._memory.spare_bytes + self._direction.spare_bytes

    @property
    def drifts(self) -> list[Drift]:
        """Where workers were found apart (see `compare_every`)."""
        return self._drift.found

    @property
    def mu(self) -> float:
        """The effective contraction of the whole vector: 1 - E||v - C(v)||^2 / ||v||^2 for v of even energy.

        Dense coordinates are sent exactly, so this exceeds `compressor.mu` of the compressed part, which is
        what holds for every v (all of v's energy may lie there).
        """
        d, compressed = self._flat.d, self._flat.compressed_d
        kept = self.choice.protocol.mu(compressed, self.channel.group.size) * compressed
        return (kept + (d - compressed)) / d if d else 1.0

    @property
    def compressed_numel(self) -> int:
        """How many coordinates are compressed; the other `numel - compressed_numel` go dense."""
        return self._flat.compressed_d

    @property
    def numel(self) -> int:
        """d, the number of coordinates."""
        return self._flat.d

    def waits(self) -> list[float] | None:
        """Return the mean number of steps that a coordinate waits to be sent, by parameter in the user's order.

        None where that depends on the values: only `RandomK` chooses regardless of them.
        """
        compressor, d = self.choice.protocol.compressor, self._flat.compressed_d
        if not isinstance(compressor, RandomK | Identity):
            return None
        waits = torch.ones(self._flat.d, dtype=torch.float64)
        for start, n in compressor.tensors(d) if isinstance(compressor, RandomK) and d else []:
            waits[start : start + n] = 1 / compressor.restrict(n, d).mu(n)
        return [float(view.reshape(-1)[0]) if view.numel() else 1.0 for view in self._flat.views(waits)]

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return e_t = mean_i e^(i), float[d], in the order of torch's `parameters_to_vector`; collective.

        Raises RuntimeError where a learning rate is 0 (then e_t is undefined; `corrected` is not).
        """
        if 0.0 in self._each("lr"):
            raise RuntimeError("error() divides by the learning rate, which is 0; use corrected()")
        e = self._mean_pending()
        for run in self._flat.runs:
            e[run.start : run.stop].div_(self._each("lr")[run.group])
        return self._flat.in_order(e)

    @torch.no_grad()
    def corrected(self) -> Tensor:
        """Return y_t = x_t - eta e_t, float[d], in the order of torch's `parameters_to_vector`; collective."""
        return self._flat.in_order(self._local.synced - self._mean_pending())

    def _outstanding(self) -> Tensor:
        """This worker's part of eta e: its own memory, local steps, what the protocol holds back, outstanding noise."""
        pending = self.choice.protocol.add_residual(self._memory.pending(), self.channel.group.size)
        return self._noise.add_outstanding(self._local.add_drift(pending), self._step)

    def _mean_pending(self) -> Tensor:
        return self.channel.mean(self._outstanding().clone(), "inspection")

    def _each(self, name: str) -> list[float]:
        return [float(group[name]) for group in self.param_groups]
