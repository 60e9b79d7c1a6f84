"""The paper's figures and table from real data, and further studies: configurations, runs, summaries, figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.paper import drawing, figure1, figure2, other_studies
from lab.paper.study import Data, Scale, Study
from lab.runs.report import Curve


@dataclass(frozen=True)
class Reproduction:
    """A study, with functions that draw its figure from the curves and state its findings in words."""

    study: Callable[[Scale, Data], Study]
    findings: Callable[[Mapping[str, Any], Sequence[Curve]], list[str]] | None = None
    draw: Callable[[Sequence[Curve]], Any] = drawing.grid


REPRODUCTIONS: dict[str, Reproduction] = {
    "fig1": Reproduction(figure1.study, figure1.findings),
    "fig1-norms": Reproduction(figure1.norms),
    "fig1-compressors": Reproduction(other_studies.resnet_compressors, other_studies.equal_bytes),
    "fig2": Reproduction(figure2.study, figure2.findings, figure2.draw),
    "fig2-open": Reproduction(other_studies.open_points),
    "fig2-compressors": Reproduction(other_studies.compressors, other_studies.equal_bytes),
    "fig2-k": Reproduction(other_studies.ratios, other_studies.equal_bytes),
    "fig2-escape": Reproduction(other_studies.escape_check),
    "text": Reproduction(other_studies.language, other_studies.equal_bytes),
    "text-variants": Reproduction(other_studies.variants, other_studies.equal_bytes),
}
