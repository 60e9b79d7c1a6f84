"""The paper's figures and table from real data, and further studies: configurations, runs, summaries, figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.paper import figure1, figure2, other_studies
from lab.paper.study import Data, Scale, Study
from lab.runs.report import Curve


@dataclass(frozen=True)
class Reproduction:
    """A study, with functions that draw its figure from the curves and state its findings in words."""

    study: Callable[[Scale, Data], Study]
    draw: Callable[[Sequence[Curve]], Any] | None = None  # None: the default chart of runs
    findings: Callable[[Mapping[str, Any], Sequence[Curve]], list[str]] | None = None


REPRODUCTIONS: dict[str, Reproduction] = {
    "fig1": Reproduction(figure1.study, figure1.draw, figure1.findings),
    "fig1-norms": Reproduction(figure1.norms),
    "fig1-compressors": Reproduction(other_studies.resnet_compressors, findings=other_studies.equal_bytes),
    "fig2": Reproduction(figure2.study, figure2.draw, figure2.findings),
    "fig2-open": Reproduction(other_studies.open_points),
    "fig2-compressors": Reproduction(other_studies.compressors, findings=other_studies.equal_bytes),
    "fig2-k": Reproduction(other_studies.ratios, findings=other_studies.equal_bytes),
    "fig2-escape": Reproduction(other_studies.escape_check),
    "text": Reproduction(other_studies.language, findings=other_studies.equal_bytes),
    "text-variants": Reproduction(other_studies.variants, findings=other_studies.equal_bytes),
}
