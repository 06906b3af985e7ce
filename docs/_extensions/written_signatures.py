"""Docstrings and signatures as the source has them: an extension of Sphinx.

Python evaluates annotations and defaults: `jax.Array` becomes `jax.jaxlib._jax.Array`,
`nn.relu` an object at an address. Here they are read from the source. In docstrings, a
block that is indented by four more columns is code or an equation, as in Markdown.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

import skipinit_jax

# What Flax adds to the fields of every module.
_FLAX_FIELDS = ("parent", "name")


def setup(app: Sphinx) -> dict[str, Any]:
  """Connects the extension with Sphinx's events."""
  app.connect("builder-inited", _adopt_constants)
  app.connect("autodoc-process-signature", _signature)
  app.connect("autodoc-skip-member", _skip_field)
  # Before napoleon, which moves lines.
  app.connect("autodoc-process-docstring", _mark_blocks, priority=100)
  app.connect("missing-reference", _resolve_by_last_name)
  return {"parallel_read_safe": True, "parallel_write_safe": True}


def _signature(
  app: Sphinx,
  what: str,
  name: str,
  obj: Any,
  options: Any,
  signature: str | None,
  returns: str | None,
) -> tuple[str, str | None] | None:
  if inspect.isclass(obj):
    init = obj.__dict__.get("__init__")
    if _has_source(init):
      return _of_function(init, method=True)
    # The constructor of these was generated.
    generated = dataclasses.is_dataclass(obj) or hasattr(obj, "_fields")
    return (f"({', '.join(_fields(obj))})", None) if generated else None
  if inspect.isfunction(inspect.unwrap(obj)) and _has_source(obj):
    # The first argument of a classmethod is bound already.
    return _of_function(obj, method=what == "method" and not inspect.ismethod(obj))
  return None


def _has_source(function: Any) -> bool:
  code = getattr(inspect.unwrap(function) if function else None, "__code__", None)
  return code is not None and code.co_filename.endswith(".py")


def _parse(obj: Any) -> Any:
  return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]


def _of_function(function: Any, *, method: bool) -> tuple[str, str | None] | None:
  node = _parse(function)
  if not isinstance(node, ast.FunctionDef):
    return None
  if method or (node.args.args and node.args.args[0].arg == "cls"):
    del node.args.args[0]
  node = _Unquote().visit(node)
  returns = None if node.returns is None else ast.unparse(node.returns)
  return f"({ast.unparse(node.args)})", None if returns == "None" else returns


def _fields(cls: type) -> Iterator[str]:
  """Yields a class's fields, as arguments of its constructor."""
  written = {}
  for base in reversed(cls.__mro__):
    if base.__module__.startswith("skipinit_jax"):
      for node in _parse(base).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
          written[node.target.id] = _Unquote().visit(node)
  if dataclasses.is_dataclass(cls):
    names = [field.name for field in dataclasses.fields(cls) if field.init]
  else:
    names = list(written)
  for name in names:
    if name in written and name not in _FLAX_FIELDS[: 2 * _is_flax(cls)]:
      default = _default(written[name].value)
      yield f"{name}: {ast.unparse(written[name].annotation)}" + (
        f" = {default}" if default else ""
      )


def _is_flax(cls: type) -> bool:
  return any(base.__module__.startswith("flax.linen") for base in cls.__mro__)


def _default(node: ast.expr | None) -> str:
  """Returns a field's default; of `dataclasses.field(default_factory=f)`, f()."""
  if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("field"):
    return "" if node is None else ast.unparse(node)
  for keyword in node.keywords:
    if keyword.arg == "default":
      return ast.unparse(keyword.value)
    if keyword.arg == "default_factory":
      if isinstance(keyword.value, ast.Lambda):
        return ast.unparse(keyword.value.body)
      return f"{ast.unparse(keyword.value)}()"
  return ""


class _Unquote(ast.NodeTransformer):
  """Removes the quotes from annotations that are evaluated late."""

  def visit_arg(self, node: ast.arg) -> ast.arg:
    node.annotation = _unquoted(node.annotation)
    return node

  def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
    node.annotation = _unquoted(node.annotation)
    return node

  def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
    node.returns = _unquoted(node.returns)
    self.generic_visit(node.args)
    return node


def _unquoted(annotation: Any) -> Any:
  if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
    return ast.parse(annotation.value, mode="eval").body
  if isinstance(annotation, ast.Subscript):
    if ast.unparse(annotation.value) != "Literal":
      annotation.slice = _unquoted(annotation.slice)
  elif isinstance(annotation, ast.Tuple):
    annotation.elts = [_unquoted(each) for each in annotation.elts]
  return annotation


def _skip_field(
  app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
  """Skips a class's fields, which its docstring describes already."""
  if what != "class":
    return None
  method = isinstance(obj, types.FunctionType | types.MethodType)
  own = method and "." in obj.__qualname__ and "<locals>" not in obj.__qualname__
  if own or isinstance(obj, property | functools.cached_property):
    return None
  return True


def _adopt_constants(app: Sphinx) -> None:
  """Gives packages the documentation of the constants that they import.

  Sphinx knows it only for the module in which it stands.
  """
  for module in pkgutil.walk_packages(skipinit_jax.__path__, "skipinit_jax."):
    if module.ispkg:
      package = importlib.import_module(module.name)
      known = ModuleAnalyzer.for_module(module.name)
      known.analyze()
      for part in pkgutil.iter_modules(package.__path__, f"{module.name}."):
        documented = ModuleAnalyzer.for_module(part.name).find_attr_docs()
        for (scope, name), text in documented.items():
          if not scope and name in package.__all__:
            known.attr_docs["", name] = text


def _mark_blocks(
  app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
  """Marks indented blocks as literal, as reStructuredText needs it."""
  marked: list[str] = []
  outside = 0
  for line in lines:
    if line.strip():
      indent = len(line) - len(line.lstrip())
      if indent < outside + 4:
        outside = indent
      elif marked and not marked[-1] and not _in_block(marked, outside):
        marked += [" " * outside + "::", ""]
    marked.append(line)
  lines[:] = marked


def _in_block(lines: list[str], outside: int) -> bool:
  """Whether the last line that is not blank belongs to a block already."""
  last = next((line for line in reversed(lines) if line.strip()), "")
  return len(last) - len(last.lstrip()) >= outside + 4


def _resolve_by_last_name(
  app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.reference | None:
  """Links a name that was written as one imports it, such as `measure.signal`."""
  target = node.get("reftarget", "")
  written = node.get("reftype") == "class" or "." in target
  if node.get("refdomain") != "py" or not written:
    return None
  found = {
    entry.node_id: entry
    for name, entry in env.domains.python_domain.objects.items()
    if name.endswith(f".{target}")
  }
  if len(found) != 1:
    return None
  (entry,) = found.values()
  return make_refnode(
    app.builder, node["refdoc"], entry.docname, entry.node_id, contnode
  )
