"""A worker that sends invalid messages, in real gloo processes: all reject the round, name the worker, and continue."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ddp_runs import SEVERAL, batches, network, vector, wrapped
from ddp_runs import train as train_ddp
from elastic_fakes import Worker
from nightly import thinned
from torch import Tensor

from packsaddle import QSGD, CompressedSGD, Compression, Compressor, LocalUpdates, TopK, register_ddp_hook
from packsaddle.comm.communicator import Communicator, Parts
from packsaddle.comm.group import TorchGroup, resolve
from packsaddle.errors import GuardError, MessageError

Gloo = Callable[..., list[Any]]
SENDER = 1
STEPS, CORRUPTED = 6, 3
# What is changed in the first bytes of a part, and what the error then says.
MESSAGES: dict[str, tuple[Compressor, str, str]] = {
    "TopK": (TopK(0.1), "indices", "indices in a message of TopK(ratio=0.1"),
    "values": (TopK(0.1, values="bfloat16"), "values", "values in a message of TopK(ratio=0.1"),
    "QSGD": (QSGD(), "levels", "levels in a message of QSGD(levels=7"),
    "levels without codes": (QSGD(coded=False), "levels", "levels in a message of QSGD(levels=7"),
}


def corrupt(parts: Parts, name: str) -> Parts:
    """The parts with 0x7F in the first bytes of one; of floating-point numbers a large one."""
    if name not in parts:
        return parts
    octets = parts[name].clone().view(torch.uint8)
    octets[:2] = 0x7E if parts[name].is_floating_point() else 0xFF
    return {**parts, name: octets.view(parts[name].dtype)}


@contextmanager
def corrupting(name: str, *, sizes: bool = False) -> Iterator[None]:
    """In the process of SENDER alone: all that it sends has a corrupted part, or one message announces 2^60 bytes."""
    gather, exchange, all_gather = Communicator.gather, Communicator.exchange, TorchGroup.all_gather

    def other_gather(self: Communicator, parts: Parts, **options: Any) -> list[Parts]:
        return gather(self, corrupt(parts, name), **options)

    def other_exchange(self: Communicator, outgoing: Sequence[Parts | None], *args: Any, **options: Any) -> list[Parts]:
        return exchange(self, [p and corrupt(p, name) for p in outgoing], *args, **options)

    def other_all_gather(self: TorchGroup, tensor: Tensor) -> list[Tensor]:
        TorchGroup.all_gather = all_gather  # type: ignore[method-assign]
        return all_gather(self, torch.full_like(tensor, 1 << 60))

    if resolve(None).rank == SENDER:
        if sizes:
            TorchGroup.all_gather = other_all_gather  # type: ignore[method-assign]
        else:
            Communicator.gather, Communicator.exchange = other_gather, other_exchange  # type: ignore[method-assign]
    try:
        yield
    finally:
        Communicator.gather, Communicator.exchange = gather, exchange  # type: ignore[method-assign]
        TorchGroup.all_gather = all_gather  # type: ignore[method-assign]


def gradient(call: int) -> Tensor:
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(10 * call + resolve(None).rank))


def train(setting: str, exchange: str, corrupted: int | None, *, sizes: bool = False) -> tuple[Tensor, list[Any]]:
    """x after all steps, of which `corrupted` has a corrupted message; it is left out if that is None."""
    compressor, name, _ = MESSAGES[setting]
    weight = torch.nn.Parameter(torch.zeros(40, 30))
    opt = CompressedSGD([weight], 0.1, Compression(compressor, exchange=exchange, dense_below=0))  # type: ignore[arg-type]
    for call in range(STEPS):
        if call == CORRUPTED and corrupted is None:
            continue
        weight.grad = gradient(call)
        if call == corrupted:
            with corrupting(name, sizes=sizes):
                opt.step()
        else:
            opt.step()
    return weight.detach(), [(skip.index, skip.workers, str(skip)) for skip in opt.skips]


def with_and_without(setting: str, exchange: str, sizes: bool) -> Any:
    return train(setting, exchange, CORRUPTED, sizes=sizes), train(setting, exchange, None)


# A size is refused before anything is allocated.
ANNOUNCED = f"sizes in a message of any compressor from worker {SENDER} must be bytes of levels, scales"
CASES = [(setting, exchange, False) for setting in MESSAGES for exchange in ("direct", "two-way", "coordinator")]


@pytest.mark.parametrize(("setting", "exchange", "sizes"), thinned([*CASES, ("QSGD", "direct", True)], 2))
def test_a_step_is_skipped_and_leaves_nothing(gloo: Gloo, setting: str, exchange: str, sizes: bool) -> None:
    said = ANNOUNCED if sizes else MESSAGES[setting][2]
    for (x, skips), (expected, none) in gloo(with_and_without, 3, setting, exchange, sizes):
        ((step, workers, text),) = skips
        assert (step, workers) == (CORRUPTED, (SENDER,))
        assert text.startswith(f"step {CORRUPTED}: {said}")
        assert sizes or f" from worker {SENDER} must be " in text
        assert torch.equal(x, expected), "as without that step, bit for bit"
        assert none == []


def raised(max_skipped: int | None, steps: int) -> str:
    """Return how many steps were skipped before an error, and the error; "" if there was none."""
    weight = torch.nn.Parameter(torch.zeros(40, 30))
    opt = CompressedSGD([weight], 0.1, Compression(TopK(0.1), dense_below=0, max_skipped=max_skipped))
    try:
        with corrupting("indices"):
            for call in range(steps):
                weight.grad = gradient(call)
                opt.step()
    except (GuardError, MessageError) as error:
        return f"{opt.skipped} {error}"
    return ""


def test_a_worker_whose_messages_stay_invalid_ends_the_run(gloo: Gloo) -> None:
    for message in gloo(raised, 3, 2, 5):
        assert message.startswith("3 step 0: indices in a message of TopK")
        assert "Check the memory and the network of that worker" in message


def test_without_checks_those_that_receive_it_raise(gloo: Gloo) -> None:
    messages = gloo(raised, 3, None, 1, fresh=True)
    assert [f"from worker {SENDER}" in message for message in messages] == [True, False, True]


def local_rounds() -> tuple[Tensor, int, list[tuple[tuple[int, ...], str]]]:
    weight = torch.nn.Parameter(torch.zeros(40, 30))
    sgd = torch.optim.SGD([weight], 0.1)
    local = LocalUpdates(sgd, every=2, compressor=Compression(QSGD(), dense_below=0, exchange="direct"))
    for call in range(12):
        weight.grad = gradient(call)
        if call == 5:  # the third round is after it
            with corrupting("levels"):
                sgd.step()
        else:
            sgd.step()
    local.flush()
    return weight.detach(), local.rounds, [(skip.workers, str(skip)) for skip in local.skips]


def test_a_round_of_local_updates_is_rejected(gloo: Gloo) -> None:
    found = gloo(local_rounds, 3)
    for x, rounds, ((workers, text),) in found:
        assert workers == (SENDER,)
        assert f"levels in a message of QSGD(levels=7, bucket=512, coded=True) from worker {SENDER} must be" in text
        assert rounds == 6, "five of six rounds, and that of the flush"
        assert torch.equal(x, found[0][0])


def behind_ddp() -> tuple[Tensor, Tensor, Tensor, list[tuple[tuple[int, ...], str]]]:
    model = wrapped(network(torch.float32), SEVERAL)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = register_ddp_hook(model, Compression(TopK(0.05), dense_below=100), optimizer=optimizer)
    data = batches(5, torch.float32)
    train_ddp(model, optimizer, data[:3])
    before = vector(model)
    with corrupting("indices"):
        train_ddp(model, optimizer, data[3:4])
    rejected = vector(model)
    train_ddp(model, optimizer, data[4:])
    return before, rejected, vector(model), [(skip.workers, str(skip)) for skip in hook.skips]


def test_a_backward_pass_is_rejected(gloo: Gloo) -> None:
    found = gloo(behind_ddp, 3)
    for rank, (before, rejected, after, ((workers, text),)) in enumerate(found):
        assert torch.equal(before, rejected)
        assert not torch.equal(rejected, after)
        assert torch.equal(after, found[0][2])
        assert workers == (() if rank == SENDER else (SENDER,))
        own = "step 3: another worker has received an invalid message"
        assert text == own if rank == SENDER else f"from worker {SENDER} must be" in text


def elastic_rounds() -> tuple[Tensor, str, list[Any]]:
    """Three workers, of which SENDER leaves after its invalid message: whoever stays has rejected the round."""
    worker, group = Worker(resolve(None)), resolve(None)
    worker.local.join()
    worker.train(3)
    before, message = worker.anchor(), ""
    try:
        with corrupting("indices"):
            worker.train(3)
    except GuardError as error:
        message = str(error)
    same = torch.equal(torch.cat([t.flatten() for t in worker.anchor()]), torch.cat([t.flatten() for t in before]))
    skips = [(skip.workers, str(skip)) for skip in worker.local.skips]
    return torch.tensor([same, group.rank == SENDER]), message, skips


def test_an_elastic_worker_with_an_invalid_message_leaves(gloo: Gloo) -> None:
    for rank, (same, message, skips) in enumerate(gloo(elastic_rounds, 3)):
        assert bool(same[0]), "the round was applied"
        ((workers, text),) = skips
        assert workers == (SENDER,)
        assert "indices in a message of TopK(ratio=0.25" in text
        said = "2 of the 2 other workers received an invalid message from this one"
        assert message.startswith(said) if rank == SENDER else message == ""
