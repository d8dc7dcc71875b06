"""The template language of tasks: Jinja without what could take unbounded time or memory, or run code.

A task file may come from anybody. A template is therefore checked node by node when it is loaded: it shows fields, with
filters and conditions, and has loops that do not nest. What is left can take long only by the size of a row, and is
stopped there: texts have a largest length, and a row a largest time.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_TESTS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import ConfigError, DataError, shown

LONGEST_TEMPLATE, MOST_NODES, DEEPEST = 100_000, 2000, 40
"""Characters, syntax nodes and nesting of a template."""
LONGEST_TEXT = 5_000_000
"""Characters of a rendered text, and of everything a filter is given."""
SECONDS = 10.0
"""Time that one rendering may take."""
LONGEST_ARGUMENT = 100
"""Characters of a method's argument: `strip` takes a time that grows with the product of two lengths."""

FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "first", "float", "int", "items", "join", "last", "length"),
    *("list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "select", "selectattr"),
    *("sort", "string", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount"),
)
METHODS = (
    *("strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize", "split", "rsplit", "splitlines"),
    *("startswith", "endswith", "removeprefix", "removesuffix", "find", "count"),
    *("get", "items", "keys", "values", "cycle"),
)
_ALLOWED: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.If, nodes.CondExpr, nodes.For),
    *(nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword, nodes.Pair, nodes.List, nodes.Tuple, nodes.Dict),
    *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos, nodes.Add, nodes.Sub),
    *(nodes.Concat, nodes.Getattr, nodes.Getitem, nodes.Slice),
)


# -- what a rendering may take ----------------------------------------------------------------------------------------

_DEADLINE: ContextVar[float] = ContextVar("deadline", default=math.inf)


class _TooMuch(Exception):
    """A row that a template takes too long for, or makes too much of."""


def _check_time() -> None:
    if time.monotonic() > _DEADLINE.get():
        raise _TooMuch(f"it takes over {SECONDS:.0f} seconds")


def _check_size(*values: Any) -> None:
    """Raise where values, with all that is in them, are longer than a text may be."""
    size, open_ = 0, list(values)
    while open_:
        value = open_.pop()
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, dict):
            open_.extend(value)
            open_.extend(value.values())
        elif isinstance(value, (list, tuple)):
            open_.extend(value)
        if size + len(open_) > LONGEST_TEXT:
            raise _TooMuch(f"it makes more than {LONGEST_TEXT} characters")


def _each(values: Iterable[Any]) -> Iterator[Any]:
    size = 0
    for value in values:
        _check_time()
        size += len(value) if isinstance(value, str) else 1
        if size > LONGEST_TEXT:
            raise _TooMuch(f"it makes more than {LONGEST_TEXT} characters")
        yield value


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that is given no more than fits; what comes one by one (from `map`) is taken as a list."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        args = tuple(list(_each(a)) if isinstance(a, Iterator) else a for a in args)
        _check_size(*args, *kwargs.values())
        return function(*args, **kwargs)

    return bounded


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    if len(text) + text.count(old) * len(new) > LONGEST_TEXT:
        raise _TooMuch(f"it makes more than {LONGEST_TEXT} characters")
    return text.replace(old, new, -1 if count is None else count)


def _join(values: Iterable[Any], between: Any = "", attribute: Any = None) -> str:
    parts, between = list(values), str(between)
    if attribute is not None:
        parts = list(map(jinja2.filters.make_attrgetter(_JINJA, attribute), parts))
    parts = [str(part) for part in parts]
    _check_size(*parts, " " * min(len(between) * len(parts), LONGEST_TEXT + 1))
    return between.join(parts)


def _trim(text: Any, characters: str | None = None) -> str:
    if characters is not None and len(characters) > LONGEST_ARGUMENT:
        raise _TooMuch(f"trim is given more than {LONGEST_ARGUMENT} characters")
    return str(text).strip(characters)


def _shown(value: Any) -> Any:
    """What `{{ … }}` shows: plain data only, for a method or a generator would show as its address."""
    if not (value is None or isinstance(value, (str, int, float, list, tuple, dict, jinja2.Undefined))):
        raise TypeError(f"it shows a {type(value).__name__}; show a text, a number or a list (add `| list`)")
    _check_size(value)
    return value


# -- the language -----------------------------------------------------------------------------------------------------


class _Missing(jinja2.StrictUndefined):
    """A field that a row lacks or has as null: false in a condition, an error where it is shown."""

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False


_JINJA = ImmutableSandboxedEnvironment(undefined=_Missing, keep_trailing_newline=True, finalize=_shown)
_BOUNDED: dict[str, Any] = {
    "join": _join,
    "replace": _replace,
    "trim": _trim,
    "round": lambda value, precision=0: round(float(value), precision),
    "_add": lambda one, other: one + other,
}
_FILTERS: dict[str, Any] = {**{name: DEFAULT_FILTERS[name] for name in FILTERS}, **_BOUNDED}
_JINJA.filters = {name: _bounded(function) for name, function in _FILTERS.items()}
_JINJA.filters["_each"] = _each
_TESTS: dict[str, Any] = dict(DEFAULT_TESTS)
_JINJA.tests = {name: _bounded(function) for name, function in _TESTS.items()}
_JINJA.globals = {}


class _Rewritten(NodeTransformer):
    """Sums, joined texts and loops go through filters, which know their bounds."""

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node.left, "_add", node.right)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno, environment=_JINJA), "join")

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_each")  # type: ignore[arg-type]
        return node


def _filter(value: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno, environment=_JINJA)


def _check(template: nodes.Template) -> None:
    """Raise `ValueError` for the first thing that is not part of the language."""
    open_: list[tuple[nodes.Node, int, bool]] = [(template, 0, False)]
    seen = 0
    while open_:
        node, depth, looped = open_.pop()
        seen += 1
        if seen > MOST_NODES or depth > DEEPEST:
            raise ValueError(f"it has more than {MOST_NODES} parts, or is nested over {DEEPEST} deep; shorten it")
        if type(node) not in _ALLOWED:
            raise ValueError(f"line {node.lineno}: {type(node).__name__.lower()} is not allowed in a template")
        if isinstance(node, nodes.For) and (looped or node.recursive):
            raise ValueError(f"line {node.lineno}: a loop within a loop is not allowed in a template")
        if isinstance(node, nodes.Call):
            _check_call(node)
        if isinstance(node, (nodes.Filter, nodes.Test)):
            known = _JINJA.filters if isinstance(node, nodes.Filter) else _JINJA.tests
            if node.name not in known or node.name.startswith("_") or node.dyn_args or node.dyn_kwargs:
                what = type(node).__name__.lower()
                names = ", ".join(sorted(n for n in known if not n.startswith("_")))
                raise ValueError(f"line {node.lineno}: {what} {node.name!r} is not allowed; choose from {names}")
        inner = looped or isinstance(node, nodes.For)
        open_.extend((child, depth + 1, inner) for child in node.iter_child_nodes())


def _check_call(node: nodes.Call) -> None:
    method = node.node.attr if isinstance(node.node, nodes.Getattr) else None
    if method not in METHODS or node.dyn_args or node.dyn_kwargs:
        raise ValueError(
            f"line {node.lineno}: this call is not allowed; a template calls {', '.join(sorted(METHODS))} only"
        )
    for argument in (*node.args, *(pair.value for pair in node.kwargs)):
        value = argument.value if isinstance(argument, nodes.Const) else ...
        if value is ... or (isinstance(value, str) and len(value) > LONGEST_ARGUMENT):
            raise ValueError(
                f"line {node.lineno}: {method} takes short texts and numbers that are written out, not fields"
            )


@functools.lru_cache(maxsize=256)
def compiled(template: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A template and the names of the fields it reads.

    Raises:
        ConfigError: it is malformed, or uses what is not part of the language.
    """
    try:
        if len(template) > LONGEST_TEMPLATE:
            raise ValueError(f"it has {len(template)} characters, and may have {LONGEST_TEMPLATE}; shorten it")
        tree = _JINJA.parse(template)
        _check(tree)
        fields = frozenset(jinja2.meta.find_undeclared_variables(tree))
        return _JINJA.from_string(_Rewritten().visit(tree)), fields
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"template {shown(template)}, line {error.lineno}: {error.message}") from None
    except (ValueError, RecursionError, SyntaxError, MemoryError, _TooMuch) as error:
        raise ConfigError(f"template {shown(template)}: {error}") from None


def render(template: str, fields: Mapping[str, Any]) -> str:
    """The text that a template makes of a row's fields.

    Raises:
        DataError: a field that it shows is missing, or it fails on this row.
        ConfigError: as `compiled`.
    """
    program, needed = compiled(template)
    before = _DEADLINE.set(time.monotonic() + SECONDS)
    try:
        return "".join(_each(program.generate(fields)))
    except jinja2.UndefinedError as error:
        missing = sorted(needed - set(fields))
        what = f"field {missing[0]!r} is missing or null" if missing else str(error.message)
        raise DataError(f"{what}; the row has {', '.join(map(repr, fields)) or 'no fields'}") from None
    except Exception as error:  # whatever a filter makes of odd values: the template's, or the row's
        raise DataError(f"template {shown(template)} fails on this row: {error or type(error).__name__}") from None
    finally:
        _DEADLINE.reset(before)
