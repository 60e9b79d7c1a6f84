"""The schedule of exchanges equals its definition, for 10,000 random settings."""

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from packsaddle.local.schedule import Event, Schedule, offsets

SETTINGS = st.integers(1, 12).flatmap(
    lambda every: st.tuples(st.just(every), st.integers(1, every), st.integers(0, every - 1))
)


def by_definition(every: int, fragments: int, delay: int, steps: int) -> list[list[Event]]:
    """Return the events after each of the steps 1, 2, ...: an exchange begins after each n with (n + i every // P) %
    every = 0, and ends `delay` steps later."""
    found: list[list[Event]] = [[] for _ in range(steps)]
    for n in range(1, steps + 1):
        for i in range(fragments):
            if (n + i * every // fragments) % every == 0:
                found[n - 1].append(Event(True, i))
                if n + delay <= steps:
                    found[n - 1 + delay].append(Event(False, i))
    if delay:  # what ends after a step ends before others begin
        return [sorted(events, key=lambda event: event.begins) for events in found]
    return found


@settings(max_examples=100, phases=[Phase.generate])  # the message of one is short
@given(st.lists(SETTINGS, min_size=100, max_size=100))
def test_events(drawn: list[tuple[int, int, int]]) -> None:
    for every, fragments, delay in drawn:
        schedule = Schedule(every, delay, tuple(offsets(every, fragments)))
        steps = 2 * every + delay
        expected = by_definition(every, fragments, delay, steps)
        assert [schedule.after(n) for n in range(1, steps + 1)] == expected, schedule
        begins = [n for n, events in enumerate(expected, start=1) if any(event.begins for event in events)]
        for n in range(every):
            assert schedule.next_begin(n) == next(step for step in begins if step > n), schedule


@given(SETTINGS)
def test_an_exchange_ends_once_and_before_the_next_of_its_fragment(setting: tuple[int, int, int]) -> None:
    every, fragments, delay = setting
    schedule, running = Schedule(every, delay, tuple(offsets(every, fragments))), dict[int, int]()
    begun = list[int]()
    for n in range(1, 4 * every + 1):
        for event in schedule.after(n):
            if event.begins:
                assert event.fragment not in running
                running[event.fragment] = n
                begun.append(event.fragment)
            else:
                assert running.pop(event.fragment) == n - delay
    assert sorted(begun) == sorted(4 * list(range(fragments)))
    assert all(n > 4 * every - delay for n in running.values())
