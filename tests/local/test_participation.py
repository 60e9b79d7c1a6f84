"""Weights of workers and samples of them: against federated averaging written out, and a naive twin with memories."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import WorkersClock
from specs import local_options
from torch import Tensor, nn

from packsaddle import (
    QSGD,
    CheckpointError,
    Compression,
    Compressor,
    Escape,
    Identity,
    LocalUpdates,
    RandomK,
    SketchTopK,
    TopK,
    Workers,
    load_checkpoint,
    save_checkpoint,
    simulate,
)
from packsaddle.comm.group import resolve
from packsaddle.integrations import measures
from packsaddle.local.participation import Participation

Gloo = Callable[..., list[Any]]
D, WEIGHTS = 40, (1.0, 5.0, 2.5, 1.5)


def start() -> Tensor:
    return torch.linspace(-1, 1, D, dtype=torch.float64)


def gradient(x: Tensor, worker: int, step: int) -> Tensor:
    """Of a quadratic with each worker's own minimum, and noise."""
    rng = torch.Generator().manual_seed(97 * worker + step)
    return x - worker + torch.randn(D, dtype=torch.float64, generator=rng)


def worker_run(rank: int, steps: int, idle: bool, weight: float | None, **options: Any) -> dict[str, Any]:
    """Train; with `idle` a worker that is not sampled sits out. Returns what was there after each round."""
    x = nn.Parameter(start().view(5, 8))
    optimizer = torch.optim.SGD([x], lr=0.1)
    spec = Compression(options.pop("compressor"), dense_below=0)
    local = LocalUpdates(optimizer, every=3, seed=3, **local_options(compressor=spec, weight=weight, **options))
    anchors, sampled, xs, errors, n = [], [], [], [], 0
    while n < steps:
        sampled.append(local.sampled)
        if idle and not local.sampled:
            local.sit_out()
        else:
            for i in range(3):
                x.grad = gradient(x.detach().view(-1), rank, n + i).view(5, 8)
                optimizer.step()
        n += 3
        (anchor,) = local.anchor().values()
        anchors.append(anchor.view(-1))
        xs.append(x.detach().clone().view(-1))
        errors.append(local.error())
    return {"anchors": anchors, "sampled": sampled, "x": xs, "errors": errors, "steps": local.steps}


def top(v: Tensor, k: int) -> Tensor:
    kept = torch.zeros_like(v)
    index = v.abs().argsort(descending=True)[:k]
    kept[index] = v[index]
    return kept


def twin(
    sampled: list[list[bool]], weights: tuple[float, ...], k: int, *, keep: bool, idle: bool
) -> list[list[Tensor]]:
    """From the algorithm: anchors by round, and each worker's x after it."""
    workers = len(weights)
    a, xs, es = (
        start(),
        [start() for _ in range(workers)],
        [0 * start() for _ in range(workers)],
    )
    anchors, after = [], []
    for number in range(len(sampled[0])):
        inside = [i for i in range(workers) if sampled[i][number]]
        for i in range(workers):
            for j in range(3 if i in inside or not idle else 0):
                xs[i] = xs[i] - 0.1 * gradient(xs[i], i, 3 * number + j)
        moved = torch.zeros(D, dtype=torch.float64)
        began = [a - es[i] if keep else a for i in range(workers)]
        for i in inside:
            v = es[i] + began[i] - xs[i]
            sent = top(v, k)
            es[i] = v - sent
            moved += weights[i] * sent / sum(weights[j] for j in inside)
        a = a - moved
        for i in range(workers):
            begin = a - es[i] if keep else a
            xs[i] = begin if i in inside else xs[i] - began[i] + begin
        anchors.append(a)
        after.append([x.clone() for x in xs])
    return [anchors, *zip(*after, strict=True)]  # type: ignore[list-item]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("sample", [0.4, 1.0])
@pytest.mark.parametrize("weights", [WEIGHTS, None])
def test_it_is_the_algorithm(weights: tuple[float, ...] | None, sample: float, idle: bool, keep: bool) -> None:
    def run(rank: int) -> dict[str, Any]:
        mine = None if weights is None else weights[rank]
        return worker_run(
            rank, 18, idle, mine, compressor=TopK(k=7), sample=sample, keep_unsent=keep, exchange="direct"
        )

    found = simulate(run, 4)
    sampled = [each["sampled"] for each in found]
    assert {sum(inside) for inside in zip(*sampled, strict=True)} == {{0.4: 2, 1.0: 4}[sample]}
    anchors, *xs = twin(sampled, weights or (1.0,) * 4, 7, keep=keep, idle=idle)
    for each, mine in zip(found, xs, strict=True):
        assert each["steps"] == 18
        for here, there in zip(each["anchors"] + each["x"], [*anchors, *mine], strict=True):
            torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)


def test_it_is_federated_averaging() -> None:
    """McMahan et al. 2017: w <- sum_k n_k w_k / sum_k n_k over the clients of a round, which begin at w."""
    found = simulate(lambda r: worker_run(r, 24, True, WEIGHTS[r], compressor=Identity(), sample=0.5), 4)
    w = start()
    for number in range(8):
        inside = [i for i in range(4) if found[i]["sampled"][number]]
        ends = []
        for i in inside:
            x = w.clone()
            for j in range(3):
                x = x - 0.1 * gradient(x, i, 3 * number + j)
            ends.append(WEIGHTS[i] * x)
        w = torch.stack(ends).sum(0) / sum(WEIGHTS[i] for i in inside)
        torch.testing.assert_close(found[0]["anchors"][number], w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "compressor", [RandomK(0.3), TopK(k=5), QSGD(), SketchTopK(k=5)], ids=lambda c: type(c).__name__
)
def test_what_is_pending_is_weighed_alike(compressor: Compressor) -> None:
    """y = a - error() moves by the weighted mean of what workers moved, whatever is sent of it."""
    rounds = simulate(lambda r: worker_run(r, 18, False, WEIGHTS[r], compressor=compressor, keep_unsent=False), 4)
    previous = start()
    for number in range(6):
        y = rounds[0]["anchors"][number] - rounds[0]["errors"][number]
        before = start() if number == 0 else rounds[0]["anchors"][number - 1]
        moved = torch.zeros(D, dtype=torch.float64)
        for i in range(4):
            x = before.clone()
            for j in range(3):
                x = x - 0.1 * gradient(x, i, 3 * number + j)
            moved += WEIGHTS[i] * (before - x) / sum(WEIGHTS)
        torch.testing.assert_close(y, previous - moved, rtol=1e-6, atol=1e-6)
        previous = y


def test_rounds_are_drawn_evenly() -> None:
    """Each of five workers is in two of five rounds in the mean, within 5 standard deviations of 2,000 rounds."""
    draws = [Participation(None, 0.4, 5, rank, seed=1) for rank in range(5)]
    members = [draws[0].members(step) for step in range(2000)]
    assert all(who.members(step) == members[step] for who in draws for step in range(0, 2000, 97))
    counts = torch.bincount(torch.tensor(members).view(-1), minlength=5)
    assert all(len(set(m)) == 2 for m in members)
    assert bool(((counts - 800).abs() <= 5 * (2000 * 0.4 * 0.6) ** 0.5).all())
    assert members != [Participation(None, 0.4, 5, 0, seed=2).members(step) for step in range(2000)]


@pytest.mark.parametrize(
    ("sample", "workers", "drawn"), [(0.07, 100, 7), (0.28, 25, 7), (0.3, 4, 2), (0.01, 3, 1), (1e-12, 2, 1)]
)
def test_the_number_drawn_is_rounded_up(sample: float, workers: int, drawn: int) -> None:
    """Not that of a product such as 0.07 * 100, which is above 7."""
    assert len(Participation(None, sample, workers, 0, seed=1).members(0)) == drawn


def between_processes(weight_of: tuple[float, ...]) -> dict[str, Any]:
    rank = resolve(None).rank
    return worker_run(rank, 12, True, weight_of[rank], compressor=TopK(k=7), sample=0.6)


def test_processes_are_the_simulation(gloo: Gloo) -> None:
    real = gloo(between_processes, 3, WEIGHTS[:3])
    simulated = simulate(lambda r: worker_run(r, 12, True, WEIGHTS[r], compressor=TopK(k=7), sample=0.6), 3)
    for mine, theirs in zip(real, simulated, strict=True):
        assert mine["sampled"] == theirs["sampled"]
        for a, b in zip(mine["anchors"] + mine["x"], theirs["anchors"] + theirs["x"], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, 'weight must be finite and above 0, "steps" or None, got 0.0'),
        ({"weight": float("nan")}, 'weight must be finite and above 0, "steps" or None, got nan'),
        ({"weight": True}, 'weight must be finite and above 0, "steps" or None, got True'),
        ({"sample": 0.0}, "sample must be a fraction of the workers in (0, 1], got 0.0"),
        ({"sample": 1.5}, "sample must be a fraction of the workers in (0, 1], got 1.5"),
        ({"sample": 0.5, "delay": 1}, "delay must be 0 with weight or sample, got 1"),
        ({"weight": 2.0, "exchange": "senders"}, 'exchange must not be "senders" with weight or sample'),
        ({"weight": 2.0, "escape": Escape(3, 1.0, lambda: 0.0)}, "escape must be None with weight or sample: its"),
        ({"weight": "steps", "sample": 0.5}, 'sample must be 1 with weight="steps", got 0.5'),
        ({"steps": [8, 3]}, 'steps must be numbers by rank with weight="steps", else None, got [8, 3]'),
        ({"weight": "steps", "steps": 8}, 'steps must be numbers by rank with weight="steps", else None, got 8'),
        ({"weight": "steps", "steps": {0: 8, 2: 3}}, "steps must have the ranks 0, 1, ... as keys, got {0: 8, 2: 3}"),
        ({"weight": "steps", "steps": {1: 0, 0: 8}}, "steps[1] must be an integer of at least 1, got 0"),
        (
            {"weight": "steps", "steps": {1: 3, 0: 8}},
            "steps must have a number for each of the 1 workers, got 2 numbers",
        ),
        ({"sample": 0.5, "compressor": SketchTopK(0.1)}, "must average messages directly with a manager or a sample"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    x = nn.Parameter(torch.zeros(50, 50))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 -- compared below
        LocalUpdates(torch.optim.SGD([x], lr=0.1), every=3, **local_options(**options))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([{}, {"weight": 2.0}], "worker 0 has weight=False and worker 1 has weight=True"),
        ([{"weight": "steps"}, {"weight": 2.0}], "worker 0 has weight='steps' and worker 1 has weight=True"),
        (
            [{"weight": "steps", "steps": {0: 3, 1: 1}}, {"weight": "steps", "steps": [3, 2]}],
            "worker 0 has workers.steps=(3, 1) and worker 1 has workers.steps=(3, 2)",
        ),
    ],
)
def test_weights_are_of_all_workers_or_of_none(options: list[dict[str, Any]], message: str) -> None:
    def run(rank: int) -> None:
        x = nn.Parameter(torch.zeros(50, 50))
        LocalUpdates(torch.optim.SGD([x], lr=0.1), every=3, workers=Workers(**options[rank]))

    with pytest.raises(ValueError, match="workers must be given the same arguments") as caught:
        simulate(run, 2)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "later", "message"),
    [
        ({"sample": 0.5}, Compression(TopK(0.1), exchange="two-way"), "must average messages directly with a manager"),
        ({"sample": 0.5}, Compression(SketchTopK(0.1)), "must average messages directly with a manager or a sample"),
    ],
)
def test_later_compressors_of_a_schedule_are_refused_too(
    options: dict[str, Any], later: Compression, message: str
) -> None:
    x = nn.Parameter(torch.zeros(50, 50))
    optimizer = torch.optim.SGD([x], lr=0.1)
    schedule = replace(later, compressor=lambda t: later.at(t) if t else Identity())
    LocalUpdates(optimizer, schedule, every=1, workers=Workers(**options))
    x.grad = torch.ones(50, 50)
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("options", [{"weight": 2.0}, {"sample": 0.5}], ids=["weight", "sample"])
def test_a_flush_of_a_sample_needs_no_owners(options: dict[str, Any]) -> None:
    """It is uncompressed; elsewhere, after rounds that send less than four bits a value, it has four."""

    def run(rank: int) -> Tensor:
        x = nn.Parameter(torch.zeros(50, 50))
        optimizer = torch.optim.SGD([x], lr=0.1)
        spec = Compression(RandomK(0.1), exchange="auto")
        local = LocalUpdates(optimizer, spec, every=4, workers=Workers(**options))
        x.grad = torch.randn(50, 50, generator=torch.Generator().manual_seed(rank))
        optimizer.step()
        assert local.flush()
        assert bool(local.pending().any()) == ("weight" in options)
        return x.detach()

    first, *others = simulate(run, 4)
    for x in others:
        assert torch.equal(x, first)


def paced(rank: int, seconds: Callable[[int], tuple[int, ...]], clock: WorkersClock, **options: Any) -> list[list[int]]:
    """Train for 14 rounds on a worker whose steps in round r take `seconds`(r); return the paces in each round."""
    x, found = nn.Parameter(torch.zeros(40, 50)), list[list[int]]()
    optimizer = torch.optim.SGD([x], lr=0.1)
    local = LocalUpdates(optimizer, every=8, workers=Workers(weight="steps"), **options)
    rng = torch.Generator().manual_seed(rank)
    while local.position < 14 * 16:
        if local.position // 16 == len(found):
            found.append(local.paces)
        clock.work(seconds(len(found) - 1)[rank])
        x.grad = torch.randn(40, 50, generator=rng)
        optimizer.step()
    assert measures(local)["pace"] == local.paces[rank]
    return found


@pytest.mark.parametrize("delay", [0, 3])
def test_paces_follow_the_speeds(delay: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One worker is three times slower, and as fast as the other one from round 7 on; both log nothing else."""
    monkeypatch.setattr("packsaddle.local.pace.time", clock := WorkersClock())
    with caplog.at_level("INFO", logger="packsaddle"):
        found = simulate(lambda rank: paced(rank, lambda r: (1, 3 if r < 7 else 1), clock, overlap=delay), 2)
    late = delay > 0  # an exchange that ends in the next round has its times
    expected = [[8, 8]] * (2 + late) + [[12, 4]] * 7 + [[8, 8]] * (5 - late)
    assert found == [expected, expected]
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition("workers")[2] for text in said] == [
        f" make {h} inner steps in a round" for h in ("[12, 4]", "[8, 8]")
    ]


def on_paces(folder: Path, lengths: tuple[int, ...], **options: Any) -> tuple[list[int], list[int], Tensor]:
    """Load a checkpoint, if there is one; train, save; return the rounds after each step, the paces and the anchor."""
    rank = resolve(None).rank
    model = nn.Linear(40, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = LocalUpdates(optimizer, every=6, overlap=5, workers=Workers(**{"weight": "steps"} | options))
    parts, rounds = {"model": model, "optimizer": optimizer, "local": local}, list[int]()
    load_checkpoint(folder, parts)
    for n in range(lengths[rank]):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n + 100 * rank))
        optimizer.step()
        rounds.append(local.rounds)
    save_checkpoint(folder, parts, step=local.position)
    return rounds, local.paces, torch.cat([a.view(-1) for a in local.anchor().values()])


@pytest.mark.filterwarnings("ignore:the checkpoint of step 12 was saved by 2 workers")
def test_another_number_of_workers_continues_at_the_tick(tmp_path: Path) -> None:
    """The exchange of tick 6, saved at tick 10 of two workers that make 9 and 3 steps a round, ends at tick 11."""
    found = simulate(lambda rank: on_paces(tmp_path, (9 + 7, 3 + 2), steps=[9, 3]), 2)
    assert [rounds[-1] for rounds, _, _ in found] == [0, 0]
    later = simulate(lambda rank: on_paces(tmp_path, (8, 8, 8)), 3)
    for rounds, paces, anchor in later:
        assert rounds == [1, 1, 1, 1, 1, 1, 2, 2]
        assert paces == [6, 6, 6]
        assert torch.equal(anchor, later[0][2])
    with pytest.raises(
        CheckpointError, match="weight_by_steps is False here, but the state was saved with weight_by_steps"
    ):
        simulate(lambda rank: on_paces(tmp_path, (0, 0, 0), weight=None), 3)


def test_other_fixed_paces_begin_with_the_next_round(tmp_path: Path) -> None:
    simulate(lambda rank: on_paces(tmp_path, (7, 2), steps=[9, 3]), 2)  # at tick 4
    found = simulate(lambda rank: on_paces(tmp_path, (6, 9), steps=[4, 8]), 2)
    assert [paces for _, paces, _ in found] == [[4, 8]] * 2
    assert [rounds for rounds, _, _ in found] == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 1]]
    assert torch.equal(found[0][2], found[1][2])
