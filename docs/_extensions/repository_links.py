"""Links that work on GitHub and on the site.

Pages link to each other and to files of the repository by relative paths, as GitHub
needs them. The site has none of those files: there, a link to one leads to the
repository, or to the file in the checkout as long as the repository has no address.

The folder of notebooks is outside of docs/, which has a symbolic link to it. GitHub
does not follow that, so links name the notebooks, and notebooks name pages, by their
real paths. MyST would look for those from the wrong folder, and gets addresses instead.
In Colab no relative path leads anywhere, so notebooks also name pages by their
addresses in the repository, and those become links within the site here.
"""

import os
import pathlib
import re
from typing import Any

from sphinx.application import Sphinx

# Images are copied into the site: only links are changed.
_LINK = re.compile(r"(?<![!\\])(\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)(#[^)\s]*)?\)")


def setup(app: Sphinx) -> dict[str, Any]:
  """Connects the extension with Sphinx's events."""
  app.add_config_value("repository_links_root", None, "env", str)
  app.add_config_value("repository_links_address", "", "env", str)
  app.connect("source-read", _rewrite)
  return {"parallel_read_safe": True, "parallel_write_safe": True}


def _rewrite(app: Sphinx, docname: str, content: list[str]) -> None:
  root = pathlib.Path(app.config.repository_links_root)
  page = pathlib.Path(app.env.doc2path(docname))
  pages = {
    pathlib.Path(app.env.doc2path(name)).resolve(): app.env.doc2path(name)
    for name in app.env.found_docs
  }

  address = app.config.repository_links_address
  prefix = f"{address}/blob/main/"

  def rewrite(match: re.Match[str]) -> str:
    start, path, section = match.groups(default="")
    if address and path.startswith(prefix):
      target = root / path.removeprefix(prefix)
    elif ":" in path:
      return match[0]
    else:
      target = (page.resolve().parent / path).resolve()
    if target in pages:
      to = pathlib.Path(pages[target])
      if page.resolve() != page or to.resolve() != to:
        scheme = "section" if section else "page"
        path = f"{scheme}:{os.path.relpath(to.with_suffix('.html'), page.parent)}"
    elif target.exists() and target.is_relative_to(root):
      kind = "tree" if target.is_dir() else "blob"
      path = f"{address}/{kind}/main/{target.relative_to(root).as_posix()}"
      if not address:
        built = pathlib.Path(app.outdir, docname).parent
        path = f"page:{os.path.relpath(target, built)}"
    return f"{start}{path}{section})"

  content[0] = _LINK.sub(rewrite, content[0])
