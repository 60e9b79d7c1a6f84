"""Tables and figure: every group of models, and residuals from the line of dense models at equal pretraining loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.downstream.curvature import Curvature
from benchmarks.downstream.finetune import COMMON, RATES, Tuned, best_rate
from benchmarks.downstream.line import Line, Point, Residuals
from benchmarks.downstream.pretrain import Pretrained, Run
from benchmarks.rows_file import read_rows

COLORS = {"dense": "0.25", "Sign": "#d1495b", "DiLoCo": "#2e6f95"}
LABELS = {"dense": "dense", "Sign": "local updates, Sign, every 8", "DiLoCo": "DiLoCo, every 32"}


@dataclass(frozen=True)
class Model:
    """A pretrained model with its measurements; losses after fine-tuning by rate, 0: before it."""

    run: Run
    loss: float  # after pretraining
    second: dict[float, float]  # loss on the second text
    first: dict[float, float]  # loss on windows of the first text
    curvature: Curvature | None


@dataclass(frozen=True)
class Group:
    """The models of one method and length, one per seed."""

    method: str
    steps: int
    best: float  # rate of fine-tuning
    models: tuple[Model, ...]

    def points(self, y: "Measure") -> list[Point]:
        """Return a measurement of every model against its pretraining loss."""
        return [Point(model.run.seed, model.loss, y(model, self.best)) for model in self.models]


Measure = Callable[[Model, float], float]  # of a model and the best rate of its group
MEASURES: dict[str, Measure] = {
    "second text, best rate": lambda model, best: model.second[best],
    f"second text, rate {COMMON:g}": lambda model, best: model.second[COMMON],
    "second text, before fine-tuning": lambda model, best: model.second[0.0],
    "first text after fine-tuning, best rate": lambda model, best: model.first[best],
    f"first text after fine-tuning, rate {COMMON:g}": lambda model, best: model.first[COMMON],
}


def groups(out: Path) -> list[Group]:
    """Return the groups of fine-tuned models, dense ones first, by steps."""
    tuned = [t for t in read_rows(out / "finetuning.csv", Tuned.of_row, "fine-tuning") if t.inner == "adamw"]
    curvatures = {found.run: found for found in read_rows(out / "curvature.csv", Curvature.of_row, "certificate")}
    models = []
    for done in read_rows(out / "pretraining.csv", Pretrained.of_row, "pretraining"):
        mine = [t for t in tuned if t.run == done.run]
        if mine:
            second, first = {t.rate: t.loss for t in mine}, {t.rate: t.first for t in mine}
            models.append(Model(done.run, done.loss, second, first, curvatures.get(done.run)))
    keys = sorted({(model.run.method, model.run.steps) for model in models}, key=lambda key: (key[0] != "dense", key))
    return [
        Group(*key, best_rate(tuned, *key), tuple(m for m in models if (m.run.method, m.run.steps) == key))
        for key in keys
    ]


def residuals(found: Sequence[Group], measure: Measure) -> dict[tuple[str, int], Residuals]:
    """Return the residuals of each group of local updates from the line of all dense models."""
    line = Line.fit([point for group in found if group.method == "dense" for point in group.points(measure)])
    return {
        (group.method, group.steps): line.residuals(group.points(measure)) for group in found if group.method != "dense"
    }


def tables(out: Path) -> str:
    """Return the Markdown tables: losses by group, curvature by group, and residuals with their intervals."""
    found = groups(out)
    lines = [
        f"| | steps | pretraining loss | before | {' | '.join(f'{rate:g}' for rate in RATES)} | first text after |",
        "| --- " * (5 + len(RATES)) + "|",
    ]
    for group in found:
        cells = [
            *(LABELS[group.method], f"{group.steps:,}", _range([model.loss for model in group.models], 4)),
            *(_range([m.second[rate] for m in group.models if rate in m.second], 4) for rate in (0.0, *RATES)),
            _range([model.first[group.best] for model in group.models], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")

    # Curvature of the models that have it.
    lines += ["", "| | steps | gradient norm | lambda_min at most | lambda_max at least | trace |", "| --- " * 6 + "|"]
    for group in found:
        points = [model.curvature for model in group.models if model.curvature]
        if points:
            names = ("grad_norm", "lambda_min", "lambda_max", "trace")
            cells = [_range([getattr(point, name) for point in points], 3) for name in names]
            lines.append(f"| {LABELS[group.method]} | {group.steps:,} | {' | '.join(cells)} |")

    # Residuals: mean, 95% interval, range over seeds.
    columns = [(group.method, group.steps) for group in found if group.method != "dense"]
    lines += ["", "| | " + " | ".join(f"{LABELS[name]}, {steps:,} steps" for name, steps in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for name, measure in MEASURES.items():
        values = residuals(found, measure)
        lines.append(f"| {name} | " + " | ".join(str(values[column]) for column in columns) + " |")
    return "\n".join(lines)


def _range(values: Sequence[float], digits: int) -> str:
    """Return mean and range, or the only value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}g}"
    return f"{fmean(values):.{digits}g} ({min(values):.{digits}g} to {max(values):.{digits}g})"


def draw(out: Path, path: Path) -> None:
    """Draw the loss on the second text after fine-tuning and before it, against the pretraining loss."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    found = groups(out)
    titles = ("after fine-tuning, best rate", "before fine-tuning")
    names = ("second text, best rate", "second text, before fine-tuning")
    for axes, title, name in zip(panels, titles, names, strict=True):
        _panel(axes, found, MEASURES[name])
        axes.set(title=title, xlabel="loss after pretraining", ylabel="loss on the second text")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: Any, found: Sequence[Group], measure: Measure) -> None:
    """Draw every model, and the mean of the seeds' lines through dense ones."""
    for method, color in COLORS.items():
        points = [point for group in found if group.method == method for point in group.points(measure)]
        axes.plot([p.x for p in points], [p.y for p in points], "o", color=color, ms=5, alpha=0.8, label=LABELS[method])
        if method == "dense":
            line, ends = Line.fit(points), [min(p.x for p in points), max(p.x for p in points)]
            middle = fmean(line.intercepts.values())
            axes.plot(ends, [middle + line.slope * x for x in ends], color=color, lw=1)
    axes.grid(alpha=0.2)
