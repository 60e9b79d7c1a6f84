"""The theorems' promise is kept by Algorithm 1 where it is broken without its noise."""

import pytest

from lab.paper.table1 import saddles
from lab.paper.theorem import Job, measure

SHORT = {"question": "share", "problem": "cosine", "epsilon": 0.4, "d": 64, "seed": 0, "quiet": True, "factor": 64.0}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "least", "most"),
    [("Algorithm 1", 0.9, 1.0), ("no noise", 0.0, 0.0)],
)
def test_only_noise_leads_away_from_the_saddle(variant: str, least: float, most: float) -> None:
    """64 times the planned step size: a run of 1,359 steps."""
    seen = measure(Job(compressor="Identity", variant=variant, **SHORT))  # type: ignore[arg-type]
    assert least <= seen["share"] <= most
    assert (seen["first"] is None) == (most == 0)
    assert saddles([seen])[0]["smallest_share"] == seen["share"]
