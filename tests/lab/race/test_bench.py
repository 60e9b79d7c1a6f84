"""The benchmarks: every table is complete and adds up, peers really train, and counted bytes are true."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from commandline import command
from torch.nn.utils import parameters_to_vector

from lab.race.contenders import parse, parse_all
from lab.race.peers import enter
from lab.race.race import Lap, step_rows
from lab.race.workload import TrainingWorkload
from packsaddle.comm.group import resolve
from packsaddle.compressors import Sign, TopK, compressors

PEERS = ("ddp", "ddp-fp16", "own-uint8", "powersgd-1", "local-sgd-4")
WORKLOAD = TrainingWorkload("mnist-autoencoder", 4)
real = pytest.mark.usefixtures("hosts_here")


def program(arguments: tuple[Any, ...]) -> str:
    return "lab.race" if arguments[0] in ("train", "link") else "lab.bench.pieces"


def tables(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    """Run a benchmark and return its JSON."""
    assert command(program(arguments), *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for table in found:
        assert table["question"].endswith("?")
        assert all(list(row) == list(table["rows"][0]) for row in table["rows"])
    return found


def check_times(row: dict[str, Any]) -> None:
    assert 0 < row["low"] <= row["ms"] <= row["high"]


@pytest.mark.process
def test_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    d = 20_000
    (table,) = tables(capsys, "exchange", "--d", d, "--repeats", 2)
    rows = {row["exchange"]: row for row in table["rows"]}
    rate = table["setting"]["loopback GB/s"] * 1e9
    dense = rows["dense all-reduce"]
    for row in rows.values():
        check_times(row)
        assert row["floor ms"] == pytest.approx(1000 * row["bytes"] / rate, rel=1e-3)
        assert row["/ floor"] * row["floor ms"] == pytest.approx(row["ms"])
        assert row["dense / it"] * row["ms"] == pytest.approx(dense["ms"])
    assert len(rows) == 2 + len(compressors(0.01))  # and two of torch
    assert (dense["bytes"], rows["float16 all-reduce"]["bytes"]) == (4 * d, 2 * d)
    assert (rows["Identity()"]["bytes"], rows["RandomK(ratio=0.01)"]["bytes"]) == (4 * d, 4 * d // 100)


@pytest.mark.process
def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    peers = ("ddp-fp16", "ddp-bf16", "ddp-uint8", "local-sgd-2")
    arguments = ("--batch", 2, "--rounds", 2, "--block", 1, "--contenders", *peers, "RandomK(0.01) noise=0.01")
    (table,) = tables(capsys, "train", *arguments)
    rows = {row["contender"]: row for row in table["rows"]}
    assert list(rows) == ["alone", "ddp", "ddp-fp16", "local-sgd-2", "RandomK(0.01) noise=0.01"]
    for row in rows.values():
        check_times(row)
        assert row["dense / it"] * row["ms"] == pytest.approx(rows["ddp"]["ms"])
    d = table["setting"]["d"]
    assert [1000 * rows[name]["kB"] for name in list(rows)[:4]] == pytest.approx([0, 4 * d, 2 * d, 2 * d])
    assert 0.04 * d < 1000 * rows["RandomK(0.01) noise=0.01"]["kB"] < 0.05 * d
    notes = [note for note in table["notes"] if "cannot run here" in note]
    assert [note.split()[0] for note in notes] == ["ddp-bf16", "ddp-uint8"]  # torch's own, which need NCCL or CUDA
    assert "NCCL" in notes[0]
    assert "0-dim tensor" in notes[1]


def train(contenders: tuple[str, ...]) -> dict[str, Any]:
    """Losses and parameters of contenders; 5 steps end where local-sgd-4 averages."""
    group = resolve(None)
    images = WORKLOAD.examples()
    batches = WORKLOAD.batches(images, group.rank, group.size)
    fixed = images.batch(torch.arange(64), torch.device("cpu"))
    found = {}
    for contender in parse_all(contenders, 0.5):
        racer = enter(contender, WORKLOAD.task())
        first = racer.task(*fixed).item()
        for step in range(5):
            racer.step(batches(step))
        found[contender.text] = (
            first,
            racer.task(*fixed).item(),
            parameters_to_vector(racer.task.parameters()).detach(),
            racer.moved(5).sent,
        )
    return found


@pytest.mark.nightly
def test_contenders_train_and_their_workers_agree(gloo: Callable[..., list[Any]]) -> None:
    ours = ("TopK(0.1)",)
    one, other = gloo(train, 2, ("alone", *PEERS, *ours))
    d = one["ddp"][2].numel()
    for name in (*PEERS, *ours):
        first, last, x, _ = one[name]
        assert last < first, name
        assert torch.equal(x, other[name][2]), name
    assert not torch.equal(one["alone"][2], other["alone"][2])  # nothing was exchanged
    # Dense DDP's path, but for the rounding of gradients: float16 keeps 11 bits; uint8's levels are a 255th of a
    # bucket's range, in which gradients spread by a fiftieth or so.
    for name, tolerance in (("ddp-fp16", 1e-3), ("own-uint8", 0.15)):
        start = parameters_to_vector(WORKLOAD.task().parameters()).detach()
        path = (one["ddp"][2] - start).norm()
        assert (one[name][2] - one["ddp"][2]).norm() < tolerance * path, name
    assert one["ddp"][3] == 5 * 4 * d
    assert one["local-sgd-4"][3] == 2 * 4 * d  # after steps 1 and 5
    assert 2 * 4 * d < one["powersgd-1"][3] < 3 * 4 * d  # dense twice, then little


@pytest.mark.nightly
@pytest.mark.process
@real
def test_link(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("own-uint8", "local-sgd-2", "TopK(0.01)")
    arguments = ("--rate", 500, "--batch", 2, "--rounds", 2, "--block", 1, "--contenders", *names)
    (table,) = tables(capsys, "link", *arguments)
    rows = {row["contender"]: row for row in table["rows"]}
    assert list(rows) == ["alone", "ddp", *names]
    for row in rows.values():
        check_times(row)
        assert row["floor ms"] == pytest.approx(rows["alone"]["ms"] + row["kB"] * 8 / 500)
        assert row["/ floor"] * row["floor ms"] == pytest.approx(row["ms"])
        assert row["allowed"] * row["floor ms"] == pytest.approx(rows["ddp"]["floor ms"])
        assert row["dense / it"] * row["ms"] == pytest.approx(rows["ddp"]["ms"])
        # The ledger is right. Above it: headers, acknowledgements, and what goes with each of a step's few messages.
        assert row["kB"] <= row["counted kB"] <= 1.1 * row["kB"] + 8, row
    assert rows["ddp"]["kB"] == pytest.approx(4e-3 * table["setting"]["d"])


def test_rows_add_up() -> None:
    laps = (
        Lap("alone", (0.1, 0.3, 0.2), 0, 0, 0, 0),
        Lap("ddp", (1.2, 1.3, 1.1), 100, 90, 110, 100),
        Lap("TopK(0.01)", (0.4,), 5, 10, 7, 12),
    )
    alone, dense, ours = step_rows(laps, 100.0)
    assert (dense["ms"], dense["low"], dense["high"]) == (1200, 1100, 1300)
    # The fuller direction, and what was sent.
    assert (dense["kB"], ours["kB"], ours["counted kB"]) == (0.1, 0.01, 0.007)
    assert [row["floor ms"] for row in (alone, dense, ours)] == pytest.approx([200, 1200, 300])
    assert (ours["/ floor"], ours["dense / it"], ours["allowed"]) == pytest.approx((4 / 3, 3, 4))
    assert set(step_rows(laps, None)[0]) == set(alone) - {"floor ms", "/ floor", "allowed", "counted kB"}


def test_contenders_are_read() -> None:
    contender = parse('TopK(0.01, values="int8") noise=0.01 lr=0.3', 0.1)
    assert (contender.compressor, contender.noise, contender.lr) == (TopK(0.01, values="int8"), 0.01, 0.3)
    assert parse("Sign", 0.1).compressor == Sign()
    ours = parse("TopK(0.01) momentum=0.9", 0.1)
    assert (ours.momentum, ours.every, ours.period) == (0.9, None, 1)
    local = parse("TopK(0.01) every=8 delay=2 fragments=2 outer=nesterov", 0.1)
    assert (local.every, local.delay, local.fragments, local.outer, local.period) == (8, 2, 2, "nesterov", 8)
    assert (parse("local-sgd-8 lr=0.2", 0.1).period, parse("powersgd-8", 0.1).period) == (8, 1)
    assert [c.text for c in parse_all(("ddp", "powersgd-1", "ddp"), 0.1)] == ["ddp", "powersgd-1"]
