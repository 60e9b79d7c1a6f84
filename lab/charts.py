"""Charts for light and dark pages: NAME-light.svg, and NAME-dark.svg with the same marks in lighter colors."""

import colorsys
import re
from io import StringIO
from pathlib import Path
from typing import Any


def save(figure: Any, path: Path, source: str | None = None) -> list[Path]:
    """Write a matplotlib figure as path-light.svg and path-dark.svg, and return both paths. Text remains text.

    Positions are rounded to a tenth of a point. `source` is stored in the metadata.
    """

    def rounded(path: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path[0]).replace(" \nL ", " ")

    return write(re.sub(r' d="[^"]*"', rounded, svg_of(figure, source)), path)


def svg_of(figure: Any, source: str | None = None, **options: Any) -> str:
    """Return a matplotlib figure as SVG, identical in every run. Text is not converted to outlines."""
    import matplotlib as mpl

    out = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "packsaddle"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Source": source}, **options)
    return out.getvalue()


def write(svg: str, path: Path) -> list[Path]:
    """Write an SVG with black text and a white background as path-light.svg and path-dark.svg, both transparent."""
    clear = re.sub(r"(fill: )#ffffff", r"\1none", svg)
    dark = re.sub(r"#[0-9a-f]{6}\b", _lighter, clear).replace("<svg ", '<svg fill="#e6edf3" ', 1)
    files = [path.with_name(f"{path.name}-{shade}.svg") for shade in ("light", "dark")]
    for file, text in zip(files, (clear, dark), strict=True):
        file.write_text(re.sub(r" +$", "", text, flags=re.MULTILINE))
    return files


def picture(alt: str, path: str) -> str:
    """Return the HTML <picture> of a chart's light and dark files; `lab.docs.shades` adapts it to the site's theme."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">'
    return f'<picture>\n{dark}\n<img alt="{alt}"\nsrc="{path}-light.svg">\n</picture>'


def _lighter(color: re.Match[str]) -> str:
    """Return a color for a dark page: grays are inverted, and dark colors are lighter."""
    red, green, blue = (int(color[0][i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
    light = 1 - light if saturation < 0.15 else max(light, 1 - light)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, light, saturation))
