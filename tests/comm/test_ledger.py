"""The ledger adds up, by step and by purpose, in little memory."""

import sys
import threading

from packsaddle import Bytes, Ledger


def test_totals_and_steps() -> None:
    ledger = Ledger()
    for step in range(5):
        ledger.add(step, "compressed", "all-reduce", Bytes(9, 11, 11))
        ledger.add(step, "compressed", "all-reduce", Bytes(1, 1, 1))
        ledger.add(step, "dense", "all-reduce", Bytes(4, 5, 5))
        if step == 3:
            ledger.add(step, "reset", "all-reduce", Bytes(100, 100, 100))
    assert ledger.total == Bytes(170, 185, 185)
    assert ledger.by_purpose == {
        "compressed": Bytes(50, 60, 60),
        "dense": Bytes(20, 25, 25),
        "reset": Bytes(100, 100, 100),
    }
    for step in (0, 1, 2, 4):
        assert ledger.at(step) == {"compressed": Bytes(10, 12, 12), "dense": Bytes(4, 5, 5)}
    assert ledger.at(3)["reset"] == Bytes(100, 100, 100)
    assert ledger.at(7) == {}
    assert [(s.first, s.last) for s in ledger.spans] == [(0, 2), (3, 3), (4, 4)]  # equal steps take one
    restored = Ledger()
    restored.load_state_dict(ledger.state_dict())
    assert restored.by_purpose == ledger.by_purpose


def test_a_long_run_of_unequal_steps_takes_little_memory_and_loses_no_total() -> None:
    ledger = Ledger()
    for step in range(5000):
        ledger.add(step, "indices", "all-gather", Bytes(step, step, step))
    assert len(ledger.spans) == 1000
    assert ledger.at(4999) == {"indices": Bytes(4999, 4999, 4999)}
    assert ledger.at(3) == {}
    assert ledger.total.payload == sum(range(5000))


def test_it_prints_as_a_table() -> None:
    ledger = Ledger()
    ledger.add(0, "dense", "all-reduce", Bytes(4, 5, 5))
    ledger.add(0, "values", "all-gather", Bytes(1234567, 0, 9))
    rows = [line.split() for line in str(ledger).splitlines()]
    assert rows == [
        ["bytes", "payload", "sent", "received"],
        ["dense", "4", "5", "5"],
        ["values", "1,234,567", "0", "9"],
        ["total", "1,234,571", "5", "14"],
    ]
    assert len({len(line) for line in str(ledger).splitlines()}) == 1  # columns end together
    assert str(Ledger()).splitlines()[1].split() == ["total", "0", "0", "0"]


def test_it_may_be_read_while_an_exchange_adds_to_it() -> None:
    ledger, end, interval = Ledger(), threading.Event(), sys.getswitchinterval()

    def add() -> None:
        for step in range(3000):
            ledger.add(step, f"purpose {step % 1000}", "all-gather", Bytes(1, 1, 1))
        end.set()

    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=add)
    thread.start()
    try:
        while not end.is_set():
            assert ledger.total.sent <= 3000
            assert len(ledger.by_purpose) <= 1000
            ledger.at(0), ledger.state_dict()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert ledger.total == Bytes(3000, 3000, 3000)
