"""Tables and figure: every group of models, and residuals from the line of dense models at equal pretraining loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lab.bench.rows_file import read_rows
from lab.downstream.curvature import Curvature
from lab.downstream.finetune import RATES, Tuned
from lab.downstream.line import Line, Point, Residuals
from lab.downstream.pretrain import EQUAL, Pretrained, Run

COMPARED = (0.001, 0.002, 0.004)  # rates at which all methods are compared
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
    models: tuple[Model, ...]

    @property
    def best(self) -> float:
        """The rate of fine-tuning with the lowest mean loss, of those that all of the group's models have."""
        rates = [rate for rate in RATES if all(rate in model.second for model in self.models)]
        return min(rates, key=lambda rate: fmean(model.second[rate] for model in self.models))

    def points(self, y: "Measure") -> list[Point]:
        """Return a measurement of every model against its pretraining loss."""
        return [Point(model.run.seed, model.loss, y(model, self.best)) for model in self.models]


BEST = "second text, best rate"
Measure = Callable[[Model, float], float]  # of a model and the best rate of its group
MEASURES: dict[str, Measure] = {
    BEST: lambda model, best: model.second[best],
    "second text, before fine-tuning": lambda model, best: model.second[0.0],
    "first text, best rate": lambda model, best: model.first[best],
}


def groups(out: Path) -> list[Group]:
    """Return the groups of fine-tuned models, dense ones first, by steps."""
    tuned = read_rows(out / "finetuning.csv", Tuned.of_row, "fine-tuning")
    curvatures = {found.run: found for found in read_rows(out / "curvature.csv", Curvature.of_row, "certificate")}
    models = []
    for done in read_rows(out / "pretraining.csv", Pretrained.of_row, "pretraining"):
        mine = [t for t in tuned if t.run == done.run]
        second, first = {t.rate: t.loss for t in mine}, {t.rate: t.first for t in mine}
        if len(second) > 1:
            models.append(Model(done.run, done.loss, second, first, curvatures.get(done.run)))
    keys = sorted({(model.run.method, model.run.steps) for model in models}, key=lambda key: (key[0] != "dense", key))
    return [Group(*key, tuple(m for m in models if (m.run.method, m.run.steps) == key)) for key in keys]


def residuals(found: Sequence[Group], measure: Measure) -> dict[str, Residuals]:
    """Return the residuals of each method of local updates from the line of all dense models."""
    line = Line.fit([point for group in found if group.method == "dense" for point in group.points(measure)])
    return {group.method: line.residuals(group.points(measure)) for group in found if group.method != "dense"}


def differences(found: Sequence[Group], rate: float) -> dict[str, list[float]]:
    """Return the losses after fine-tuning at a rate minus those of the dense models of `EQUAL` with the same seeds."""
    losses = {(g.method, g.steps): {m.run.seed: m.second[rate] for m in g.models if rate in m.second} for g in found}
    dense = losses[EQUAL[0]]
    return {key[0]: [loss - dense[s] for s, loss in losses[key].items() if s in dense] for key in EQUAL[1:]}


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
            *(_range([m.second[r] for m in group.models if r in m.second], 4) for r in (0.0, *RATES)),
            _range([model.first[group.best] for model in group.models], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")

    # Curvature of the models that have it.
    lines += [
        "",
        "| | steps | gradient norm | lambda_min at most | lambda_max at least | trace | norm |",
        "| --- " * 7 + "|",
    ]
    for group in found:
        points = [model.curvature for model in group.models if model.curvature]
        if points:
            names = ("grad_norm", "lambda_min", "lambda_max", "trace", "weight_norm")
            cells = [_range([getattr(point, name) for point in points], 3) for name in names]
            lines.append(f"| {LABELS[group.method]} | {group.steps:,} | {' | '.join(cells)} |")

    # Residuals with their intervals, and differences at each rate.
    methods = [method for method, _ in EQUAL[1:]]
    lines += ["", f"| | {' | '.join(LABELS[method] for method in methods)} |", "| --- " * (len(methods) + 1) + "|"]
    for name, measure in MEASURES.items():
        values = residuals(found, measure)
        lines.append(f"| {name} | {' | '.join(str(values[method]) for method in methods)} |")
    for rate in COMPARED:
        values_at = differences(found, rate)
        lines.append(
            f"| second text, rate {rate:g} | {' | '.join(_range(values_at[method], 3) for method in methods)} |"
        )
    return "\n".join(lines)


def _range(values: Sequence[float], digits: int) -> str:
    """Return mean and range, or the only value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}g}" if values else "-"
    return f"{fmean(values):.{digits}g} ({min(values):.{digits}g} to {max(values):.{digits}g})"


def draw(out: Path, path: Path) -> None:
    """Draw the loss on the second text against the rate of fine-tuning, and against the pretraining loss."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    found = groups(out)

    # By rate: means and ranges of the models of about equal pretraining loss.
    for group in found:
        if (group.method, group.steps) in EQUAL:
            rates = [rate for rate in RATES if all(rate in model.second for model in group.models)]
            losses = [[model.second[rate] for model in group.models] for rate in rates]
            color = COLORS[group.method]
            left.plot(rates, [fmean(x) for x in losses], "o-", color=color, ms=4, label=LABELS[group.method])
            left.fill_between(rates, [min(x) for x in losses], [max(x) for x in losses], color=color, alpha=0.15, lw=0)
    left.set(xscale="log", xlabel="learning rate of fine-tuning", ylabel="loss on the second text after fine-tuning")
    left.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    left.minorticks_off()

    # By pretraining loss: every model at the best rate of its group, and the mean of the seeds' lines.
    measure = MEASURES[BEST]
    for method, color in COLORS.items():
        points = [point for group in found if group.method == method for point in group.points(measure)]
        right.plot([p.x for p in points], [p.y for p in points], "o", color=color, ms=5)
        if method == "dense":
            line, ends = Line.fit(points), [min(p.x for p in points), max(p.x for p in points)]
            middle = fmean(line.intercepts.values())
            right.plot(ends, [middle + line.slope * x for x in ends], color=color, lw=1)
    right.set(xlabel="loss after pretraining", ylabel="the same at the best rate")

    for axes in (left, right):
        axes.grid(alpha=0.2)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
