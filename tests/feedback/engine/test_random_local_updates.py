"""Local updates with options at random equal a naive twin, lose nothing, and resume bit for bit after each step."""

import gc
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fronts import differences
from local_updates import CLOCK, MODELS, OPTIONS, OUTERS, Case, Trace, begin, check_twin, flat, train

from packsaddle import (
    QSGD,
    Compressor,
    Identity,
    LinearSketch,
    LowRank,
    Ramp,
    RandomK,
    Rounded,
    Sign,
    TopK,
    simulate,
)
from packsaddle.compressors import compressors

SETTINGS, BATCHES = 100, 5
EVERY = (1, 2, 3, 3, 4, 5)
EXCHANGES = ("direct", "direct", "two-way", "two-way", "coordinator", "senders", "all-gather")
OWN = ("low-rank all-reduce", "sketched all-reduce", "projected all-reduce")  # exchanges that are the compressor's own
# The twin has no mean of sketches that are rounded to 16 bits.
KINDS: list[Any] = [replace(c, half=False) if hasattr(c, "half") else c for c in compressors(0.2)]  # type: ignore[type-var]
KINDS += [RandomK(k=9), TopK(k=8), TopK(0.2, values="int8"), TopK(0.3, chunk=16, values="int2")]
KINDS += [TopK(0.3), Sign(per_tensor=True), Rounded("int4"), LowRank(2)]
# After a round, where magnitudes may be equal, and numbers 0, up to rounding errors: neither TopK, Sign nor two bits.
SAFE = [None, Identity(), Rounded("int8"), QSGD(127), RandomK(0.5), LinearSketch(0.4)]


def drawn(number: int) -> Case:
    """Return the setting of this number."""
    rng = random.Random(number)

    def some(chance: float, values: Any, other: Any) -> Any:
        return rng.choice(values) if rng.random() < chance else other

    # What excludes others: weights need an exchange other than senders, escape checks one fragment and no delay.
    kind = some(0.4, ("escape", "weight"), "")
    exchange = rng.choice(EXCHANGES)
    exchange = "direct" if exchange == "senders" and kind == "weight" else exchange
    by_owners, is_exact = exchange in ("two-way", "coordinator"), exchange in ("direct", "senders")
    kinds = [c for c in KINDS if c.aggregation not in OWN or is_exact]
    model, workers, steps, every = rng.randrange(4), rng.choice((2, 2, 3, 3, 4)), rng.randint(6, 9), rng.choice(EVERY)
    delay = 0 if kind == "escape" else some(0.5, range(1, every) or [0], 0)
    inner = rng.choice(("sgd", "momentum", "adamw", "sgd,adamw", "adamw,momentum"))
    escape = (rng.randint(1, 4), rng.choice((0.1, 1.0, 9.0)), rng.choice("xy"), rng.randint(1, 2))
    fragments = 1 if kind == "escape" else rng.choice([n for n in MODELS[model][1] if n <= every])
    freezes = "" if kind == "escape" else some(0.3, ("all", "each", "each", "others"), "")
    # In two rounds, one after the other. A second NaN could be in a parameter that is frozen by then.
    first, times = rng.randint(1, steps), 1 if freezes else 2
    bad = {first + every * i: rng.randrange(workers) for i in range(times)}
    flushes, clip = dict[int, Compressor | None](), some(0.25, (1.0, 2.0), None)
    for n in rng.sample(range(1, steps + 1), rng.choice((0, 0, 1, 2))):
        is_between = all((n + i * every // fragments) % every for i in range(fragments))
        if is_between or not (clip and kind == "weight"):  # which clips rounding errors of weights
            flushes[n] = rng.choice([None, *kinds] if is_between and rng.random() < 0.7 else SAFE)
    case = Case(
        every,
        some(0.2, [tuple(rng.choices(kinds, k=3))], rng.choice(kinds)),
        fragments=fragments,
        delay=delay,
        outer=some(0.4, list(OUTERS), "none"),
        agreement=some(0.3, (0.5, 1.0), 0.0),
        mean_momentum=some(0.4, (0.5, 1.0), 0.0) if "adamw" in inner else 0.0,
        keep_unsent=some(0.6, (True,), False),
        decay=some(0.2, (0.9,), 1.0),
        noise=some(0.2, (0.01, Ramp(0.02, 1, 3)), 0.0),
        exchange=exchange,
        back=some(0.6, (TopK(0.3), RandomK(0.5)), None) if by_owners else None,
        dense_below=rng.choice((0, 1, 10)),
        weight=tuple(rng.choices((0.5, 1.0, 3.0), k=workers)) if kind == "weight" else None,
        clip=clip,
        escape=escape if kind == "escape" else None,
        max_skipped=rng.choice((None, 0, 1, 20)),
        compare_every=some(0.2, (1,), 0),
        monitor_every=some(0.2, (2,), 0),
        compare_optimizers=some(0.5, (True,), False),
        offload=some(0.2, (True,), False),
        seed=number,
        workers=workers,
        model=model,
        inner=inner,
        second_first=some(0.5, (True,), False),
        steps=steps,
        loud=some(0.5, (10.0,), 1.0),
        bad=some(0.2, (bad,), {}),
        flushes=flushes,
        freezes=freezes,
    )
    return paced(case, rng) if kind == "" and rng.random() < 0.4 else case


def paced(case: Case, rng: random.Random) -> Case:
    """Return the case with workers of unequal speeds: with fixed paces, or in rounds of two sets of speeds."""
    steps, slow, ranks = case.every * rng.randint(3, 6), rng.randint(1, 3), range(case.workers)
    speeds = [tuple(rng.choice((1, 2, 3, 7)) for _ in ranks) for _ in range(2)]
    return replace(
        case,
        weight="steps",
        paces=tuple(rng.randint(1, 7) for _ in ranks) if rng.random() < 0.5 else None,
        speeds=(*[speeds[0]] * slow, speeds[1]),
        steps=steps,
        exchange="direct" if case.exchange == "senders" else case.exchange,
        flushes={} if case.clip else case.flushes,
    )


def loses_nothing(case: Case) -> bool:
    plain = Case(1, Identity())
    names = ("outer", "agreement", "decay", "noise", "escape", "bad")
    return case.exchange != "senders" and all(getattr(case, name) == getattr(plain, name) for name in names)


def check(case: Case) -> None:
    found = simulate(lambda rank: train(case, rank), case.workers)
    check_twin(case, found)
    if loses_nothing(case):
        check_conserved(case, found)
    if case.seed % (3 if case.freezes else 12) == 0:
        again = simulate(lambda rank: train(case, rank, resumes=True), case.workers)
        for straight, trace in zip(found, again, strict=True):
            assert differences(straight.rows, trace.rows) == []
            for name in ("rounds", "skipped", "stopped", "resets"):
                assert getattr(trace, name) == getattr(straight, name), name


def check_conserved(case: Case, found: list[Trace]) -> None:
    """Check that the anchor less the mean of what is pending has moved as the workers have in the mean, each step with
    the weight of its worker at that time. With several fragments, the steps since the exchange of another fragment get
    the weight of the next round, so only rounds are compared in which paces stay."""
    paced, start = case.weight == "steps", flat(begin(case.shapes))
    before, then = [(start, start, 0 * start, 0 * start)] * case.workers, 0 * start
    marks = list(zip(*(trace.ends if paced else trace.marks for trace in found), strict=True))
    paces = found[0].paces if paced else [list(case.weight or (1.0,) * case.workers)] * (len(marks) + 1)  # type: ignore[arg-type]
    for n, ends in enumerate(marks[: len(paces) - 1]):
        now = [(*trace.rows[mark - 1].unbind(), trace.moved[mark - 1]) for trace, mark in zip(found, ends, strict=True)]
        made, here = (torch.tensor(weights, dtype=torch.float64) for weights in paces[n : n + 2])
        made, here = made / made.sum(), here / here.sum()
        moved = sum(w * (row[3] - old[3]) for w, row, old in zip(made, now, before, strict=True))
        pending = sum(w * row[2] for w, row in zip(here, now, strict=True))
        if case.fragments == 1 or torch.equal(made, here):
            assert (now[0][1] - before[0][1] + moved - pending + then).abs().max() < 1e-12, n
        before, then = now, pending


@pytest.fixture
def few_objects() -> Iterator[None]:
    """After a NaN a worker looks for optimizers in all objects, of which a process of many tests has a lot."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore:mean_momentum raised the loss", "ignore:nothing will be compressed")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_settings(batch: int, few_objects: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packsaddle.local.schedule.time", CLOCK)
    for number in range(batch, SETTINGS, BATCHES):
        case = drawn(number)
        try:
            check(case)
        except BaseException as error:
            error.add_note(str(case))
            raise


def test_frozen_parameters_stay_as_paces_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their error memory holds is scaled, which moves the point from which their updates are measured."""
    monkeypatch.setattr("packsaddle.local.schedule.time", CLOCK)
    options: dict[str, Any] = {"weight": "steps", "speeds": ((1, 1), (1, 1), (1, 3)), "steps": 18, "freezes": "all"}
    check(Case(3, TopK(0.3), exchange="direct", keep_unsent=True, dense_below=0, workers=2, seed=1, **options))


def test_every_option_is_drawn() -> None:
    cases: list[Case] = list(map(drawn, range(SETTINGS)))
    assert {name for name in OPTIONS if len({repr(getattr(case, name)) for case in cases}) > 1} == OPTIONS
    single = [case.compressor for case in cases if isinstance(case.compressor, Compressor)]
    assert all(compressor in single for compressor in KINDS)
