"""A canvas for the documentation's pictures and charts: themes, marks and text, and output as SVG with selectable text.

One unit of length is one point of matplotlib.
"""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from lab import charts

WIDTH = 560
TEXT = 18  # the smallest font size, in units of the canvas
STYLE = {"font.size": TEXT, "lines.solid_capstyle": "round"}


@dataclass(frozen=True)
class Theme:
    """The colors of a picture, which has a transparent background."""

    ink: str
    muted: str
    fill: str
    page: str  # color of the page, for the area behind text that crosses a line
    first: str  # color of worker 1 and of computed values
    second: str  # color of worker 2
    kept: str  # color of residuals
    level: str  # color of contour lines


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#eef1f4", "#ffffff", "#0969da", "#bc4c00", "#1a7f37", "#c3ccd5"),
    "dark": Theme("#e6edf3", "#a4afba", "#262c34", "#131416", "#6cb6ff", "#f69d50", "#57c264", "#444c56"),
}


@dataclass(frozen=True)
class Canvas:
    """A picture to draw on. Marks have positions (x, y) in units of the canvas, where y increases downward."""

    axes: Axes
    theme: Theme

    def text(self, x: float, y: float, words: str, color: str = "", wrap: int = 99, **options: object) -> None:
        """Write `words`, starting at (x, y), in lines of at most `wrap` letters."""
        style = {"color": color or self.theme.ink, "fontsize": TEXT, "va": "center", **options}
        for i, line in enumerate(textwrap.wrap(words, wrap)):
            self.axes.text(x, y + 1.3 * TEXT * i, line, **style)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = "", **options: object) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 16, "lw": 2, "shrinkA": 0, "shrinkB": 0, **options}
        self.axes.add_patch(FancyArrowPatch(start, end, color=color or self.theme.muted, zorder=3, **style))

    def box(self, x: float, y: float, width: float, height: float, color: str = "", **options: object) -> None:
        """Draw a box of the given width and height, whose upper left corner is (x, y)."""
        style = {"facecolor": self.theme.fill, "edgecolor": color or self.theme.muted, "lw": 1.5, **options}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=8", **style))

    def dot(self, x: float, y: float, color: str, size: float = 7) -> None:
        self.axes.add_patch(Circle((x, y), size, color=color, zorder=4, lw=0))


def svg(draw: Callable[[Canvas], None], height: int, theme: Theme) -> str:
    """Return the SVG of a picture in a theme. `draw` draws it on a canvas of the given height."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        axes.axis("off")
        draw(Canvas(axes, theme))
        found = charts.svg_of(figure, transparent=True)
        plt.close(figure)
    return re.sub(r'(width|height)="(\d+)pt"', r'\1="\2"', found)
