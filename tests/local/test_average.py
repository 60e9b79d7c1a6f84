"""`LocalUpdates.average` makes tensors that follow each worker's own parameters equal on all workers."""

from typing import Any

import pytest
import torch
from elastic_fakes import Worker
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from packsaddle import Compression, LocalUpdates, Sign, Workers, simulate


class Run:
    """This worker's training of a network with batch statistics, and a moving average of it."""

    def __init__(self, worker: int, **options: Any) -> None:
        self.net, rng = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40)), torch.Generator().manual_seed(0)
        for p in self.net.parameters():
            nn.init.normal_(p, std=0.3, generator=rng)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        self.local = LocalUpdates(self.optimizer, Compression(Sign(), dense_below=0), every=4, **options)
        self.batches = torch.Generator().manual_seed(worker)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.net(torch.randn(8, 6, generator=self.batches)).square().mean().backward()
        self.optimizer.step()


def floats(module: nn.Module) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in [*module.parameters(), *module.buffers()]])


@pytest.mark.parametrize("weights", [None, (2.0, 4.0)])
def test_a_moving_average_is_the_mean_of_all_workers(weights: tuple[float, float] | None) -> None:
    def body(worker: int) -> tuple[Tensor, Tensor]:
        run = Run(worker, workers=Workers(weight=weights and weights[worker]))
        for _ in range(10):
            run.step()
            run.ema.update_parameters(run.net)
        before = floats(run.ema)
        run.local.average(run.ema)
        return before, floats(run.ema)

    (first, one), (second, two) = simulate(body, 2)
    parts = (0.5, 0.5) if weights is None else (1 / 3, 2 / 3)
    assert not torch.allclose(first, second)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, parts[0] * first + parts[1] * second, rtol=1e-5, atol=1e-6)


def test_sixteen_bits_and_integers() -> None:
    def body(worker: int) -> tuple[list[float], int]:
        half, count = torch.tensor([1.0, 3.0 * worker], dtype=torch.bfloat16), torch.tensor(5 + worker)
        Run(worker).local.average([half, count])
        return half.tolist(), int(count)

    assert simulate(body, 2) == [([1.0, 1.5], 5)] * 2


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ([torch.ones(2, 3)], [torch.ones(3, 2)], r"tensors\[0\]='\[2, 3\] .*' and worker 1 has tensors\[0\]='\[3, 2\]"),
        ([torch.ones(4)], [torch.ones(4)] * 2, "number of tensors=1 and worker 1 has number of tensors=2"),
        ([torch.ones(4)], [torch.ones(4).long()], r"float32' and worker 1 has tensors\[0\]='\[4\] torch.int64'"),
    ],
)
def test_workers_average_tensors_of_the_same_shapes(mine: list[Tensor], theirs: list[Tensor], message: str) -> None:
    """Those of one size in another order would be mixed, and those of another size end the process."""

    def body(worker: int) -> None:
        with pytest.raises(ValueError, match=message):
            Run(worker).local.average(theirs if worker else mine)

    simulate(body, 2)


def test_it_is_for_tensors_of_a_fixed_set_of_workers() -> None:
    run = Run(0)
    with pytest.raises(TypeError, match="tensors must be a module or tensors, and one is of type tuple"):
        run.local.average(run.net.named_parameters())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="average is for a fixed set of workers"):
        Worker().local.average([torch.zeros(2)])
