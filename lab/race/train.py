"""The race's training loop: one worker, in a simulation, under torchrun, or on a host with a slow link.

Each worker has 12 windows a step, so W workers read W times as much text. Simulated dense training is one process with
the windows of all workers, which is what DistributedDataParallel computes. The loss is that of the workers' common
model over all windows of the last tenth of the text.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import broadcast_object_list, is_torchelastic_launched

import packsaddle
from lab.origin import Origin
from lab.race.gpt import GPT, Recipe
from lab.race.methods import METHODS, Method
from lab.race.text import Text
from lab.rows import add_rows, read_rows
from packsaddle.comm import Group, resolve


@dataclass(frozen=True)
class Trained:
    """The result of a training, for one of its workers. Evaluations do not count in times and bytes."""

    loss: float  # held-out loss of the final common model
    sent: int  # bytes that the worker sent, start and flush included: counted by the ledger, or for peers computed
    seconds: float  # time of the training: start, steps and flush
    start_s: float  # until the first step: the comparison of models at the start
    flush_s: float  # the last exchange
    counted: int  # bytes that the network interface sent, headers included; 0 without one
    curve: str  # "steps:seconds:loss" of each evaluation before the last one, separated by spaces


class Clock:
    """A clock that is stopped between phases; it also counts the bytes that a network interface sends."""

    def __init__(self, interface: str = "") -> None:
        self.seconds, self.sent = 0.0, 0
        self._counter = Path("/sys/class/net") / interface / "statistics" / "tx_bytes" if interface else None

    @contextmanager
    def running(self, group: Group) -> Iterator[None]:
        """Count time and bytes within this context. All workers begin it together."""
        if group.size > 1:
            group.all_reduce(torch.zeros(1))
        before, begin = self._bytes(), time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
        self.sent += self._bytes() - before

    def _bytes(self) -> int:
        return int(self._counter.read_text()) if self._counter else 0


def train(
    text: Text,
    method: Method,
    workers: int,
    seed: int,
    recipe: Recipe,
    device: str = "cpu",
    *,
    every: int | None = None,
    interface: str = "",
) -> Trained:
    """Train as one of the workers; collective.

    Args:
        every: steps between two evaluations, each made when an exchange has just ended. None: one, at the end.
        interface: network interface whose bytes are counted; "": none.
    """
    # The network, the method, and this worker's windows.
    group, clock = resolve(None), Clock(interface)
    network, curve = GPT(text.vocabulary, seed, recipe).to(device), list[str]()
    with clock.running(group):
        worker = method.enter(network, recipe, workers)
    started, draw = clock.seconds, windows_of(text, method, workers, seed, recipe)

    while worker.steps < recipe.steps:
        end = min(recipe.steps, method.next_quiet(worker.steps + (every or recipe.steps)))
        with clock.running(group):
            while worker.steps < end:
                x, y = draw()
                with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                    worker.step(x.to(device), y.to(device))
        if end < recipe.steps:
            with nullcontext() if worker.local is None else worker.local.at_anchor():
                curve.append(f"{end}:{clock.seconds:.2f}:{held_out_loss(text, network, recipe):.4f}")

    trained = clock.seconds
    with clock.running(group):
        worker.flush()
    loss, sent = held_out_loss(text, network, recipe), worker.sent()
    worker.end()
    return Trained(loss, sent, clock.seconds, started, clock.seconds - trained, clock.sent, " ".join(curve))


def windows_of(
    text: Text, method: Method, workers: int, seed: int, recipe: Recipe
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that draws this worker's next windows x and the characters that follow, int64[n, block] each.

    If one process does the dense training of several workers, it draws the windows of all of them.
    """
    group = resolve(None)
    mine = range(workers) if method.is_dense and group.size == 1 else [group.rank]
    generators = [torch.Generator().manual_seed(1000 * seed + worker) for worker in mine]

    def draw() -> tuple[Tensor, Tensor]:
        windows = torch.cat([text.draw(recipe.batch, recipe.block, generator) for generator in generators])
        return windows[:, :-1], windows[:, 1:]

    return draw


@torch.no_grad()
def held_out_loss(text: Text, network: GPT, recipe: Recipe) -> float:
    """Return the mean loss over the held-out windows; collective, since each worker evaluates a part of them."""
    group, windows, device = resolve(None), text.last(recipe.block), next(network.parameters()).device
    total = torch.zeros(1, dtype=torch.float64)
    for part in torch.split(windows[group.rank :: group.size], max(1, 8192 // recipe.block)):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            total += float(network(part[:, :-1].to(device), part[:, 1:].to(device))) * len(part)
    if group.size > 1:
        group.all_reduce(total)
    return float(total) / len(windows)


def make(path: Path, text: Text, name: str, workers: int, seed: int, recipe: Recipe, device: str = "cpu") -> None:
    """Train one model and add its row to a file, unless the file already has this row.

    Under torchrun each process is a worker, and rank 0 adds the row; otherwise workers are simulated in one process.
    """
    method, setting = METHODS[name], setting_of(name, workers, seed, recipe)
    # Rank 0 decides: on other machines there may be no such file.
    is_made = [has_row(path, setting)]
    if is_torchelastic_launched():
        broadcast_object_list(is_made, device=torch.device("cpu"))
    if is_made[0]:
        return
    if is_torchelastic_launched():
        trained = train(text, method, workers, seed, recipe, device)
    else:
        processes = 1 if method.is_dense else workers
        trained = packsaddle.simulate(lambda _: train(text, method, workers, seed, recipe, device), processes)[0]
    if resolve(None).rank == 0:
        origin = asdict(Origin.here(text=text.digest))
        if device != "cpu":
            origin["machine"] = torch.cuda.get_device_name()
        add_rows(path, [setting | {"loss": round(trained.loss, 4), "sent": trained.sent} | origin])


def setting_of(name: str, workers: int, seed: int, recipe: Recipe) -> dict[str, object]:
    """Return the columns of a row that say what was trained."""
    return {"method": name, "workers": workers, "seed": seed} | asdict(recipe)


def has_row(path: Path, setting: dict[str, object]) -> bool:
    """Return True if a file has a row of this setting."""
    return any(all(row[name] == str(value) for name, value in setting.items()) for row in rows(path))


def rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file. Rows of earlier versions lack fields of the recipe, and had its usual values."""
    usual = {key: str(value) for key, value in asdict(Recipe()).items()}
    return read_rows(path, lambda row: {**row, **{key: row.get(key) or value for key, value in usual.items()}}, "row")
