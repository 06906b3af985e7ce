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
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

import skipinit_jax

# An annotation in quotes, which Python evaluates late.
_QUOTED = re.compile(r"(^|: |(?<!Literal)\[)'([\w.\[\], |]+)'")


def setup(app: Sphinx) -> dict[str, Any]:
  """Connects the extension with Sphinx's events."""
  app.connect("builder-inited", _adopt_constants)
  app.connect("autodoc-process-signature", _signature)
  app.connect("autodoc-skip-member", _skip_field)
  # Before napoleon, which moves lines.
  app.connect("autodoc-process-docstring", _inherit_fields, priority=50)
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
  written = _parse(vars(obj).get("__init__") if inspect.isclass(obj) else obj)
  if isinstance(written, ast.FunctionDef):
    arguments = written.args.args
    if arguments and arguments[0].arg in ("self", "cls"):
      del arguments[0]
    result = _text(written.returns) if written.returns else "None"
    return f"({_text(written.args)})", None if result == "None" else result
  # The constructor of these was generated.
  if inspect.isclass(obj) and (
    dataclasses.is_dataclass(obj) or hasattr(obj, "_fields")
  ):
    return f"({', '.join(_fields(obj))})", None
  return None


def _parse(obj: Any) -> ast.stmt | None:
  """Returns the definition of a function or class, if it is in a file."""
  try:
    source = inspect.getsource(inspect.unwrap(obj))
  except (OSError, TypeError):
    return None
  return ast.parse(textwrap.dedent(source)).body[0]


def _text(node: ast.AST) -> str:
  return _QUOTED.sub(r"\1\2", ast.unparse(node))


def _fields(cls: type) -> Iterator[str]:
  """Yields a class's fields, as arguments of its constructor."""
  written = {}
  for base in reversed(cls.__mro__):
    definition = _parse(base) if base.__module__.startswith("skipinit_jax") else None
    for node in getattr(definition, "body", ()):
      if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        written[node.target.id] = node
  if dataclasses.is_dataclass(cls):
    names = [field.name for field in dataclasses.fields(cls) if field.init]
  else:
    names = list(written)
  # Flax adds these two to every module.
  flax_fields = ("parent", "name") if issubclass(cls, nn.Module) else ()
  for name in names:
    if name in written and name not in flax_fields:
      default = _default(written[name].value)
      yield f"{name}: {_text(written[name].annotation)}" + (
        f" = {default}" if default else ""
      )


def _default(node: ast.expr | None) -> str:
  """Returns a field's default; `dataclasses.field(default_factory=f)` has f()."""
  if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("field"):
    return "" if node is None else ast.unparse(node)
  given = {keyword.arg: keyword.value for keyword in node.keywords}
  if "default" in given:
    return ast.unparse(given["default"])
  factory = given.get("default_factory")
  if isinstance(factory, ast.Lambda):
    return ast.unparse(factory.body)
  return f"{ast.unparse(factory)}()" if factory else ""


def _skip_field(
  app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
  """Skips a class's fields, which its docstring describes already."""
  method = isinstance(obj, types.FunctionType | types.MethodType)
  own = method and "." in obj.__qualname__ and "<locals>" not in obj.__qualname__
  if what != "class" or own or isinstance(obj, property | functools.cached_property):
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


def _inherit_fields(
  app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
  """Adds what base classes say of the fields that the constructor takes too."""
  if what != "class" or not dataclasses.is_dataclass(obj):
    return
  known = _documented_fields("\n".join(lines))
  inherited: dict[str, list[str]] = {}
  for base in obj.__mro__[1:]:
    if base.__module__.startswith("skipinit_jax"):
      fields = _documented_fields(inspect.getdoc(base) or "")
      inherited |= {key: fields[key] for key in fields if key not in known | inherited}
  taken = [field.name for field in dataclasses.fields(obj) if field.name in inherited]
  if not taken:
    return
  if "Attributes:" not in lines:
    lines += ["", "Attributes:"]
  end = start = lines.index("Attributes:") + 1
  for number, line in enumerate(lines[start:], start + 1):
    if line.startswith("  "):
      end = number
    elif line:
      break
  lines[end:end] = [line for key in taken for line in inherited[key]]


def _documented_fields(text: str) -> dict[str, list[str]]:
  """Returns the lines of each field in a docstring."""
  section = text.partition("Attributes:\n")[2]
  fields: dict[str, list[str]] = {}
  for line in section.splitlines():
    if match := re.match(r"  (\w+): ", line):
      key = match[1]
      fields[key] = []
    elif not line.startswith("    "):
      break
    fields[key].append(line)
  return fields


def _mark_blocks(
  app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
  """Marks indented blocks as literal, as reStructuredText needs it."""
  marked: list[str] = []
  outside = last = 0
  for line in lines:
    if line.strip():
      indent = len(line) - len(line.lstrip())
      if indent < outside + 4:
        outside = indent
      elif marked and not marked[-1] and last < outside + 4:
        marked += [" " * outside + "::", ""]
      last = indent
    marked.append(line)
  lines[:] = marked


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
