"""Elastic workers that are sites of two processes, with DistributedDataParallel or FSDP2 inside."""

from itertools import product
from pathlib import Path

import pytest
from elastic_sites import Run


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packsaddle.local.elastic.workers._PAUSE", 0.0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("sharded", "files"), list(product((False, True), repeat=2)))
def test_nothing_is_lost_by_sites_that_come_and_go(sharded: bool, files: bool, seed: int, tmp_path: Path) -> None:
    """In each round the anchor moves by the mean of what the processes there have sent, by their own accounts."""
    from lab.bench.elastic import account

    run = Run(tmp_path, seed, sharded=sharded, files=files)
    run.all(3)
    found = account(run.logs)
    print(seed, found, run.killed, [len(x) for x in run.logs])
    assert found["wrong"] == []
    assert found["accounted"] >= 5
