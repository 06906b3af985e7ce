"""Links that work on GitHub and on the site.

Pages link to each other and to files of the repository by relative paths, as GitHub
needs them. The site has none of those files: there, a link to one leads to the
repository. `colabs` is a symbolic link, which GitHub does not follow, so pages link to
the notebooks by their real paths, and these are found here.
"""

import os
import pathlib
import re
from typing import Any

from sphinx.application import Sphinx

# Images are copied into the site: only links are changed.
_LINK = re.compile(r"(?<![!\\])(\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#:]+)(#[^)\s]*)?\)")


def setup(app: Sphinx) -> dict[str, Any]:
  """Connects the extension with Sphinx's events."""
  app.add_config_value("repository_links_root", None, "env", str)
  app.add_config_value("repository_links_address", None, "env", str)
  app.connect("source-read", _rewrite)
  return {"parallel_read_safe": True, "parallel_write_safe": True}


def _rewrite(app: Sphinx, docname: str, content: list[str]) -> None:
  root = pathlib.Path(app.config.repository_links_root)
  page = pathlib.Path(app.env.doc2path(docname))
  pages = {
    pathlib.Path(app.env.doc2path(name)).resolve(): app.env.doc2path(name)
    for name in app.env.found_docs
  }

  def rewrite(match: re.Match[str]) -> str:
    start, path, section = match.groups(default="")
    target = (page.resolve().parent / path).resolve()
    if target in pages:
      path = os.path.relpath(pages[target], page.parent)
    elif target.exists() and target.is_relative_to(root):
      kind = "tree" if target.is_dir() else "blob"
      address = app.config.repository_links_address.format(kind=kind)
      path = f"{address}/{target.relative_to(root).as_posix()}"
    return f"{start}{path}{section})"

  content[0] = _LINK.sub(rewrite, content[0])
