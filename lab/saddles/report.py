"""The study's results: certificates, a table of times, and the figure."""

import csv
import statistics
from pathlib import Path

import torch

from lab.paper.power_law import exponent
from lab.saddles.escape import certify, follow
from lab.saddles.methods import METHODS
from lab.saddles.saddle import KINDS, Saddle
from lab.saddles.search import Rows, sides

CERTIFIED_SIDE = 16
THRESHOLD = 0.02  # epsilon of the first certificate, for which -sqrt(rho epsilon) is above the saddle's -GAMMA
FIGURE = {
    "SGD": "0.15",
    "AdamW": "#e8871e",
    "Muon": "#d1495b",
    "RandomK 1/16": "#2e6f95",
    "TopK 1/16": "#6a994e",
    "AdamW, 4 workers, local updates, Sign": "#8d6a9f",
}


def table(rows: Rows) -> str:
    """Return a Markdown table per kind: median and range of steps by d, and the exponent of d."""
    lines = []
    for kind in KINDS:
        heads = " | ".join(f"d = {n * n:,}" for n in sides(kind))
        lines += [f"\n**{kind}**\n", f"| method | {heads} | exponent of d |", "| --- " * (len(sides(kind)) + 2) + "|"]
        for method in METHODS:
            cells = [_cell(rows, method, kind, n) for n in sides(kind)]
            if any(cells):
                lines.append(f"| {method} | {' | '.join(cells)} | {_exponent(rows, method, kind)} |")
    return "\n".join(lines)


def _cell(rows: Rows, method: str, kind: str, n: int) -> str:
    found = [row.steps for row in rows.best((method, kind, n))]
    if found:
        return f"{statistics.median(found):,.0f} ({min(found):,} to {max(found):,})"
    if rows.stays((method, kind, n)):
        return "never"
    return "no rate" if rows.of((method, kind, n)) else ""


def _exponent(rows: Rows, method: str, kind: str) -> str:
    groups = {float(n * n): [float(row.steps) for row in rows.best((method, kind, n))] for n in sides(kind)}
    measured = {d: steps for d, steps in groups.items() if steps}
    return str(exponent(measured)) if len(measured) > 2 else ""


def certificates(rows: Rows, path: Path) -> None:
    """Certify seed 0 of each method at its rate: at the saddle, at the first |s| >= 1/2, and the mean at the end."""
    kind = next(iter(KINDS))
    saddle = Saddle(CERTIFIED_SIDE, kind, 0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "d", "where", "s", "grad_norm", "lambda_min_lower", "lambda_min_upper", "verdict"])
        for method in METHODS:
            found = rows.best((method, kind, saddle.n))
            if not found:
                continue
            record = follow(method, saddle, found[0].lr)
            at = {"start": torch.zeros(saddle.n, saddle.n), "on the way": record.left_at, "end": record.mean}
            for where, w in at.items():
                if w is None:
                    continue
                c = certify(w, saddle, THRESHOLD if where == "start" else None)
                numbers = (float((saddle.direction() * w).sum()), c.grad_norm, c.lambda_min_lower, c.lambda_min_upper)
                writer.writerow([method, w.numel(), where, *(f"{x:.4f}" for x in numbers), c.verdict])


def draw(rows: Rows, path: Path) -> None:
    """Draw median steps with the range of seeds against d, a panel per kind of saddle."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    figure, panels = plt.subplots(1, len(KINDS), figsize=(15, 4.2), layout="constrained", sharey=True)
    for axes, kind in zip(panels, KINDS, strict=True):
        for method, color in FIGURE.items():
            found = {n: [row.steps for row in rows.best((method, kind, n))] for n in sides(kind)}
            points = [(n * n, steps) for n, steps in found.items() if steps]
            if not points:
                continue
            ds = [d for d, _ in points]
            axes.plot(
                ds, [statistics.median(s) for _, s in points], color=color, lw=1.8, marker="o", ms=4, label=method
            )
            axes.fill_between(
                ds, [min(s) for _, s in points], [max(s) for _, s in points], color=color, alpha=0.12, lw=0
            )
        axes.set(xscale="log", yscale="log", xlabel="dimension d")
        ticks = [n * n for n in sides(kind)]
        axes.set_xticks(ticks, [f"{d:,}" for d in ticks])
        axes.minorticks_off()
        axes.set_title(kind, fontsize=10)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("steps until it has left the saddle")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
