"""The paper's figures and table from real data, and studies beside them: configurations, runs, summaries, figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packsaddle.curves import Curve
from packsaddle.reproduce import beyond, figure1, figure2
from packsaddle.reproduce.study import Data, Scale, Study


@dataclass(frozen=True)
class Reproduction:
    """A study, the figure drawn from its curves, and what its summary says in words."""

    study: Callable[[Scale, Data], Study]
    draw: Callable[[Sequence[Curve]], Any] | None = None  # None: the chart that any runs get
    findings: Callable[[Mapping[str, Any], Sequence[Curve]], list[str]] | None = None


REPRODUCTIONS: dict[str, Reproduction] = {
    "fig1": Reproduction(figure1.study, figure1.draw, figure1.findings),
    "fig1-norms": Reproduction(figure1.norms),
    "fig1-compressors": Reproduction(beyond.resnet_compressors, findings=beyond.equal_bytes),
    "fig2": Reproduction(figure2.study, figure2.draw, figure2.findings),
    "fig2-open": Reproduction(beyond.open_points),
    "fig2-compressors": Reproduction(beyond.compressors, findings=beyond.equal_bytes),
    "fig2-k": Reproduction(beyond.ratios, findings=beyond.equal_bytes),
    "fig2-escape": Reproduction(beyond.escape_check),
    "text": Reproduction(beyond.language, findings=beyond.equal_bytes),
    "text-variants": Reproduction(beyond.variants, findings=beyond.equal_bytes),
}
