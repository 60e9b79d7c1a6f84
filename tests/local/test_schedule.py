"""The schedule of exchanges equals its definition, for all small settings; paces of workers of unequal speeds."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packsaddle.local.schedule import Event, Pacing, Rotation, Schedule, paces

# Numbers of inner steps between exchanges, of fragments, and of a delay.
SETTINGS = [(every, n, delay) for every in range(1, 13) for n in range(1, every + 1) for delay in range(every)]


def by_definition(every: int, fragments: int, delay: int, steps: int) -> list[list[Event]]:
    """Return the events after each of the steps 1, 2, ...: an exchange begins after each n with (n + i every // P) %
    every = 0, and ends `delay` steps later."""
    found: list[list[Event]] = [[] for _ in range(steps)]
    for n in range(1, steps + 1):
        for i in range(fragments):
            if (n + i * every // fragments) % every == 0:
                found[n - 1].append(Event(True, i, n))
                if n + delay <= steps:
                    found[n - 1 + delay].append(Event(False, i, n + delay))
    if delay:  # what ends after a step ends before others begin
        return [sorted(events, key=lambda event: event.begins) for events in found]
    return found


def test_events() -> None:
    """An exchange begins and ends as defined, once, and before the next one of its fragment."""
    for every, fragments, delay in SETTINGS:
        schedule = Schedule(every, delay, tuple(range(fragments)), fragments)
        steps = 2 * every + delay
        expected = by_definition(every, fragments, delay, steps)
        assert [schedule.after(n) for n in range(1, steps + 1)] == expected, schedule
        running = set[int]()
        for event in (event for events in expected for event in events):
            assert event.begins == (event.fragment not in running)
            running ^= {event.fragment}


@given(st.sampled_from(SETTINGS), st.integers(1, 30), st.integers(0, 40), st.integers(1, 9))
def test_a_pace_spreads_the_steps_of_a_worker_over_the_rounds(
    setting: tuple[int, int, int], pace: int, steps: int, other: int
) -> None:
    """Each event is due once, in order, after the first step k of its round with k every / pace >= its tick."""
    every, fragments, delay = setting
    plain = Schedule(every, delay, tuple(range(fragments)), fragments)
    schedule, at = plain.paced(pace, 0), 0
    for h in (pace, other):  # two rounds of each
        for first in (schedule.tick(at), schedule.tick(at) + every):
            ticks = iter(range(first + 1, first + every + 1))
            expected: list[list[Event]] = [[] for _ in range(h)]
            for tick in ticks:
                expected[next(k for k in range(1, h + 1) if k * every >= (tick - first) * h) - 1] += plain.after(tick)
            assert [schedule.after(at + k) for k in range(1, h + 1)] == expected
            at += h
        schedule = schedule.paced(other, at)


def test_a_period_may_be_a_function_of_the_step() -> None:
    """Each round has the length of its first step, and the fragments begin at equal distances before its end."""
    schedule = Schedule(lambda step: 2 + step // 4, 1, (0, 1), 2)
    expected, start = list[Event](), 0
    for _ in range(6):
        every = 2 + start // 4
        expected += [Event(True, i, start + every - i * every // 2) for i in (1, 0)]
        start += every
    found = [event for n in range(1, start + 1) for event in schedule.after(n)]
    assert [event for event in found if event.begins] == expected
    ends = [replace(event, begins=False, tick=event.tick + 1) for event in expected]
    assert [event for event in found if not event.begins] == [event for event in ends if event.tick <= start]
    assert schedule.periods()[:4] == [2, 2, 3, 3]  # type: ignore[index]
    other = Schedule(lambda step: 3, 1, (0, 1), 2)
    for step in (1, 2, 3):  # a round begins after step 2
        progress = schedule.progress(step)
        assert schedule.resumed(progress).after(step + 1) == schedule.after(step + 1)
        if step == 2:
            with pytest.raises(ValueError, match=r"every must return the same numbers .* began after step 2 there"):
                other.check(progress)
    for wrong in (1, 2.0, True):
        with pytest.raises(
            ValueError, match=f"every must return an integer of at least 2 .*got {wrong!r} for the round"
        ):
            Schedule(lambda step, n=wrong: n, 1, (0, 1), 2).after(1)


def test_elastic_workers_exchange_one_fragment_in_each_round() -> None:
    rotation = Rotation(6, 3)
    assert [rotation.is_due(ahead) for ahead in range(4)] == [False, False, True, True]
    assert [rotation.fragment(rounds) for rounds in range(4)] == [0, 1, 2, 0]
    assert replace(rotation, own=3).pace == 3
    assert (Rotation(2, 5).period, Rotation(9, 1).period) == (1, 9)


def parts(total: int, workers: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to give each of these workers at least one of `total` steps."""
    if workers == 1:
        yield (total,)
    for mine in range(1, total - workers + 2) if workers > 1 else ():
        yield from ((mine, *others) for others in parts(total - mine, workers - 1))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 4))
def test_paces_make_the_shortest_round(times: list[int], every: int) -> None:
    def end(steps: Sequence[int]) -> int:
        return max(n * t for n, t in zip(steps, times, strict=True))

    found, total = paces(times, every * len(times)), every * len(times)
    assert sum(found) == total
    assert end(found) == min(map(end, parts(total, len(times))))
    assert paces([7] * len(times), total) == [every] * len(times)


def test_paces_of_some_workers() -> None:
    assert paces([1, 3], 16) == [12, 4]
    assert paces([1, 1, 1, 4], 32) == [10, 10, 10, 2]  # 3.2 steps in the time of one, of 3.25
    assert paces([1, 100], 4) == [3, 1]


def test_paces_are_chosen_anew_after_two_rounds_of_other_speeds() -> None:
    pacing = Pacing.of(None, 2, 8)
    chosen = list[list[int]]()
    #         equal    once      noise     unknown  twice               all slower  back in two rounds
    rounds = [(5, 5), (10, 30), (50, 51), (0, 90), (9, 27), (10, 30), (300, 900), (7, 7), (8, 8), (8, 8)]
    for times in rounds:
        pacing.measure(times)
        chosen.append(pacing.following)
    assert chosen == [[8, 8]] * 5 + [[12, 4]] * 3 + [[8, 8]] * 2
    pacing.measure(())
    with pytest.raises(ValueError, match="steps must have a number for each of the 3 workers, got 2 numbers"):
        Pacing.of((4, 2), 3, 8)
