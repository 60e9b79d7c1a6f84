"""The picture of docs/architecture.md, drawn from the imports in the code.

make picture
"""

import ast
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from lab import charts

REPOSITORY = Path(__file__).parents[2]
ROOT = REPOSITORY / "src" / "packsaddle"


def packages() -> list[str]:
    return sorted(p.name for p in ROOT.iterdir() if (p / "__init__.py").exists())


def edges() -> Counter[tuple[str, str]]:
    """Return, for each pair (importing package, imported package), the number of files with such an import."""
    found: Counter[tuple[str, str]] = Counter()
    names = packages()
    for name in names:
        for path in (ROOT / name).rglob("*.py"):
            imported = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("packsaddle."):
                    imported.add(str(node.module).split(".")[1])
                elif isinstance(node, ast.ImportFrom) and node.module == "packsaddle":
                    imported |= {alias.name for alias in node.names}
            found.update((name, other) for other in imported & set(names) - {name})
    return found


def direct(arrows: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Return the arrows that no chain of arrows implies: a -> c is dropped if there is a chain a -> b -> ... -> c."""

    def reach(name: str) -> set[str]:
        below = {b for a, b in arrows if a == name}
        return below.union(*(reach(b) for b in below)) if below else set()

    implied = {(a, c) for a, b in arrows for c in reach(b)}
    return Counter({arrow: n for arrow, n in arrows.items() if arrow not in implied})


def levels(arrows: Counter[tuple[str, str]]) -> dict[str, int]:
    """Return each package's height in the picture: one more than the highest package that it imports, or 0."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = max((1 + height(b) for a, b in arrows if a == name), default=0)
        return heights[name]

    return {name: height(name) for name in packages()}


def draw(out: Path) -> None:
    arrows = edges()
    heights = levels(arrows)
    rows: dict[int, list[str]] = {}
    for name, row in sorted(heights.items()):
        rows.setdefault(row, []).append(name)
    figure, axes = plt.subplots(figsize=(6.5, 0.95 * len(rows) + 0.4), layout="constrained")
    width, places = 2.7, {}
    for row, names in rows.items():
        for i, name in enumerate(names):
            places[name] = (3.2 * (i - (len(names) - 1) / 2) + 0.9 * (-1) ** row * (len(names) == 1), 1.5 * row)
    for (a, b), files in direct(arrows).items():
        (x1, y1), (x2, y2) = places[a], places[b]
        style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": "0.55", "lw": 0.5 + min(files, 20) / 12}
        axes.add_patch(FancyArrowPatch((x1, y1 - 0.36), (x2, y2 + 0.36), zorder=1, **style))
    for name, (x, y) in places.items():
        corner, style = (x - width / 2, y - 0.34), "round,pad=0.05"
        box = FancyBboxPatch(corner, width, 0.68, boxstyle=style, facecolor="0.95", edgecolor="C0", zorder=2)
        axes.add_patch(box)
        files = len(list((ROOT / name).rglob("*.py")))
        axes.text(x, y + 0.12, name, ha="center", va="center", weight="bold", fontsize=11, zorder=3)
        axes.text(x, y - 0.14, f"{files} files", ha="center", va="center", fontsize=10, zorder=3)
    xs = [x for x, _ in places.values()]
    axes.set_xlim(min(xs) - 1.4, max(xs) + 1.4)
    axes.set_ylim(-0.6, 1.5 * (len(rows) - 1) + 0.6)
    axes.axis("off")
    charts.save(figure, out)


if __name__ == "__main__":
    draw(REPOSITORY / "docs" / "architecture")
