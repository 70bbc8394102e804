"""jinja2 with transformers' settings for chat templates, in a sandbox that asks a `Meter` before it does anything.

Settings and helpers are those of `transformers.utils.chat_template_utils` (5.23). Apart from the budget there is one
difference: reaching for Python's internals is an error at once, where jinja2 lets such a value print as nothing.
Templates are guarded in their syntax tree, before jinja2 turns it into Python (`_Guards`), so that loops, `~`,
comparisons, slices and literals, which jinja2 leaves to the interpreter, come by here as well.

This module imports jinja2: import it inside functions.
"""

# ruff: noqa: N802 (jinja2 dispatches on names such as visit_For)

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined, markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.sandbox import is_internal_attribute as is_internal
from jinja2.utils import Namespace, generate_lorem_ipsum, pass_context
from jinja2.utils import _PassArg as PassArg
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from npllm.chat_meter import (
    ENTRY_WEIGHT,
    Meter,
    OverBudgetError,
    check_method,
    check_operator,
    check_pattern,
    check_percent,
    check_replace,
    check_spec,
    check_strip,
    current,
    joinable,
    sortable,
)

MAX_TEMPLATE = 1 << 17  # characters of a template's source; long ones have a third of it
MAX_CODE = 1 << 21  # characters of Python that jinja2 makes of it; the interpreter compiles it in one go
MAX_INDENT = 1 << 10
MAX_SMALL = 1 << 12  # weight of what filters take that try many ways to match or break a text
MAX_DATE = 1 << 8
MAX_WORDS = 10_000

# Names of the guards among the filters: with a space, so that no template can name them in its syntax.
_VALUE, _CONCAT, _TICK = "a value", "a concatenation", "a tick"
_LITERALS = (nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair)


@lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The template, ready to render; raises what jinja2 raises, and `OverBudgetError` for a source that is too long."""
    if len(source) > MAX_TEMPLATE:
        raise OverBudgetError(f"has more than {MAX_TEMPLATE} characters of source")
    return Sandbox().from_string(source)


def rendered(source: str, variables: Mapping[str, Any], meter: Meter) -> str:
    """Render a template; call it while `meter` is the current one."""
    chunks = compiled(source).generate(variables)
    return "".join([meter.emit(chunk) for chunk in chunks if chunk])


# -- The syntax tree --


class _Guards(NodeTransformer):
    """Wraps what the interpreter would do by itself into calls of the guards."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_tick_node(node), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_tick_node(node), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _guard(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _CONCAT, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _guard(node, _VALUE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return _guard(node, _VALUE, node)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        literal = all(isinstance(part, _LITERALS) for part in node.find_all(nodes.Node))
        return node if literal or getattr(node, "ctx", "load") != "load" else _guard(node, _VALUE, node)

    visit_Tuple = visit_Dict = visit_List


def _guard(node: nodes.Expr, name: str, near: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=near.lineno)


def _tick_node(near: nodes.Node) -> nodes.Expr:
    return _guard(nodes.Const(True), _TICK, near)


class _Generator(CodeGenerator):
    """Lets macros, `set` blocks and the like collect their output in a `_Buffer`, and does not go on for ever."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        current().check()
        return super().visit(node, *args, **kwargs)

    def buffer(self, frame: Frame) -> None:
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = environment.new_buffer()")


class _Buffer(list[str]):
    """A list of output pieces whose total is in bounds."""

    size = 0

    def append(self, text: str) -> None:
        self.size += len(text) + ENTRY_WEIGHT
        meter = current()
        meter.check()
        meter.room(self.size)
        super().append(text)

    def extend(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.append(text)

    @classmethod
    def of(cls, texts: Iterable[str]) -> "_Buffer":
        """The texts in a buffer, which may be the one they come in."""
        if isinstance(texts, cls):
            return texts
        buffer = cls()
        buffer.extend(texts)
        return buffer


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant says, for training masks; a rendering only shows its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """The tokens of a template, as they are, for as long as there is time."""
        for token in stream:
            current().check()
            yield token

    def content(self, caller: Callable[[], str]) -> str:
        """What stands between the tags."""
        return caller()


# -- The environment --


@pass_context
def _finalize(context: Context, value: Any) -> str:
    return current().text(value)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    code_generator_class = _Generator

    def __init__(self) -> None:
        extensions = [_Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_finalize)
        originals = {**self.filters, "tojson": _tojson, "join": _join}
        self.filters = {name: _guarded_filter(name, function) for name, function in originals.items()}
        self.filters |= {_VALUE: _admit, _CONCAT: _concat, _TICK: _tick}
        self.tests = {name: _guarded_test(self.tests[name]) for name in self.tests}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _TemplateDict(),
            "namespace": _TemplateNamespace,
            "lipsum": _lipsum,
        }

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        guarded = _Guards().visit(source).set_environment(self)
        return super()._generate(guarded, *args, **kwargs)

    def _compile(self, source: str, filename: str) -> CodeType:
        if len(source) > MAX_CODE:
            raise OverBudgetError(f"becomes more than {MAX_CODE} characters of Python")
        return super()._compile(source, filename)

    def new_buffer(self) -> list[str]:
        """What a macro collects its output in."""
        return _Buffer()

    def concat(self, texts: Iterable[str]) -> str:
        """Join what a macro or block has put out."""
        return current().admit("".join(_Buffer.of(texts)))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method on behalf of a template."""
        meter = current()
        meter.tick()
        own = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        meter.room(sum(map(meter.weigh, (*args, *own.values()))))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", None)
        if isinstance(name, str):
            args = check_method(meter, owner, name, args, own)
        return meter.admit(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Do arithmetic on behalf of a template."""
        meter = current()
        check_operator(meter, operator, left, right)
        return meter.admit(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`."""
        current().check()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`."""
        current().check()
        return super().getattr(obj, attribute)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse what is internal to Python now, and what would modify a list or dict when it is used."""
        if attribute.startswith("_") or is_internal(obj, attribute):
            raise jinja2.exceptions.SecurityError(f"access to the internal attribute {attribute[:80]!r}")
        return super().unsafe_undefined(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A replacement of `str.format` and `str.format_map` that counts what it makes, or None for other values."""
        if super().wrap_str_format(value) is None:
            return None
        text: str = value.__self__

        formatter = _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)

        def format_text(*args: Any, **kwargs: Any) -> str:
            return type(text)(formatter.vformat(text, args, kwargs))

        def format_map(values: Mapping[str, Any]) -> str:
            return type(text)(formatter.vformat(text, (), values))

        return format_map if value.__name__ == "format_map" else format_text


class _Formatter(SandboxedFormatter):
    size = 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        meter = current()
        meter.room(meter.weigh(value))
        check_spec(meter, format_spec)
        text = meter.admit(super().format_field(value, format_spec))
        self.size += len(text)
        meter.room(self.size)
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


# -- Globals --


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(current().text(message))


def _strftime_now(format: Any) -> str:
    if isinstance(format, str) and len(format) > MAX_DATE:
        raise OverBudgetError(f"formats the date with more than {MAX_DATE} characters")
    return datetime.now().strftime(format)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    if _whole(n) * _whole(max) > MAX_WORDS:
        raise OverBudgetError(f"wants more than {MAX_WORDS} words of lorem ipsum")
    return generate_lorem_ipsum(n, html, min, max)


class _TemplateDict:
    """`dict` for templates: makes dicts, and has no attribute that leads elsewhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*_counted_pairs(args), **kwargs)

    def fromkeys(self, iterable: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(current().counted(iterable), value)


def _counted_pairs(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(pairs if isinstance(pairs, Mapping) else current().counted(pairs) for pairs in args)


class _TemplateNamespace(Namespace):
    """`namespace` for templates, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without 'self', which may be among the keywords
        attributes = dict(*_counted_pairs(args[1:]), **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        current().tick()
        return current().admit(super().__repr__())


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name[:80]!r} begins with an underscore")


# -- Filters and tests --


@pass_context
def _admit(context: Context, value: Any) -> Any:
    return current().admit(value)


@pass_context
def _tick(context: Context, value: Any) -> Any:
    current().tick()
    return value


@pass_context
def _concat(context: Context, values: Sequence[Any]) -> str:
    meter = current()
    meter.room(sum(map(meter.weigh, values)))
    return meter.admit(markup_join(values) if context.eval_ctx.autoescape else "".join(map(str, values)))


@pass_context
def _join(context: Context, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """jinja2's `join`, told apart here because its separator repeats."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    items = joinable(current(), d, value)
    return jinja2.filters.FILTERS["join"](context.eval_ctx, items, d)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that jinja2's own filter makes."""
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
    if indent is None and separators is None:
        return json.dumps(x, **options)
    _check_indent(indent)
    return "".join(_Buffer.of(json.JSONEncoder(indent=indent, **options).iterencode(x)))


def _check_indent(indent: object) -> None:
    if (indent if isinstance(indent, int) else len(indent) if isinstance(indent, str) else 0) > MAX_INDENT:
        raise OverBudgetError(f"indents by more than {MAX_INDENT} characters")


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose inputs are checked, whose items are counted and whose result is admitted.

    It takes the context, so that jinja2 never runs it while compiling.
    """
    prepare = _PREPARED.get(name)

    @pass_context
    def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = current()
        meter.check()
        prepared = prepare(meter, value, *args, **kwargs) if prepare else value
        result = function(*_passed(function, context), prepared, *args, **kwargs)
        if result is value:
            return result
        lazy = isinstance(result, Iterator) and type(result).__module__ == "builtins"
        return meter.counted(result) if lazy else meter.admit(result)

    return guarded


def _guarded_test(function: Any) -> Callable[..., Any]:
    @pass_context
    def guarded(context: Context, *args: Any, **kwargs: Any) -> Any:
        current().check()
        return function(*_passed(function, context), *args, **kwargs)

    return guarded


def _passed(function: Callable[..., Any], context: Context) -> tuple[Any, ...]:
    kind = PassArg.from_obj(function)
    if kind is PassArg.context:
        return (context,)
    if kind is PassArg.eval_context:
        return (context.eval_ctx,)
    return (context.environment,) if kind is PassArg.environment else ()


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


# What a filter is given in place of its value, after a look at its arguments.


def _items(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    for argument in (*args, *kwargs.values()):
        check_pattern(argument)
    return meter.counted(value) if value else value


def _sorted_items(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    return sortable(meter, _items(meter, value, *args, **kwargs))


def _sorted_dict(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    sortable(meter, value)
    return value


def _batched(meter: Meter, value: Any, linecount: Any, fill_with: Any = None) -> Any:
    if fill_with is not None:
        meter.room(_whole(linecount) * (ENTRY_WEIGHT + meter.weigh(fill_with)))
    return _items(meter, value)


def _short_text(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    for text in (value, *args, *kwargs.values()):
        check_pattern(text)
    meter.room(meter.weigh(value))
    return value


def _wrapped(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    longest = max((len(text) for text in (*args, *kwargs.values()) if isinstance(text, str)), default=1)
    meter.room((len(value) + 1) * longest)
    return _short_text(meter, value, *args, **kwargs)


def _small(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    if meter.weigh(value) > MAX_SMALL:
        raise OverBudgetError(f"hands a value of more than {MAX_SMALL} characters to a slow filter")
    return value


def _centered(meter: Meter, value: Any, width: Any = 80) -> Any:
    meter.room(width)
    return value


def _indented(meter: Meter, value: Any, width: Any = 4, *args: Any, **kwargs: Any) -> Any:
    columns = len(width) if isinstance(width, str) else _whole(width)
    meter.room(len(value) + columns * (1 + len(value.splitlines())))
    return value


def _replaced(meter: Meter, value: Any, old: Any, new: Any, count: Any = None) -> Any:
    text, old, new = meter.text(value), meter.text(old), meter.text(new)
    check_replace(meter, text, old, new, -1 if count is None else count)
    return value


def _formatted(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    check_percent(meter, meter.text(value), kwargs or args)
    return value


def _trimmed(meter: Meter, value: Any, chars: Any = None) -> Any:
    check_strip(value, chars)
    return value


def _rounded(meter: Meter, value: Any, precision: Any = 0, method: Any = "common") -> Any:
    if abs(precision) > MAX_INDENT:
        raise OverBudgetError(f"rounds to more than {MAX_INDENT} digits")
    return value


_PREPARED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("map", "select", "reject", "selectattr", "rejectattr", "unique"), _items),
    **dict.fromkeys(("slice", "list", "sum", "min", "max"), _items),
    **dict.fromkeys(("sort", "groupby"), _sorted_items),
    **dict.fromkeys(("title", "wordcount", "urlencode", "striptags", "xmlattr"), _short_text),
    **dict.fromkeys(("pprint", "urlize"), _small),
    "dictsort": _sorted_dict,
    "batch": _batched,
    "wordwrap": _wrapped,
    "center": _centered,
    "indent": _indented,
    "replace": _replaced,
    "format": _formatted,
    "trim": _trimmed,
    "round": _rounded,
}
