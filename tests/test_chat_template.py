"""Chat templates: transformers' renderings (tests/data/chat_templates.json), and templates that attack."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllm import chat_sandbox
from npllm.chat_template import Budget, render
from npllm.errors import TemplateError

GOLDEN = json.loads((Path(__file__).parent / "data" / "chat_templates.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
TALK = [{"role": "user", "content": "Hi"}]


class StoppedClock(datetime):
    """A datetime whose present is the one of the golden renderings."""

    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(GOLDEN["now"])


def from_golden(case):
    return render(case["template"], case["messages"], special_tokens=GOLDEN["special_tokens"], **case["arguments"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "rendering" in case])
def test_renders_as_transformers_does(name, monkeypatch):
    monkeypatch.setattr(chat_sandbox, "datetime", StoppedClock)
    assert from_golden(CASES[name]) == CASES[name]["rendering"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "error" in case])
def test_fails_where_transformers_does(name):
    with pytest.raises(TemplateError) as caught:
        from_golden(CASES[name])
    text = str(caught.value)
    assert text.startswith("chat template")
    assert "\n" not in text
    assert (CASES[name]["error"]["text"] or "") in text


# -- Attacks: over budget, or refused, in time and in any thread --

DOUBLING = "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = EXPRESSION %}"
"{% endfor %}{{ ns.s|length }}"
DAG = "{% set ns = namespace(v=[1], w=[1]) %}{% for i in range(60) %}{% set ns.v = [ns.v, ns.v] %}{% endfor %}"
MEGABYTE = "{% set s = 'ab' * 500000 %}{% set long = s * 15 %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"

ATTACKS = {
    # loops and recursion
    "nested-loops": LOOPS,
    "nested-loops-output": LOOPS.replace("BODY", "{{ i * j }}"),
    "nested-loops-in-macro": "{% macro m() %}" + LOOPS.replace("BODY", "x{{ '' }}") + "{% endmacro %}{{ m() }}",
    "nested-loops-in-set": "{% set x %}" + LOOPS.replace("BODY", "x") + "{% endset %}",
    "nested-loops-filtered": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "huge-range": "{% for i in range(10**9) %}{% endfor %}",
    "huge-range-list": "{{ range(10**9)|list }}",
    "huge-range-filter": "{{ range(10**15)|select('odd')|first }}",
    "generators": "{% set ns = namespace(n=0) %}{% for i in range(99999) %}"
    "{% for j in range(99999)|map('string')|select('x') %}{% endfor %}{% endfor %}",
    "generator-never-yields": "{% for i in range(99999) %}{{ range(99999)|reject('number')|list }}{% endfor %}",
    "sums": "{% for i in range(99999) %}{% if range(99999)|sum == 1 %}{% endif %}{% endfor %}",
    "comparisons": MEGABYTE + "{% set a = [s] * 14 %}{% set b = [s[1:] ~ 'a'] * 14 %}{% for i in range(99999) %}"
    "{% if (a + [1]) == (a + [2]) %}{% endif %}{% endfor %}",
    "recursive-macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "branching-macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive-caller": "{% macro m() %}{{ caller() }}{% endmacro %}{% macro n() %}{% call m() %}{{ n() }}"
    "{% endcall %}{% endmacro %}{{ n() }}",
    "recursive-loop": "{% for i in [[]] recursive %}{{ loop([i]) }}{% endfor %}",
    "branching-loop": "{% for i in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "recursive-block": "{% block b %}{{ self.b() }}{% endblock %}",
    "growing-iterations": "{% set ns = namespace(l=[0]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [i] %}"
    "{{ ns.l|map('string')|join }}{% endfor %}",
    # strings and lists that grow
    "repeat-string": "{{ 'a' * 10**9 }}",
    "repeat-string-reversed": "{{ 10**9 * 'a' }}",
    "repeat-list": "{{ ([0] * 10**9)|length }}",
    "repeat-tuple": "{{ ((0, 1) * 10**9)|length }}",
    "repeat-dicts": "{{ [messages] * 10**8 }}",
    "double-tilde": DOUBLING.replace("EXPRESSION", "ns.s ~ ns.s"),
    "double-plus": DOUBLING.replace("EXPRESSION", "ns.s + ns.s"),
    "double-join": DOUBLING.replace("EXPRESSION", "[ns.s, ns.s]|join"),
    "double-join-method": DOUBLING.replace("EXPRESSION", "ns.s.join(ns.s)"),
    "double-replace": DOUBLING.replace("EXPRESSION", "ns.s|replace('', ns.s)"),
    "double-replace-method": DOUBLING.replace("EXPRESSION", "ns.s.replace('a', ns.s)"),
    "double-percent": DOUBLING.replace("EXPRESSION", "'%s%s' % (ns.s, ns.s)"),
    "double-percent-dict": DOUBLING.replace("EXPRESSION", "'%(s)s%(s)s' % {'s': ns.s}"),
    "double-format": DOUBLING.replace("EXPRESSION", "'{0}{0}'.format(ns.s)"),
    "double-format-filter": DOUBLING.replace("EXPRESSION", "'%s%s'|format(ns.s, ns.s)"),
    "double-set-block": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set x %}{{ ns.s }}{{ ns.s }}"
    "{% endset %}{% set ns.s = x %}{% endfor %}",
    "double-macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLING.replace("EXPRESSION", "m(ns.s)"),
    "double-translate": DOUBLING.replace("EXPRESSION", "ns.s.translate({97: ns.s})"),
    "double-list": "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "double-list-sum": "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}"
    "{% set ns.l = [ns.l, ns.l]|sum(start=[]) %}{% endfor %}",
    "many-megabytes": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set ns.l = ns.l + [('a' * 100000)|upper] %}{% endfor %}",
    "wasted-megabytes": "{% for i in range(99999) %}{% set x = 'ab' * 5000000 %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "output-static": "{% for i in range(99999) %}{% for j in range(99999) %}" + "a" * 999 + "{% endfor %}{% endfor %}",
    "join-separator": MEGABYTE + "{{ range(99999)|join(long) }}",
    "join-method": MEGABYTE + "{{ long.join('a' * 99999) }}",
    "join-attribute": MEGABYTE + "{{ range(99999)|join(long, attribute='real') }}",
    "split-characters": MEGABYTE + "{{ long.split('a') }}",
    "list-of-string": MEGABYTE + "{{ long|list|length }}",
    # widths, precisions, counts
    "percent-width": "{{ '%1000000000d' % 1 }}",
    "percent-precision": "{{ '%.1000000000f' % 1 }}",
    "percent-star": "{{ '%*d' % (10**9, 1) }}",
    "percent-many": "{{ ('%9999999d' * 9999) % ((1,) * 9999) }}",
    "percent-nested-key": "{{ '%((a))1000000000s' % {'(a)': 1} }}",
    "percent-bytes": "{{ '%1000000000d'.encode() % 1 }}",
    "format-width": "{{ '{:>1000000000}'.format(1) }}",
    "format-nested-width": "{{ '{:>{}}'.format(1, 10**9) }}",
    "format-precision": "{{ '{:.1000000000f}'.format(1.5) }}",
    "format-many": "{{ ('{0}' * 9999).format('a' * 99999) }}",
    "format-map-width": "{{ '{x:>1000000000}'.format_map({'x': 1}) }}",
    "format-safe": "{{ ('{:>1000000000}'|safe).format(1) }}",
    "format-filter-width": "{{ '%1000000000d'|format(1) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "center-constant": "{{ 'a'|center(1000000000) }}",
    "center-method": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t\t'.expandtabs(10**9) }}",
    "indent": "{{ 'a\nb'|indent(10**9) }}",
    "indent-first": "{{ 'a'|indent(10**9, first=true) }}",
    "indent-lines": "{{ ('a\n' * 99999)|indent('b' * 99999) }}",
    "tojson-indent": "{{ messages|tojson(indent=10**9) }}",
    "tojson-indent-text": "{{ messages|tojson(indent='a' * 10**7) }}",
    "tojson-separators": "{{ range(99999)|list|tojson(separators=('a' * 10**7, ':')) }}",
    "wordwrap": "{{ ('a b ' * 999999)|wordwrap(2) }}",
    "wordwrap-text": "{{ ('a' * 9999)|wordwrap(1, wrapstring='b' * 10**6) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "slice-loop": "{% for x in [1]|slice(10**9) %}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "lipsum-words": "{{ lipsum(n=1, max=10**9, min=10**8) }}",
    "to-bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "round": "{{ 5|round(-10**9) }}",
    "round-floor": "{{ 5|round(10**9, 'floor') }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power-chain": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}{{ ns.n > 1 }}",
    "power-parsed": "{{ ('1' * 10**7)|int(base=16) > 1 }}",
    "random": "{{ range(10**9)|random }}",
    "strftime": "{{ strftime_now('%1000000000Y' * 999) }}",
    "strftime-long": "{{ strftime_now('%c' * 999999) }}",
    # values that share parts
    "dag-print": DAG + "{{ ns.v }}",
    "dag-length": DAG + "{{ ns.v|string|length }}",
    "dag-json": DAG + "{{ ns.v|tojson }}",
    "dag-dicts": "{% set ns = namespace(v={}) %}{% for i in range(60) %}"
    "{% set ns.v = {'a': ns.v, 'b': ns.v} %}{% endfor %}{{ ns.v == ns.v.copy() }}",
    "dag-tuple-hash": "{% set ns = namespace(v=(1,)) %}{% for i in range(60) %}{% set ns.v = (ns.v, ns.v) %}"
    "{% endfor %}{{ {ns.v: 1} }}",
    "dag-deep-hash": "{% set ns = namespace(v=(1,)) %}{% for i in range(99999) %}{% set ns.v = (ns.v,) %}"
    "{% endfor %}{{ {ns.v: 1} }}",
    "dag-varargs": "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}"
    "{% endif %}{% endmacro %}{{ m(60, 1) }}",
    "dag-namespaces": "{% set ns = namespace(v=1) %}{% for i in range(60) %}"
    "{% set ns.v = namespace(a=ns.v, b=ns.v) %}{% endfor %}{{ ns.v }}",
    "dag-methods": "{% set ns = namespace(v=[1]) %}{% for i in range(60) %}"
    "{% set ns.v = {}.fromkeys(['a', 'b'], ns.v).values()|list %}{% endfor %}{{ ns.v }}",
    "dag-cycler": "{% set ns = namespace(v=1) %}{% for i in range(60) %}"
    "{% set ns.v = cycler(ns.v, ns.v).items %}{% endfor %}{{ ns.v }}",
    "dag-batch": "{% set ns = namespace(v=1) %}{% for i in range(60) %}"
    "{% set ns.v = [ns.v, ns.v]|batch(2)|first %}{% endfor %}{{ ns.v }}",
    # slow algorithms
    "collisions": "{{ {}.fromkeys(range(1, 99999 * (2**61 - 1), 2**61 - 1))|length }}",
    "collisions-few": "{% set d = dict.fromkeys(range(1, 9999 * (2**61 - 1), 2**61 - 1)) %}{{ d == d.copy() }}",
    "collisions-pairs": "{{ dict(range(1, 99999 * (2**61 - 1), 2**61 - 1)|batch(1)|map('join')|map('int')|batch(2)) }}",
    "collisions-set": "{{ ({}.keys() - []).union(range(1, 99999 * (2**61 - 1), 2**61 - 1)) }}",
    "collisions-unique": "{{ range(1, 99999 * (2**61 - 1), 2**61 - 1)|unique|list }}",
    "rfind": MEGABYTE + "{{ ('a' * 10**7).rfind('b' ~ 'a' * 10**6) }}",
    "rsplit": MEGABYTE + "{{ ('a' * 10**7).rsplit(sep='b' ~ 'a' * 10**6) }}",
    "strip": "{{ ('a' * 10**7).strip('b' * 10**6 ~ 'a') }}",
    "trim": "{{ ('a' * 10**7)|trim('b' * 10**6 ~ 'a') }}",
    "sort": MEGABYTE + "{{ long|sort|length }}",
    "sort-repeatedly": "{% set l = range(99999)|list %}{% for i in range(99) %}"
    "{% set x = l|sort(attribute='real') %}{% endfor %}",
    "urlize": "{{ ('a@' * 10**6)|urlize }}",
    "urlize-short": "{% for i in range(99999) %}{{ ('a@a.' * 900)|urlize|length }}{% endfor %}",
    "striptags": "{{ ('<!--' * 10**6)|striptags }}",
    "title": "{{ ('a ' * 10**6)|title|length }}",
    "wordcount": "{{ ('a ' * 10**6)|wordcount }}",
    "pprint": "{{ (range(99999)|list)|pprint }}",
    "codec": "{{ ('ü' * 99999).encode('punycode') }}",
    "codec-name": "{{ 'x'.encode('id' ~ 'na') }}",
    "attribute-path": "{{ [1]|map(attribute='a.' * 10**6)|list }}",
    "getattr-chain": "{{ messages" + "[0:]" * 4000 + " }}",
    "many-comparisons": MEGABYTE + "{% set t = long[1:] ~ 'b' %}{% set u = long[1:] ~ 'c' %}" + "{{ [t] == [u] }}" * 9000,
    # sources that are hard to compile
    "long-source": "x" * 10**6,
    "dense-source": "{{a~b}}" * 18000,
    "nested-source": "{% for i in [1] %}" * 90 + "{{ a + b }}" * 9000 + "{% endfor %}" * 90,
    "deep-elif": "{% if a %}" + "{% elif b %}" * 9000 + "{% endif %}",
    "deep-parentheses": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "deep-lists": "{{ " + "[" * 50000 + "]" * 50000 + " }}",
    "deep-blocks": "{% if 1 %}" * 20000 + "{% endif %}" * 20000,
    "deep-loops": "{% for i in [1] %}" * 50 + "{% endfor %}" * 50,
    "long-chain": "{{ 1" + " + 1" * 60000 + " }}",
    "long-negation": "{{ " + "not " * 60000 + "1 }}",
    "open-comment": "{#" * 100000,
    "open-variable": "{{" * 100000,
    "large-number": "{{ " + "9" * 100000 + " }}",
    # Python's internals
    "class": "{{ ''.__class__ }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mro-subscript": "{{ ''['__class__'] }}",
    "attr-filter": "{{ ''|attr('__class__') }}",
    "attr-filter-built": "{{ ''|attr('__cl' ~ 'ass__') }}",
    "map-attribute": "{{ ['']|map(attribute='__class__')|list }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "globals-function": "{{ raise_exception.__globals__ }}",
    "lipsum-globals": "{{ lipsum.__globals__['os'].system('true') }}",
    "type-mro": "{{ namespace.mro() }}",
    "format-attack": "{{ '{0.__class__}'.format('') }}",
    "format-attack-subscript": "{{ '{0[__class__]}'.format('') }}",
    "format-map-attack": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "format-mapped": "{{ ['{0.__class__}']|map(attribute='format')|first }}"
    "{{ (['{0.__class__}']|map(attribute='format')|first)(1) }}",
    "format-safe-attack": "{{ ('{0.__class__}'|safe).format('') }}",
    "self-internals": "{{ self._TemplateReference__context }}",
    "loop-internals": "{% for i in [1] %}{{ loop._iterator }}{% endfor %}",
    "generator-frame": "{{ ([1]|map('string')).gi_frame }}",
    "generator-code": "{{ ([1]|map('string')).gi_code }}",
    "macro-internals": "{% macro m() %}{% endmacro %}{{ m._func }}",
    "namespace-internals": "{{ namespace(__class__=1) }}",
    "namespace-generator": "{{ namespace([('_x', 1)]|map('list'))._x }}",
    "dict-internals": "{{ dict.__class__ }}",
    "list-append": "{% set l = [] %}{{ l.append(1) }}",
    "dict-update": "{{ messages[0].update({'role': 'x'}) }}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends messages %}",
}


SECONDS, MARGIN = 0.2, 2.0  # the margin is for slow and busy machines; a second more has not been seen on ours


def assert_stopped(name):
    start = time.monotonic()
    with pytest.raises(TemplateError, match=r"^chat template[^\n]*$"):
        render(ATTACKS[name], TALK, budget=Budget(seconds=SECONDS))
    assert time.monotonic() - start < SECONDS + MARGIN


@pytest.mark.parametrize("name", ATTACKS)
def test_stops_attacks_in_time(name):
    assert_stopped(name)


@pytest.mark.parametrize("name", ["nested-loops", "branching-macro", "double-tilde", "slice-loop", "deep-parentheses"])
def test_stops_attacks_in_any_thread(name):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(assert_stopped, name).result()


def test_threads_have_budgets_of_their_own():
    template = "{% for i in range(n) %}{{ i }},{% endfor %}"

    def outcome(n):
        try:
            return len(render(template, TALK, n=n, budget=Budget(iterations=1000)).split(","))
        except TemplateError:
            return "refused"

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(outcome, [900, 1001] * 20)) == [901, "refused"] * 20


@pytest.mark.parametrize(
    ("template", "budget", "text"),
    [
        ("{% for i in range(11) %}{% endfor %}", Budget(iterations=10), "line 1: it exceeds its budget of 10 loop"),
        ("\n{{ 'a' * 11 }}", Budget(output=10), "it exceeds its budget of 10 characters of output"),
        ("\n{{ 'ab' * 600000 }}", Budget(output=10), "line 2: it builds a value of more than 10"),
        ("\n\n{{ 'ab' * 60000 }}", Budget(memory=100_000), "line 3: it exceeds its budget of 100000 bytes"),
        (
            "a\n{% for i in range(99999) %}{% endfor %}",
            Budget(seconds=0.01),
            r"line \d: it runs longer than its budget of 0.01",
        ),
    ],
)
def test_names_the_exhausted_budget(template, budget, text):
    with pytest.raises(TemplateError, match=text):
        render(template, TALK, budget=budget)


def test_stays_within_budget():
    assert (
        render("{% for i in range(9) %}x{% endfor %}{{ 'a' }}", TALK, budget=Budget(iterations=10, output=10))
        == "x" * 9 + "a"
    )


@pytest.mark.parametrize("name", ["format-chatml", "format-llama3", "format-deepseek"])
def test_long_conversations_fit_the_default_budget(name):
    talk = [{"role": role, "content": "Some text. " * 100} for _ in range(1000) for role in ("user", "assistant")]
    case = CASES[name]
    text = render(case["template"], talk, special_tokens=GOLDEN["special_tokens"], add_generation_prompt=True)
    assert text.count("Some text. ") + text.count("Some text.<") == 200_000


def test_inputs_larger_than_the_output_budget_can_be_passed_around():
    image = [{"type": "image", "image": "x" * (20 << 20)}, {"type": "text", "text": "What is it?"}]
    template = (
        "{% for m in messages[0:] + [] %}"
        "{{ m.content|selectattr('text', 'defined')|map(attribute='text')|join }}{% endfor %}"
    )
    assert render(template, [{"role": "user", "content": image}]) == "What is it?"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a\n{{ raise_exception('one\ntwo') }}", "chat template, line 2: it refuses these messages: one two"),
        ("a\n\n{% if %}", "chat template, line 3: syntax error: Expected an expression, got 'end of statement block'"),
        ("{% macro m() %}\n{{ missing.x }}{% endmacro %}\n{{ m() }}", "chat template, line 2: 'missing' is undefined"),
        ("{{ 1 + 'a' }}", "chat template, line 1: TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
        ("{{ ''.__class__ }}", "chat template, line 1: refused as unsafe: access to the internal attribute '__class__'"),
        ("{{ raise_exception('x' * 9999) }}", "chat template, line 1: it refuses these messages: " + "x" * 500),
    ],
)
def test_errors_are_one_line_that_names_the_template_line(template, text):
    with pytest.raises(TemplateError) as caught:
        render(template, TALK)
    assert str(caught.value) == text
    assert caught.value.__suppress_context__


class Role(StrEnum):
    USER = "user"


@dataclass
class Part:
    text: str


def test_the_template_sees_plain_copies():
    messages = [{"role": Role.USER, "content": [Part("a"), (1, np.float32(2.5), np.bool_(False)), np.zeros(3), object()]}]
    before = copy.copy(messages[0])
    text = render("{{ messages[0] }}", messages)
    assert text == "{'role': 'user', 'content': [{'text': 'a'}, (1, 2.5, False), '<ndarray>', '<object>']}"
    assert messages[0] == before


def test_continuing_leaves_the_messages_alone():
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "a "}]}]
    template = "{% for b in messages[0].content %}{{ b.text }}{% endfor %}|"
    assert render(template, messages, continue_final_message=True) == "a "
    assert messages == [{"role": "assistant", "content": [{"type": "text", "text": "a "}]}]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"template": None}, "must be a string, not NoneType"),
        ({"template": ["x"]}, "must be a string, not list"),
        ({"messages": "hello"}, "messages must be a list of dicts"),
        ({"messages": None}, "messages must be a list of dicts"),
        ({"messages": ["hello"]}, "messages must be a list of dicts"),
        ({"messages": []}, "the conversation is empty"),
        ({"tools": [print]}, "tools must be JSON schemas"),
        ({"tools": "search"}, "tools must be a list of dicts"),
        ({"documents": ["text"]}, "documents must be a list of dicts"),
        ({"continue_final_message": "nothing"}, "the last message has no 'nothing'"),
        ({"continue_final_message": True, "messages": [{"content": 5}]}, "no text to continue"),
    ],
)
def test_refuses_wrong_arguments(arguments, text):
    with pytest.raises(TemplateError, match=text):
        render(**{"template": "{{ messages[0].content }}", "messages": TALK, **arguments})


def test_refuses_messages_nested_too_deep():
    for depth, text in ((300, "more than 200 deep"), (5000, "nested too deep")):
        content = []
        for _ in range(depth):
            content = [content]
        with pytest.raises(TemplateError, match=text):
            render("{{ messages }}", [{"role": "user", "content": content}])


FRAGMENTS = [
    *("{{ ", " }}", "{% ", " %}", "{#", "#}", "-", "messages", "x", ".role", "[0]", "['content']", "|", "~", "+", "*"),
    *("'a'", "2", "99", "(", ")", ",", "for x in ", "messages", "endfor", "if ", "endif", "set x = ", "loop", ".index"),
    *("upper", "tojson", "join", "list", "(indent=2)", "range(9)", "namespace()", "macro m()", "endmacro", "m()", "\n"),
    *("{% for x in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{ x }}", "{{ x|tojson }}", "text"),
]


def error_of(source):
    try:
        render(source, TALK, budget=Budget(seconds=1.0))
    except TemplateError as error:
        return str(error)
    return ""


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_any_source_renders_or_fails_with_one_line(source):
    assert "\n" not in error_of(source)
