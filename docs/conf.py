"""How Sphinx makes the site out of these pages and the docstrings: `make docs`."""

import importlib.metadata
import pathlib
import sys
import tomllib

_FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(_FOLDER / "_extensions"))

project = "skipinit_jax"
author = "The skipinit_jax authors"
version = release = importlib.metadata.version(project)
project_copyright = author

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
  "browser",
  "repository_links",
  "written_signatures",
]
exclude_patterns = ["_build", "_extensions", "_static"]

# On the site, links to files that are not pages lead to the repository, or, as long as
# that has no address, to the files beside.
_TOOLS = tomllib.loads((_FOLDER.parent / "pyproject.toml").read_text("utf-8"))["tool"]
repository_links_address = _TOOLS["skipinit_jax"]["repository"]
repository_links_root = str(_FOLDER.parent)

# From and to notebooks: see repository_links.
myst_url_schemes = {
  **dict.fromkeys(("http", "https", "mailto")),
  "page": {"url": "{{path}}"},
  "section": {"url": "{{path}}#{{fragment}}"},
}
myst_enable_extensions = ["dollarmath"]
# Links to sections, as GitHub names them.
myst_heading_anchors = 3
# Notebooks are shown with the outputs that are stored in them.
nb_execution_mode = "off"
# With tables, which plain CommonMark has not.
nb_render_markdown_format = "gfm"

# In docstrings, `name` is code, and a link where something has that name.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
  ("py:obj", "(?s).*"),
  # Annotations name other packages, which cannot be linked without a network, and our
  # own aliases of types.
  ("py:.*", r"(?!skipinit_jax\.).*"),
]
# Members of a module are those of its `__all__`.
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
# The fields of a class are what its constructor takes.
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = project
