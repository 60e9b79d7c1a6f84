"""Random input to everything that reads a user's files."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzzing import TARGETS, outcome
from hypothesis import HealthCheck, given, settings


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_configuration_errors(name: str, tmp_path: Path) -> None:
    inputs, read = TARGETS[name]
    counts: Counter[str] = Counter()

    @settings(max_examples=40, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def one(value: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "nothing is compressed" is no error
            counts[outcome(read, value, tmp_path)] += 1

    one()
    assert set(counts) == {"valid", "refused"}  # the inputs reach both
