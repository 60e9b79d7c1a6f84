"""The theorems' promise is kept by Algorithm 1 where it is broken without its noise, or with too short an interval."""

import pytest

from lab.paper.table1 import saddles
from lab.paper.theorem import Job, measure, saddle_jobs

SHORT = {"question": "share", "problem": "cosine", "epsilon": 0.4, "d": 64, "seed": 0, "quiet": True, "factor": 64.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "least", "most"),
    [("Algorithm 1", 0.9, 1.0), ("no noise", 0.0, 0.0), ("interval / 100", 0.0, 0.0)],
)
def test_only_noise_and_time_lead_away_from_the_saddle(variant: str, least: float, most: float) -> None:
    """64 times the planned step size: a run of 1,359 steps, whose segments are 58 steps, or 1."""
    seen = measure(Job(compressor="Identity", variant=variant, **SHORT))  # type: ignore[arg-type]
    assert least <= seen["share"] <= most
    assert (seen["first"] is None) == (most == 0)
    assert saddles([seen])[0]["smallest_share"] == seen["share"]


def test_every_part_is_left_out_of_every_compressor() -> None:
    jobs = list(saddle_jobs(3))
    assert len(set(jobs)) == len(jobs)
    assert {(job.compressor, job.variant) for job in jobs} == {
        (name, variant)
        for name in ("Identity", "RandomK", "AdaptiveTopK")
        for variant in ("Algorithm 1", "no noise", "interval / 100", "no error feedback")
    }
    assert all(job.quiet and job.factor == 1 for job in jobs)  # with planned parameters
