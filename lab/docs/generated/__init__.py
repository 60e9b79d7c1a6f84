"""A Sphinx extension: reference tables that are made from the code when the site is built.

Each module writes one page's tables as Markdown, by a function `markdown`; a directive of the same name inserts it.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a line break or a bar in a cell does not end it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Outside of code, symbols stay what they are."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", "\\|"))
    return "".join(p if p.startswith("`") else re.sub(r"([*<])", r"\\\1", p) for p in pieces)


def directive(markdown: Callable[[], str]) -> type[SphinxDirective]:
    """Return the directive that inserts what a function writes, headings included."""

    class Inserted(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # the page follows the code, not its own file
            lines = StringList(markdown().splitlines(), source=markdown.__module__)
            parent = nodes.Element()
            self.state.nested_parse(lines, self.content_offset, parent, match_titles=True)
            return list(parent.children)

    return Inserted


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives: generated-configuration and so on."""
    from lab.docs.generated import commands, compressors, configuration, metrics

    for module in (commands, compressors, configuration, metrics):
        app.add_directive(f"generated-{module.__name__.rpartition('.')[2]}", directive(module.markdown))
    app.add_directive("generated-compressor-classes", directive(compressors.classes))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
