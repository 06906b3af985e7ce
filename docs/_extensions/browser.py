"""What browsers are given: formulas as MathML, and flags that no line breaks.

They draw MathML by themselves, without a script or a network.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_LOGGER = logging.getLogger(__name__)
_COMMANDS = re.compile(r'<div class="highlight-bash.*?</pre>', re.DOTALL)
# Otherwise a line would end behind the hyphens. A flag is no part of a tag.
_FLAG = re.compile(r"(?<![\w-])--\w[\w.]*(?![^<]*>)")


def setup(app: Sphinx) -> dict[str, Any]:
  """Adds the renderer, which `html_math_renderer` chooses."""
  app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
  app.connect("html-page-context", _hold_flags)
  return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
  translator.body.append(_mathml(node, as_block=False))
  raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
  translator.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>\n')
  raise nodes.SkipNode


def _mathml(node: nodes.Element, *, as_block: bool) -> str:
  try:
    return str(latex2mathml.tex2mathml(node.astext(), as_block=as_block))
  except MathError as error:
    _LOGGER.warning("formula %r: %s", node.astext(), error, location=node)
    return ""


def _hold_flags(
  app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
  def hold(block: re.Match[str]) -> str:
    return _FLAG.sub(r'<span class="flag">\g<0></span>', block[0])

  if "body" in context:
    context["body"] = _COMMANDS.sub(hold, context["body"])
