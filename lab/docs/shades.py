"""A Sphinx extension: an HTML <picture> with a light and a dark image follows the site's theme.

In Markdown the code host shows the image that suits the reader's system:

    <picture>
    <source media="(prefers-color-scheme: dark)" srcset="pictures/wire-dark.svg">
    <img alt="..." src="pictures/wire-light.svg">
    </picture>

A reader of the site may have switched the theme by hand, so here both images become nodes with Furo's classes for them.
"""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class Shades(SphinxTransform):
    """Replace each <picture> in a page by its light and its dark image."""

    default_priority = 100  # low, so that this runs before Sphinx collects images

    def apply(self) -> None:
        for node in list(self.document.findall(nodes.raw)):
            if node.astext().startswith("<picture>"):
                node.replace_self(images(node.astext()))


def images(html: str) -> list[nodes.image]:
    """Return the light and the dark image of a <picture>. Raises ValueError if an attribute is missing."""
    found = [re.search(rf'\b{name}="([^"]+)"', html) for name in ("src", "srcset", "alt")]
    if None in found:
        raise ValueError(f"a <picture> must have src, srcset and alt: {html}")
    light, dark, alt = (" ".join(match[1].split()) for match in found if match)
    return [
        nodes.image(uri=uri, alt=alt, classes=[shade]) for uri, shade in ((light, "only-light"), (dark, "only-dark"))
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(Shades)
    return {"parallel_read_safe": True}
