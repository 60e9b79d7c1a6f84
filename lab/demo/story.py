"""A page of the demo, as HTML and as text for the terminal: a sentence, one chart, what happened, what to do next."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from textwrap import wrap
from typing import Any

from packsaddle.cli.certificate_figure import COLOURS, NO_METADATA, STYLE
from packsaddle.errors import require

SIZES = {"wide": (7.2, 3.9), "narrow": (3.7, 3.7)}  # inches of the chart on a screen of 1,280 and of 390 pixels


@dataclass(frozen=True)
class Story:
    """The text, the chart and the table of one page."""

    title: str
    result: str  # one sentence
    draw: Callable[[Any, bool], None]  # draws the chart on matplotlib's axes; the second argument is True if narrow
    caption: str  # what the chart shows
    happened: Sequence[str]  # three sentences
    code: str  # the lines that do this with the reader's own model
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    details: Sequence[str]  # paragraphs that are folded away

    def text(self) -> str:
        """Return the page's sentences and table for the terminal."""
        cells = [list(self.headings), *map(list, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headings))]
        lines = []
        for row in cells:
            numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
        table = "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
        code = "\n".join(f"    {line}" for line in self.code.splitlines())
        parts = (self.title, self.result, table, " ".join(self.happened), "With your own model:", code)
        return "\n\n".join(
            "\n".join(wrap(part, 100)) if part is not table and part is not code else part for part in parts
        )

    def write(self, path: Path, other: tuple[str, str]) -> None:
        """Write the page to a new file. `other` is the file name and the title of the other page, for a link."""
        head, *rows = self.headings, *self.rows
        template = Template(files("lab.demo").joinpath("page.html").read_text(encoding="utf-8"))
        page = template.substitute(
            title=escape(self.title),
            result=escape(self.result),
            wide=self._svg("wide"),
            narrow=self._svg("narrow"),
            caption=escape(self.caption),
            happened="\n".join(f"<li>{escape(sentence)}</li>" for sentence in self.happened),
            code=escape(self.code),
            head="".join(f"<th>{escape(cell)}</th>" for cell in head),
            rows="\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows),
            details="\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in self.details),
            other=f'<a href="{escape(other[0])}">{escape(other[1])}</a>' if other[0] else "",
        )
        path.write_text(page, encoding="utf-8", newline="")

    def _svg(self, size: str) -> str:
        """Return the chart as an <svg> element whose colors are the page's CSS variables --c0, --c1, ..., and --ink."""
        require("matplotlib", "lab", "drawing the demo's charts")
        import matplotlib as mpl
        from matplotlib.figure import Figure

        own = {"svg.fonttype": "none", "svg.hashsalt": f"{self.title} {size}", "font.size": 11, "grid.alpha": 0.5}
        with mpl.rc_context(STYLE | own):
            figure, file = Figure(figsize=SIZES[size], layout="constrained"), io.StringIO()
            self.draw(figure.subplots(), size == "narrow")
            figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
        svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue()[file.getvalue().index("<svg") :], flags=re.DOTALL)
        for i, color in enumerate(COLOURS[1:], 1):
            svg = svg.replace(color.lower(), f"var(--c{i})")
        svg = svg.replace("#000000", "var(--ink)").replace("#b0b0b0", "var(--grid)")
        svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit; font-family: inherit", svg)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.caption)}" fill="var(--ink)" ', 1)
