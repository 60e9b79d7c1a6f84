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
    """Return a Markdown table. Line breaks in cells are replaced by spaces, and bars are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Return the Markdown of a table's cell: one line, in which bars, and outside of code also * and <, are escaped."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", "\\|"))
    return "".join(p if p.startswith("`") else re.sub(r"([*<])", r"\\\1", p) for p in pieces)


def directive(markdown: Callable[[], str]) -> type[SphinxDirective]:
    """Return a Sphinx directive that inserts the Markdown text which a function returns, including its headings."""

    class Inserted(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # rebuild the page every time, since it depends on the code and not on its file
            lines = StringList(markdown().splitlines(), source=markdown.__module__)
            parent = nodes.Element()
            self.state.nested_parse(lines, self.content_offset, parent, match_titles=True)
            return list(parent.children)

    return Inserted


def setup(app: Sphinx) -> dict[str, bool]:
    """Register one directive per module of this package, such as "generated-configuration". Sphinx calls this."""
    from lab.docs.generated import commands, compressors, configuration, metrics

    for module in (commands, compressors, configuration, metrics):
        app.add_directive(f"generated-{module.__name__.rpartition('.')[2]}", directive(module.markdown))
    app.add_directive("generated-compressor-classes", directive(compressors.classes))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
