"""The site: the repository's root is Sphinx's source folder, so that links between pages work here as on the code host.

make docs, or: sphinx-build -W -n --keep-going -c docs . build/docs
"""

import sys
from pathlib import Path

from packsaddle import __version__

sys.path.insert(0, str(Path(__file__).parents[1]))  # lab, which has the extensions

project = "packsaddle"
author = "the packsaddle authors"
copyright = "the packsaddle authors, Apache 2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_design"]
extensions += [f"lab.docs.{name}" for name in ("docstrings", "generated", "shades")]
root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "GOVERNANCE.md",
    "docs/**.md",
    "examples/README.md",
    "experiments/README.md",
    "experiments/*/*.md",
    "lab/bench/*.md",
]
exclude_patterns = [".*", "build", "runs", "src", "tests"]  # an environment's folder has 20,000 files
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]

smartquotes = False  # symbols stay plain ASCII

autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# Types of other packages have their documentation elsewhere, and inventories would need a network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|contextlib|typing|pathlib|nn|Tensor|T)(\..*)?"),
]

html_theme = "furo"
html_title = f"packsaddle {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_logo = "static/logo.svg"
html_extra_path = ["site"]
html_show_sourcelink = False
html_copy_source = False
