"""Writes tests/data/chat_templates.json: what transformers makes of chat templates, for tests/test_chat_template.py.

Needs transformers and tokenizers; not run in CI. From the repository root:

    python -m tests.export.chat_templates

The templates are our own. Those called format-* put out the formats of well-known model families; the others each
exercise one delicate feature. transformers' clock is stopped at NOW.
"""

import json
import platform
from datetime import datetime
from pathlib import Path

import jinja2.sandbox
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

OUTPUT = Path(__file__).parent.parent / "data" / "chat_templates.json"
NOW = "2024-07-09T03:04:05"

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' ~ (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set answer = message.content if message.content is string else '' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- answer }}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or answer %}{{- '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{%- set rest = messages %}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- endif %}
{%- macro header(role) %}<|start_header_id|>{{ role }}<|end_header_id|>{{ '\\n\\n' }}{% endmacro %}
{{- header('system') ~ 'Cutting Knowledge Date: December 2023\\nToday Date: ' ~ date ~ '\\n\\n' ~ system ~ '<|eot_id|>' }}
{%- for message in rest %}
    {%- if message.role == 'tool' %}
        {{- header('ipython') }}
        {{- message.content | tojson if message.content is mapping or message.content is iterable else message.content }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model makes one call at a time, not ' ~ message.tool_calls | length) }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') + '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- header(message.role) + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- set prefix, turns = '', messages %}
{%- if messages[0].role == 'system' %}
    {%- if messages[0].content is string %}
        {%- set prefix = messages[0].content + '\\n\\n' %}
    {%- else %}
        {%- set prefix = messages[0].content[0].text + '\\n\\n' %}
    {%- endif %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for turn in turns -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    <start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}
{{ prefix if loop.first }}
    {%- if turn.content is string -%}
        {{ turn.content | trim }}
    {%- elif turn.content is iterable -%}
        {%- for item in turn.content -%}
            {{ '<start_of_image>' if item.type == 'image' else item.text | trim }}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    <end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

MISTRAL = """\
{{- bos_token }}
{%- set today = strftime_now('%Y-%m-%d') %}
{%- if messages[0].role == 'system' %}
    {%- set rest = messages[1:] %}
    {{- '[SYSTEM_PROMPT]' ~ messages[0].content ~ '[/SYSTEM_PROMPT]' }}
{%- else %}
    {%- set rest = messages %}
    {{- '[SYSTEM_PROMPT]Today is ' ~ today ~ '.[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- for message in rest %}
    {%- if message.role == 'user' %}
        {{- '[INST]' ~ message.content ~ '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content ~ eos_token }}
    {%- else %}
        {{- raise_exception('Only user, system and assistant roles are supported, not "' + message.role + '"!') }}
    {%- endif %}
{%- endfor %}
"""

DEEPSEEK = """\
{%- set ns = namespace(system='', first=true) %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = ns.system ~ ('' if loop.first else '\\n\\n') ~ message.content %}
{%- endfor %}
{{- bos_token ~ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""

LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Grüße, 世界 <b>&amp;</b> \"quoted\" 'single' 🙂"},
    {"role": "assistant", "content": "<think>\nHm, a greeting.\n</think>\n\nHello!"},
    {"role": "user", "content": "  And now?\n"},
]
SHORT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello \n there  "}]
BLOCKS = [
    {"role": "system", "content": [{"type": "text", "text": "Look closely."}]},
    {"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": " What is it? "}]},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather at a place; <i>°C</i> & more",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Zürich", "東京"]}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
CALLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"place": "Zürich", "days": 2}}},
        ],
    },
    {"role": "tool", "content": '{"celsius": 21.5}'},
    {"role": "tool", "content": "sunny"},
]
REASONED = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "thinking": "Add.", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "reasoning_content": "Check.", "content": "Yes"},
]


def case(name, template, messages=TALK, **arguments):
    return {"name": name, "template": template, "messages": messages, "arguments": arguments}


CASES = [
    *(
        case(f"format-{family}{suffix}", template, messages, add_generation_prompt=prompt)
        for family, template in {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "deepseek": DEEPSEEK}.items()
        for suffix, messages, prompt in (("", TALK, True), ("-short", SHORT, False), ("-one", SHORT[:1], True))
    ),
    case("format-gemma", GEMMA, [TALK[0], *SHORT, TALK[1]], add_generation_prompt=True),
    case("format-gemma-blocks", GEMMA, BLOCKS),
    case("format-gemma-refuses", GEMMA, [SHORT[0], SHORT[0]]),
    case("format-chatml-tools", CHATML, CALLS, tools=[WEATHER, WEATHER], add_generation_prompt=True),
    case("format-chatml-tools-system", CHATML, [TALK[0], *CALLS], tools=[WEATHER]),
    case("format-chatml-no-thinking", CHATML, TALK, add_generation_prompt=True, enable_thinking=False),
    case("format-chatml-thinking", CHATML, TALK, add_generation_prompt=True, enable_thinking=True),
    case("format-chatml-reasoning", CHATML, REASONED),
    case("format-chatml-reasoning-kept", CHATML, REASONED[:2]),
    case("format-llama3-date", LLAMA3, TALK, date_string="26 Jul 2024"),
    case("format-llama3-tool", LLAMA3, CALLS, add_generation_prompt=True),
    case("format-llama3-refuses", LLAMA3, [CALLS[0], {**CALLS[1], "tool_calls": CALLS[1]["tool_calls"] * 2}]),
    case("format-mistral-refuses", MISTRAL, [SHORT[0], {"role": "robot", "content": "beep"}]),
    # loops
    case(
        "break-continue",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }},{% endfor %}",
    ),
    case(
        "loop-variables",
        "{% for m in messages %}"
        "{{ [loop.index, loop.index0, loop.revindex, loop.revindex0, loop.first, loop.last, loop.length, loop.depth] }}"
        "{{ loop.previtem.role if not loop.first }}"
        "<{{ loop.nextitem.role if loop.nextitem is defined }}>{{ loop.cycle('a', 'b') }}"
        "{{ loop.changed(m.role) }}\n{% endfor %}",
    ),
    case("loop-no-previous", "{% for m in messages %}{{ loop.previtem is defined }}{{ loop.previtem.role }}{% endfor %}"),
    case(
        "loop-else", "{% for m in [] %}x{% else %}none{% endfor %}{% for m in missing %}x{% else %}none either{% endfor %}"
    ),
    case(
        "loop-filtered",
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }} {{ m.content|trim }};{% endfor %}",
    ),
    case(
        "loop-recursive",
        "{% for item in tree recursive %}{{ loop.depth }}{{ item.name }}{% if item.sub %}"
        "({{ loop(item.sub) }}){% endif %}{% endfor %}",
        tree=[{"name": "a", "sub": [{"name": "b"}, {"name": "c", "sub": [{"name": "d"}]}]}, {"name": "e"}],
    ),
    case(
        "loop-over-generator",
        "{% for c in messages|map(attribute='content')|select|reject('none') %}{{ loop.index }}"
        "{{ loop.last }}{{ loop.length }}{% endfor %}",
    ),
    case(
        "loop-unpacking",
        "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}"
        "{% for key, value in messages[1]|dictsort %}{{ key }}{% endfor %}",
    ),
    case("loop-scope", "{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}"),
    # variables
    case(
        "namespace",
        "{% set ns = namespace(n=0, names=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.names = ns.names + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.names }}"
        "{{ ns.other is defined }}",
    ),
    case("namespace-underscore", "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns.n }}"),
    case(
        "set-block",
        "{% set text %}a {{ messages[1].role }}\n{% endset %}[{{ text }}]{% set loud | upper %}quiet{% endset %}{{ loud }}",
    ),
    case("tuple-assignment", "{% set a, b = 1, 'two' %}{{ b }}{{ a }}{{ (a, b) }}{{ {'k': a, b: [none, true, 1.5]} }}"),
    case(
        "undefined",
        "[{{ missing }}][{{ messages[0].missing }}][{{ missing is defined }}][{{ missing|default('d') }}][{{ bos }}]",
    ),
    case("undefined-attribute", "{{ missing.attribute }}"),
    case("undefined-call", "{{ messages[0].missing() }}"),
    case("undefined-arithmetic", "{{ missing + 'x' }}"),
    case("special-tokens", "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}"),
    case("special-token-overridden", "{{ bos_token }}{{ eos_token }}", eos_token="</own>"),
    case(
        "extra-arguments",
        "{{ number + 1 }}{{ flag is true }}{{ table.a.b }}{{ nothing is none }}{{ documents }}{{ tools }}",
        number=41,
        flag=True,
        table={"a": {"b": "deep"}},
        nothing=None,
    ),
    case(
        "documents",
        "{% for d in documents %}{{ d.title }}: {{ d['text'] }}\n{% endfor %}",
        documents=[{"title": "T", "text": "ä"}],
    ),
    case("none-keys-dropped", "{% for m in messages %}{{ 'content' in m }}{{ m.tool_calls is defined }}{% endfor %}", CALLS),
    case(
        "reasoning-aliases",
        "{% for m in messages %}{{ m }}\n{% endfor %}",
        [*REASONED, {"role": "assistant", "reasoning": "r", "content": ""}],
    ),
    # whitespace
    case(
        "trim-blocks",
        "  {% if true %}\n  a\n  {% endif %}\nb\n{# comment #}\n  {# indented #}\nc\n{{ 'd' }}"
        "\n\n e {% if true %} f {% endif %}\n",
    ),
    case("minus", "a\n  {%- if true -%}\n  b  \n  {%- endif %}\n c {{- ' d ' -}} \n\n e {#- x -#} f\n\n"),
    case("plus", "a\n  {%+ if true +%}\nb\n  {%+ endif %}\nc"),
    case("raw", "{% raw %}{{ not }} {% a %}{% endraw %}\n{{ '{{' }}"),
    case("no-trailing-newline", "x\n"),
    case("windows-newlines", "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc"),
    case("lines", LINES),
    # JSON
    case("tojson", "{{ messages|tojson }}"),
    case("tojson-indent", "{{ tools|tojson(indent=4) }}|{{ tools[0]|tojson(2) }}", tools=[WEATHER]),
    case("tojson-ascii", "{{ messages|tojson(ensure_ascii=True) }}|{{ messages[1].content|tojson(true) }}"),
    case(
        "tojson-separators",
        "{{ tools|tojson(separators=(',', ':')) }}|{{ tools|tojson(indent=1, separators=[' ,', ' : ']) }}",
        tools=[WEATHER],
    ),
    case(
        "tojson-sorted",
        "{{ tools|tojson(sort_keys=true) }}|{{ {'b': 1, 'a': {'d': 2, 'c': 3}}|tojson(indent='--', sort_keys=true) }}",
        tools=[WEATHER],
    ),
    case(
        "tojson-scalars",
        "{{ [1, 1.0, 1e300, 0.1, true, none, 'é\u2028\x07</script>', [], {}, (1, 2)]|tojson }}"
        "{{ {1: 2, none: 3, true: 4, 1.5: 5}|tojson }}",
    ),
    case("tojson-undefined", "{{ missing|tojson }}"),
    case("tojson-empty-indent", "{{ [[], {}, [1], {'a': []}]|tojson(indent=2) }}|{{ [1, [2]]|tojson(indent=0) }}"),
    # functions, macros, blocks
    case("raise-exception", "before {{ raise_exception('Roles must alternate: ünïcode & <more>') }} after"),
    case(
        "strftime",
        "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d %H:%M:%S') }}|{{ strftime_now('%A, %-d. %B %j %%') }}",
    ),
    case(
        "generation",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}",
    ),
    case(
        "generation-trimmed",
        "{% for m in messages %}\n  {%- generation -%}\n  {{ loop.index }} {{ m.role }}"
        "\n  {%- endgeneration %}\n{% endfor %}",
    ),
    case("generation-scope", "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"),
    case(
        "macros",
        "{% macro wrap(text, mark='*', n=1) %}{{ mark * n }}{{ text }}{{ mark * n }}"
        "{% endmacro %}{% macro twice(text) %}{{ wrap(text) }}{{ wrap(text, n=2) }}{% endmacro %}"
        "{{ twice('a') }}{{ wrap(mark='-', text='b') }}{{ wrap.name }}{{ wrap.arguments }}",
    ),
    case(
        "macro-varargs",
        "{% macro all() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ all(1, 'b', c=[3]) }}{{ all(*[1, 2], **{'k': 'v'}) }}",
    ),
    case(
        "macro-recursive",
        "{% macro show(v, d=0) %}{% if v is mapping %}{% for k in v %}{{ '  ' * d }}{{ k }}"
        ":\n{{ show(v[k], d + 1) }}{% endfor %}{% else %}{{ '  ' * d }}{{ v }}\n{% endif %}"
        "{% endmacro %}{{ show(tools[0]) }}",
        tools=[WEATHER],
    ),
    case(
        "call-block",
        "{% macro box(title) %}[{{ title }}:{{ caller('in') }}]{% endmacro %}{% call(x) box('t') %}{{ x }}side{% endcall %}",
    ),
    case("filter-block", "{% filter upper|replace('A', 'o') %}a{{ messages[0].role }}{% endfilter %}"),
    case("block", "{% block intro %}hello {{ messages[1].role }}{% endblock %}{{ self.intro() }}"),
    case("with", "{% with a = 1, b = 'x' %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}"),
    case(
        "autoescape",
        "{% autoescape true %}{{ messages[1].content }}{{ '<' ~ messages[0].role ~ '>' }}"
        "{{ '<i>'|safe }}{{ ['<', '>'|safe]|join('&') }}{% endautoescape %}{{ '<' }}",
    ),
    case("dict-function", "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['x', 'y'], 0) }}{{ dict([('k', 'v')]) }}"),
    case(
        "cycler-joiner",
        "{% set c = cycler('x', 'y') %}{% set j = joiner(', ') %}{% for m in messages %}{{ j() }}"
        "{{ c.next() }}{{ c.current }}{% endfor %}",
    ),
    # operators, methods, filters, tests
    case(
        "operators",
        "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ -7 / 2 }}{{ 1 + 2.5 }}{{ 'a' + 'b' }}"
        "{{ 'ab' * 2 }}{{ [1] * 2 + [3] }}{{ 3 * 'x' }}{{ 1 ~ none ~ [2] }}{{ +1 }}{{ 5 - 6 }}"
        "{{ 1 < 2 < 3 }}{{ 'a' in 'cat' and not false or missing }}{{ 'x' if false }}",
    ),
    case(
        "slices",
        "{{ messages[1:][0].role }}{{ messages[-1].role }}{{ 'abcdef'[::2] }}{{ 'abcdef'[-2:] }}"
        "{{ 'abc'[1] }}{{ messages[::-1]|map(attribute='role')|list }}{{ 'abc'[7] }}"
        "{{ [1, 2, 3][:2] }}",
    ),
    case(
        "percent",
        "{{ '%s and %05.1f, %-4d|%+d %% %r %x %c' % ('a', 3.14159, 7, 8, 'q', 255, 'c') }}"
        "{{ '%(a)s-%(b)s-%(a)s' % {'a': 1, 'b': [2]} }}{{ '%*d' % (5, 42) }}{{ '%s' % 'one' }}",
    ),
    case(
        "str-format",
        "{{ '{} {1}'.format(1, 2) if false else '{0}-{name!r:>6}-{1:{width}.2f}'.format('a', 2.0, name='n', width=8) }}"
        "{{ '{a[b]} {c.role}'.format(a={'b': 1}, c=messages[0]) }}"
        "{{ '{x}'.format_map({'x': 'm'}) }}{{ '{{}}'.format() }}{{ '%s: %d'|format('f', 3) }}",
    ),
    case(
        "str-methods",
        "{{ ' a '.strip() }}{{ 'xxaxx'.strip('x') }}{{ 'a,b,,c'.split(',') }}"
        "{{ ' a b '.split() }}{{ 'a.b.c'.rsplit('.', 1) }}{{ 'abc'.startswith(('x', 'a')) }}"
        "{{ 'a-b'.replace('-', '+') }}{{ ', '.join(['x', 'y']) }}{{ 'l1\\nl2'.splitlines() }}"
        "{{ 'éa'.upper() }}{{ 'ab cd'.title() }}{{ 'abc'.find('c') }}{{ 'a'.center(5) }}"
        "{{ '7'.zfill(3) }}{{ 'a\tb'.expandtabs(4) }}{{ 'abcb'.rfind('b') }}"
        "{{ 'x=1=2'.partition('=') }}{{ 'aa'.count('a') }}{{ 'é'.encode('utf-8') }}"
        "{{ 'é'.encode(encoding='latin-1').decode('latin-1') }}"
        "{{ 'a b'.split(sep=' ', maxsplit=1) }}{{ 'ab'.translate({97: 'x'}) }}"
        "{{ 'abc'.removeprefix('a') }}{{ '12'.isdigit() }}",
    ),
    case(
        "container-methods",
        "{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.keys()|list }}{{ {'a': 1}.values()|list }}"
        "{{ {'a': 1}.items() }}{{ [1, 2, 1].count(1) }}{{ [1, 2].index(2) }}{{ {'a': 1}.copy() }}"
        "{{ (5).bit_length() }}{{ 1.5.is_integer() }}",
    ),
    case(
        "filters-text",
        "{{ ' x '|trim }}|{{ 'xay'|trim('xy') }}|{{ 'abc'|upper|lower|capitalize }}|"
        "{{ 'ab cd-ef'|title }}|{{ 'aXbX'|replace('X', '-', 1) }}|{{ 'a\\nb\\n\\nc'|indent }}|"
        "{{ 'a\\nb'|indent(2, true) }}|{{ 'a\\n\\nb'|indent('>', blank=true) }}|"
        "{{ 'x'|center(7) }}|{{ 'a long text here'|truncate(9) }}|"
        "{{ 'one two three'|wordwrap(7) }}|{{ 'a b'|wordcount }}|{{ '<b>x</b> y'|striptags }}|"
        "{{ '<&>'|escape }}|{{ 'a b/ü'|urlencode }}|{{ {'a': 'b c'}|urlencode }}|"
        "{{ 12|string + 'x' }}|{{ 'abc'|reverse }}|{{ 'abc'|list }}|"
        "{{ 'see http://x.org.'|urlize }}|{{ {'id': 'a<'}|xmlattr }}",
    ),
    case(
        "filters-lists",
        "{{ [3, 1, 2]|sort }}{{ ['b', 'A']|sort }}"
        "{{ ['b', 'A']|sort(case_sensitive=true, reverse=true) }}"
        "{{ messages|sort(attribute='role,content')|map(attribute='role')|join(',') }}"
        "{{ [1, 2, 3]|sum }}{{ messages|map(attribute='content')|map('length')|sum }}"
        "{{ [[1], [2]]|sum(start=[]) }}{{ [1, 1, 2, 'a', 'A']|unique|list }}"
        "{{ [1, 2, 3, 4, 5]|batch(2, '-')|list }}{{ [1, 2, 3, 4, 5]|slice(2)|list }}"
        "{{ [4, 9]|max }}{{ []|min }}{{ [1, 2]|first }}{{ [1, 2]|last }}{{ [1, 2]|reverse|list }}"
        "{{ messages|groupby('role')|map('first')|list }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
        "{{ messages|rejectattr('role', 'in', ['user'])|list|count }}"
        "{{ messages|map(attribute='nope', default='?')|join(attribute=none) }}"
        "{{ [1, 0, 2]|select|list }}{{ range(10)|select('odd')|list }}"
        "{{ [1, 2]|map('string')|join('+') }}{{ messages|join('/', attribute='role') }}"
        "{{ {'b': 1, 'a': 2}|dictsort(by='value', reverse=true) }}{{ {'a': 1}|items|list }}",
    ),
    case(
        "filters-numbers",
        "{{ 3.7|int }}{{ '42'|int + 1 }}{{ 'x'|int(7) }}{{ '0x1f'|int(base=16) }}"
        "{{ '1.5'|float }}{{ 2.567|round(2) }}{{ 2.5|round(method='floor') }}{{ 12|round(-1) }}"
        "{{ -3|abs }}{{ 1536|filesizeformat }}{{ 1536|filesizeformat(true) }}",
    ),
    case(
        "tests",
        "{{ 'a' is string }}{{ 1 is number }}{{ {} is mapping }}{{ [] is sequence }}"
        "{{ 'x' is iterable }}{{ none is none }}{{ 4 is divisibleby 2 }}{{ 3 is odd }}"
        "{{ true is boolean }}{{ 1.0 is float }}{{ 1 is integer }}{{ 'a' is in 'ab' }}"
        "{{ 1 is sameas 1 }}{{ 2 is gt 1 }}{{ 'trim' is filter }}{{ 'odd' is test }}"
        "{{ messages is callable }}{{ 'A' is upper }}{{ missing is undefined }}"
        "{{ 1 is not eq 2 }}",
    ),
    case(
        "attr-filter",
        "{{ messages[0]|attr('role') }}|{{ 'x'|attr('upper') is callable }}|{{ messages|map(attribute='role.0')|list }}",
    ),
    case("key-and-method", "{{ data['keys'] }}{{ data.keys is callable }}", data={"keys": "own"}),
    case("unknown-filter", "{{ 'x'|nonsense }}"),
    case("unknown-test", "{{ 'x' is nonsense }}"),
    case("syntax-error", "a\nb {% if %}"),
    case("unclosed-block", "a\n{% if true %}\nb"),
    case("unknown-tag", "{% nonsense %}"),
    case("type-error", "{{ 1 + 'a' }}"),
    case("zero-division", "{{ 1 // 0 }}"),
    case("wrong-arguments", "{{ 'a'.upper(1) }}"),
    case("include", "{% include 'other' %}"),
    case("modifies-list", "{% set l = [1] %}{{ l.append(2) }}"),
    # continuing
    case("continue", CHATML, SHORT, continue_final_message=True),
    case("continue-trimmed", LLAMA3, SHORT, continue_final_message=True),
    case("continue-plain", LINES, SHORT, continue_final_message=True),
    case("continue-blocks", GEMMA, BLOCKS, continue_final_message=True),
    case("continue-reasoning", CHATML, REASONED, continue_final_message="reasoning_content"),
    case("continue-alias", CHATML, REASONED[:2], continue_final_message="thinking"),
    case(
        "continue-dropped",
        "{% for m in messages if m.content != 1 and m.role != 'assistant' %}{{ m.content }}{% endfor %}",
        SHORT,
        continue_final_message=True,
    ),
    case("continue-unread-field", "{{ messages[0].role }}", SHORT, continue_final_message=True),
    case("continue-missing-field", LINES, [SHORT[0], {"role": "assistant"}], continue_final_message=True),
    case("continue-no-text", GEMMA, [{"role": "user", "content": [{"type": "image"}]}], continue_final_message=True),
    case("continue-and-prompt", LINES, SHORT, continue_final_message=True, add_generation_prompt=True),
    case("no-messages", LINES, []),
]


class StoppedClock(datetime):
    """A datetime whose present is NOW."""

    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(NOW)


def rendering(tokenizer, item):
    """The case with transformers' rendering, or with the type and text of its error."""
    try:
        text = tokenizer.apply_chat_template(
            item["messages"], chat_template=item["template"], tokenize=False, **item["arguments"]
        )
    except Exception as error:
        # jinja2's and the template's errors are compared by their text, others only by being errors.
        known = isinstance(error, jinja2.TemplateError) and not isinstance(error, jinja2.sandbox.SecurityError)
        text = str(error) if known else None
        return {**item, "error": {"type": type(error).__name__, "text": text}}
    return {**item, "rendering": text}


def main():
    names = [item["name"] for item in CASES]
    assert len(names) == len(set(names)), "names of cases must differ"
    chat_template_utils.datetime = StoppedClock
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0})), **special)
    document = {
        "made_by": "python -m tests.export.chat_templates",
        "versions": {
            "transformers": transformers.__version__,
            "jinja2": jinja2.__version__,
            "python": platform.python_version(),
        },
        "now": NOW,
        "special_tokens": special,
        "cases": [rendering(tokenizer, item) for item in CASES],
    }
    OUTPUT.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for item in document["cases"]:
        if "error" in item:
            print(item["name"], item["error"])


if __name__ == "__main__":
    main()
