"""Local updates of any optimizer in one file, to read and to copy: one bit per coordinate, with torch alone.

Every worker trains separately. After every `every` steps the workers move the *anchor* a, the parameters on which they
agree, by the mean of their compressed changes. Each worker then continues from the anchor minus its error memory e:

    v = a - x               the local update of this worker, where x are its parameters
    e <- v - C(v)           its error memory, the part of v that C does not send
    a <- a - mean_i C(v_i)  identical on all workers
    x <- a - e              so that the next v contains e again: no update is lost

C(v) is the signs of v times the mean magnitude of each tensor; vectors and small tensors are sent uncompressed.
`packsaddle.LocalUpdates` computes the same parameters with `exchange="direct"` and `mean_momentum=0`, up to rounding.
Beyond this file, it checks that the workers agree, rejects exchanges with a NaN, overlaps exchanges with training and
saves its state. It also supports more compressors, weighted workers, an outer optimizer, and workers that join and
leave.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class SimpleLocalUpdates:
    """Averages the compressed parameter changes of all workers after every `every` steps of an optimizer.

    Call `torch.distributed.init_process_group` before the constructor, and `flush` after the last step. Do not wrap the
    model in DistributedDataParallel. All workers must start from the same parameters, of one dtype, on one device, and
    make the same number of steps.

    Args:
        optimizer: any torch optimizer.
        every: the number of steps between two exchanges.
        dense_below: tensors with fewer elements than this, and all tensors with fewer than two dimensions, are sent
            uncompressed.

    >>> import torch
    >>> from examples.simple import SimpleLocalUpdates
    >>> torch.distributed.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> local = SimpleLocalUpdates(optimizer, every=8)  # then train as usual
    >>> local.flush()
    >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, optimizer: torch.optim.Optimizer, every: int = 8, dense_below: int = 256) -> None:
        self._every, self._steps = every, 0
        xs: list[Tensor] = [x for group in optimizer.param_groups for x in group["params"] if x.requires_grad]
        self._coded = [x for x in xs if x.dim() > 1 and x.numel() >= dense_below]
        self._whole = [x for x in xs if x.dim() <= 1 or x.numel() < dense_below]
        self.anchor = {x: x.detach().clone() for x in xs}
        optimizer.register_step_post_hook(lambda *_: self._count())

    def _count(self) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Each worker sends the signs of its local update v, packed eight to a byte, and the mean magnitude of each
        # tensor in v.
        vs = [(self.anchor[x] - x).flatten() for x in self._coded]
        if vs:
            signs = _packed(torch.cat(vs) >= 0)
            scales = torch.stack([v.abs().mean() for v in vs])
            # Subtract the mean of C(v) from the anchor a, and set x to a - e, where e = v - C(v) is the error memory.
            mine = [v.clone() for v in vs]
            for worker, (bits, sizes) in enumerate(zip(_gathered(signs), _gathered(scales), strict=True)):
                positive = torch.split(_unpacked(bits, sum(map(len, vs))), [len(v) for v in vs])
                for x, is_up, scale, e in zip(self._coded, positive, sizes, mine, strict=True):
                    c = torch.where(is_up, scale, -scale)
                    self.anchor[x].view(-1).sub_(c / dist.get_world_size())
                    if worker == dist.get_rank():
                        e.sub_(c)
            for x, e in zip(self._coded, mine, strict=True):
                x.copy_(self.anchor[x] - e.view_as(x))
        # Vectors and small tensors are sent uncompressed, so they have no residual.
        if self._whole:
            v = torch.cat([(self.anchor[x] - x).flatten() for x in self._whole])
            self._apply(self._whole, v)

    @torch.no_grad()
    def flush(self) -> None:
        """Exchange the unsent updates uncompressed, so that all workers then have equal parameters: those of the
        anchor, i.e. the parameters on which the workers agree."""
        xs = [*self._coded, *self._whole]
        self._apply(xs, torch.cat([(self.anchor[x] - x).flatten() for x in xs]))

    def _apply(self, xs: list[Tensor], v: Tensor) -> None:
        """Move the anchor a, i.e. the values of the parameters `xs` on which all workers agree, to a - mean_i v_i,
        where v_i is the local update of worker i. Then set the parameters to a. `v` is this worker's local update of
        these parameters, flattened."""
        dist.all_reduce(v)
        for x, mean in zip(xs, torch.split(v / dist.get_world_size(), [x.numel() for x in xs]), strict=True):
            x.copy_(self.anchor[x].sub_(mean.view_as(x)))


def _gathered(mine: Tensor) -> list[Tensor]:
    """All-gather the tensor `mine` of every worker, and return the tensors in the order of the workers' ranks."""
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return found


def _packed(bits: Tensor) -> Tensor:
    """Pack `bits`, bool[n], into uint8[ceil(n / 8)], most significant bit first."""
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (padded * _powers(bits)).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, n: int) -> Tensor:
    return ((packed[:, None] & _powers(packed)) != 0).flatten()[:n]


def _powers(like: Tensor) -> Tensor:
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=like.device)
