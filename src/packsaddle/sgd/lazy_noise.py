"""Lazy noise: the artificial noise of a coordinate is drawn only in the steps that send the coordinate.

Such a draw includes the noise of all steps since the coordinate was last sent. Without lazy noise, every step draws
noise for all coordinates, and adds it to the error memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Aggregator, AllReduce, Averaged
from packsaddle.compressors.sparse import Cells
from packsaddle.feedback.memory import ErrorMemory
from packsaddle.feedback.noise import GaussianNoise, Noise
from packsaddle.feedback.state import check_tensor
from packsaddle.numerics.devices import wide
from packsaddle.numerics.seeds import Keys, Stream, add_cell_gaussians, keys

# For each dtype of a sum of variances: a variance below this fraction of the sum loses too many digits when it is
# added.
_NEGLIGIBLE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass
class OutstandingNoise:
    """The outstanding noise, i.e. the noise of past steps that is not applied to the parameters yet. Only its variance
    is stored, as one number per cell, i.e. block of coordinates.

    If all workers send the same cells, the noise in their error memories is identical. When a cell is sent, Algorithm 1
    applies the noise sum_s eta_s xi_s to the parameters of the cell. Here s runs over the steps since the cell was last
    sent, eta_s is the learning rate and xi_s the noise, whose standard deviation is r_s. This sum is Gaussian with
    variance sum_s (eta_s r_s)^2, and it is independent of the noise of earlier sends. So it suffices to draw one
    Gaussian number per coordinate when the cell is sent. The iterates x_t then have the same joint distribution as in
    Algorithm 1.

    If the error memory e or y = x - eta e is read, the outstanding noise is drawn only for this purpose. Such a draw
    has the exact distribution at its step. Its joint distribution with other draws, or with later iterates x_t, is not
    exact.
    """

    total: float  # sum of the variances of all steps; a cell's outstanding variance is `total` minus its `kept`
    kept: Tensor  # float64[cells] (float32 on MPS): `total` at the last send of each cell; 0: never sent
    size: int  # number of coordinates in a cell

    def __post_init__(self) -> None:
        check_tensor("noise", self.kept, None)

    def grow(self, std: float) -> None:
        variance = std * std
        # If `total` is so large that the sum would lose digits of the variance, first subtract the smallest number in
        # `kept` from `total` and from all of `kept`. Only the differences between `total` and `kept` matter.
        if 0 < variance < _NEGLIGIBLE[self.kept.dtype] * self.total:
            least = float(self.kept.min())
            self.kept -= least
            self.total -= least
        self.total += variance

    def take(self, cells: Cells, out: Tensor, *, seed: int, step: int) -> None:
        """Draw the outstanding noise of the cells that are sent, and add it to `out`, float[m b].

        `cells` are m cells of b coordinates each. Afterwards they have no outstanding noise.
        """
        self._add(self.total - self.kept[cells.index], out, keys(seed, step, Stream.OUTSTANDING))
        self.kept.index_fill_(0, cells.index, self.total)

    def draw(self, like: Tensor, *, seed: int, step: int) -> Tensor:
        """Return a draw of the outstanding noise of all coordinates, float[d], with the shape, dtype and device of
        `like`.

        The noise remains outstanding, i.e. its stored variance does not change.
        """
        noise = like.new_zeros(len(self.kept) * self.size)
        # Do not use the random stream of `take`, since both draws of one step may be added to x.
        self._add(self.total - self.kept, noise, keys(seed, step, Stream.SETTLED))
        return noise[: len(like)]

    def _add(self, variance: Tensor, out: Tensor, key: Keys) -> None:
        add_cell_gaussians(out, variance.clamp_min_(0).sqrt_().to(out.dtype), key)

    @property
    def anything(self) -> bool:
        return self.total != 0

    def clear(self) -> None:
        self.total = 0.0
        self.kept.zero_()


class Perturber:
    """Draws the artificial noise of CompressedSGD (line 9 of Algorithm 1). If noise is lazy, this object also stores
    the variance of the noise that is not applied yet, in `outstanding`.

    Noise can be lazy only under three conditions:

    - All workers send the same coordinates, as in an all-reduce with RandomK (see `Compressor.shared_cells`).
    - `momentum` is False: the updates are without momentum.
    - `escape` is False: there is no escape check.

    Raises ValueError if `noise.lazy` is True and a condition does not hold.
    """

    def __init__(
        self, noise: Noise, memory: ErrorMemory, aggregator: Aggregator, *, seed: int, escape: bool, momentum: bool
    ) -> None:
        self._noise, self._memory, self._seed, self._d = noise, memory, seed, memory.compressed_d
        self._step = 0  # index t of the step of the last draw
        # The lazy noise that is not applied yet; None: noise is not lazy.
        self.outstanding: OutstandingNoise | None = None
        self.grown = 0.0  # standard deviation of the lazy noise of the current step, times the learning rate; 0: none
        # `grid` is (number of cells, coordinates in a cell) if all workers send the same cells in each step, and
        # otherwise None.
        grid = aggregator.compressor.shared_cells(self._d) if isinstance(aggregator, AllReduce) else None
        problem = ""
        if momentum:
            problem = "lazy noise does not support momentum"
        elif grid is None:
            by = type(aggregator).__name__
            problem = f"lazy noise needs RandomK by all-reduce, got {aggregator.compressor!r} by {by}"
        elif escape:
            problem = (
                "lazy noise does not support an escape check, since each check would draw the outstanding noise again, "
                "which changes the distribution of the resets; lazy=None draws noise eagerly"
            )
        elif noise.std != 0 and self._d and noise.lazy is not False:
            cells, size = grid
            kept = torch.zeros(cells, dtype=wide(where := memory.vector.device), device=where)
            self.outstanding = OutstandingNoise(0.0, kept, size)
        if problem and noise.lazy:
            raise ValueError(problem)

    def draw(self, lrs: Sequence[float], step: int) -> tuple[GaussianNoise | None, int]:
        """Return the noise xi_t of a step, and the number n of leading coordinates whose noise is lazy.

        The update of the step must include the noise of the coordinates from n on, and not that of the first n. xi_t is
        None if the noise of this step is 0. `lrs` has the learning rate of each parameter group.
        """
        xi, self._step = self._noise.drawn(seed=self._seed, step=step), step
        self.grown = 0.0
        if self.outstanding is None:
            return xi, 0
        if len(set(lrs)) == 1 and not self._memory.slice.has_frozen:
            self.grown = lrs[0] * xi.std if xi else 0.0
            return xi, self._d
        # The noise of a cell cannot be drawn as a whole if the cell may contain coordinates of different learning
        # rates, or of frozen parameters. So draw all outstanding noise now, and add it to the error memory.
        self._settle(self.outstanding, step)
        return xi, 0

    def _settle(self, outstanding: OutstandingNoise, step: int) -> None:
        if outstanding.anything:
            self._memory.add(outstanding.draw(self._memory.vector[: self._d], seed=self._seed, step=step))
            outstanding.clear()

    def add_outstanding(self, g: Averaged) -> None:
        """Draw the outstanding noise, i.e. the noise that is not applied yet, of the cells that this step sends. Add it
        to the mean update g, in place.

        The noise of this step is included. A cell is a block of coordinates. No-op if noise is not lazy.
        """
        if self.outstanding is None:
            return
        self.outstanding.grow(self.grown)
        if self.outstanding.anything:
            message = g.mean[0].message
            values = message.parts["values"]
            self.outstanding.take(message.context, values, seed=self._seed, step=self._step)

    @property
    def bound(self) -> float:
        """An upper bound on the change of any coordinate of the parameters by the noise that `add_outstanding` adds.

        It is 7 standard deviations, since the normal numbers that are drawn have magnitudes of at most 7. It is 0 if
        noise is not lazy.
        """
        return 0.0 if self.outstanding is None else 7 * math.hypot(self.grown, math.sqrt(self.outstanding.total))

    def pending(self, pending: Tensor, step: int) -> Tensor:
        """Return the unsent update `pending`, float[d], plus a draw of the outstanding noise, i.e. the noise that is
        not applied yet.

        The noise remains outstanding.
        """
        if self.outstanding is None or not self.outstanding.anything:
            return pending
        noise = self.outstanding.draw(pending[: self._d], seed=self._seed, step=step)
        return torch.cat([pending[: self._d] + noise, pending[self._d :]])

    def load(self, saved: OutstandingNoise | None, step: int) -> None:
        """Restore `saved`, the outstanding noise of a saved state, i.e. the noise that was not applied yet.

        If noise is not lazy in this run, the saved noise is drawn, and added to the error memory. The same is done if
        the cells (blocks of coordinates) of the saved noise differ in number or size from those of this run.
        """
        here = self.outstanding
        if here is not None:
            here.clear()
        if saved is None:
            return
        where = self._memory.vector.device
        found = replace(saved, kept=saved.kept.to(where, wide(where), copy=True))
        if here is not None and (len(here.kept), here.size) == (len(found.kept), found.size):
            self.outstanding = found
        else:
            self._settle(found, step)
