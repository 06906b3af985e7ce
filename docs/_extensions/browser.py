"""What browsers are given: formulas as MathML, and marks for the style sheet.

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
_LITERAL = re.compile(r'<code class="[^"]*literal.*?</code>', re.DOTALL)
# Where a name that is too long for a line may end it.
_JOINT = re.compile(r"[_.](?=[A-Za-z])(?![^<]*>)")
# Otherwise a line would end behind the hyphens. A flag is no part of a tag.
_FLAG = re.compile(r"(?<![\w-])--\w[\w.]*(?![^<]*>)")
_PRINTED = re.compile(r"<pre>.*?</pre>", re.DOTALL)
_VERDICT = re.compile(r"<td>(?=<p>(holds|does not hold)</p></td>)")
_CLASSES = {"holds": "good", "does not hold": "bad"}


def setup(app: Sphinx) -> dict[str, Any]:
  """Adds the renderer, which `html_math_renderer` chooses."""
  app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
  app.connect("html-page-context", _mark)
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


def _mark(
  app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
  """Marks flags, tables that a cell printed, and verdicts on claims."""

  def flags(block: re.Match[str]) -> str:
    return _FLAG.sub(r'<span class="flag">\g<0></span>', block[0])

  def literal(block: re.Match[str]) -> str:
    return _JOINT.sub(r"\g<0><wbr>", flags(block))

  def table(block: re.Match[str]) -> str:
    drawn = "━" in block[0]
    return block[0].replace("<pre>", '<pre class="drawn">') if drawn else block[0]

  def verdict(cell: re.Match[str]) -> str:
    return f'<td class="{_CLASSES[cell[1]]}">'

  if "body" in context:
    body = _LITERAL.sub(literal, _COMMANDS.sub(flags, context["body"]))
    context["body"] = _VERDICT.sub(verdict, _PRINTED.sub(table, body))
