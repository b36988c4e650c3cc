"""Writes cases.json: what Jinja2 makes of the constructs that chat templates of instruction models use.

    python3 generate.py        needs jinja2 3.1

The environment is that of `transformers.utils.chat_template_utils`: a sandbox with `trim_blocks`, `lstrip_blocks`, loop controls, the
`generation` tag, and the functions `raise_exception`, `strftime_now` and `tojson`. The templates are written for this file: each stands
for the way in which a family of models writes conversations, and none is a copy.
"""

import json
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

DAY = datetime(2026, 2, 3)

# Variables that every construct is rendered with.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds “numbers” <b>",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": ["number", "null"]}}, "required": ["a"]},
        },
    }
]
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "<think>\n2 + 3\n</think>\n\nIt is 5."},
    {"role": "user", "content": "And 'ü' \"q\"?\n"},
]
NESTED = {"b": 1, "a": [1, 2.5, None, True], "t": {"x": "y"}}

CONSTRUCTS = {
    "loops": [
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}",
        "{% for m in messages %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{% endfor %}",
        "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ loop.nextitem.role if loop.nextitem is defined else '-' }} {% endfor %}",
        "{% for m in messages %}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{% for m in messages %}{{ loop.changed(m.role) }} {% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.role }}{% else %}none{% endfor %}",
        "{% for m in [] %}x{% else %}empty{% endfor %}",
        "{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.role[0] }}{% endfor %}",
        "{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(6, 0, -2) %}{{ i }}{% endfor %}",
        "{% for k, v in nested.items() %}{{ k }}:{{ v }};{% endfor %}",
        "{% for k, v in nested | items %}{{ k }};{% endfor %}",
        "{% for k in nested %}{{ k }}{% endfor %}{% for k in nested.keys() %}{{ k }}{% endfor %}",
        "{% for k, v in nested | dictsort %}{{ k }};{% endfor %}",
        "{% for a, b in [[1, 2], [3, 4]] %}{{ a + b }},{% endfor %}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 3 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{%- for m in messages -%}\n  {{- m.role -}}\n{%- endfor -%}",
        "{% for m in messages %}\n    {{ m.role }}\n{% endfor %}",
        "{% for m in messages recursive %}{{ m.role[0] }}{% endfor %}",
    ],
    "scopes": [
        "{% set x = 1 %}{% for i in range(3) %}{% set x = x + 1 %}{% endfor %}{{ x }}",
        "{% set ns = namespace(x=1, found=false) %}{% for i in range(3) %}{% set ns.x = ns.x + i %}{% set ns.found = true %}{% endfor %}{{ ns.x }}{{ ns.found }}",
        "{% set ns = namespace() %}{% set ns.tools = [] %}{% set ns.tools = ns.tools + ['a'] %}{{ ns.tools | length }}",
        "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
        "{% set t %}x{{ 1 + 1 }}{% endset %}{{ t }}{{ t | length }}",
        "{% set t | trim | upper %}  x  {% endset %}[{{ t }}]",
        "{% if true %}{% set x = 5 %}{% endif %}{{ x }}",
        "{% with x = 1, y = 2 %}{{ x + y }}{% endwith %}{{ x is defined }}",
        "{% macro f(a, b='d', c=none) %}{{ a }}{{ b }}{{ c is none }}{% endmacro %}{{ f(1) }}|{{ f(1, c=2) }}|{{ f(a=1, b=2) }}",
        "{% macro f(x) %}{% if x is mapping %}{ {%- for k, v in x.items() %}{{ k }}={{ f(v) }}{% endfor %} }{% elif x is string %}{{ x }}{% elif x is iterable %}[{% for i in x %}{{ f(i) }} {% endfor %}]{% else %}{{ x }}{% endif %}{% endmacro %}{{ f(nested) }}",
        "{%- macro wrap(t) -%}\n  <{{ t }}>\n{%- endmacro -%}{{ wrap('a') | trim }}{{ wrap('b') ~ 'c' }}",
        "{% macro f() %}({{ caller() }}){% endmacro %}{% call f() %}in{% endcall %}",
        "{% macro f(x) %}{{ bos_token }}{{ x }}{% endmacro %}{{ f('y') }}",
        "{% filter upper %}ab{{ 'c' }}{% endfilter %}",
        "{% raw %}{{ kept }}{% endraw %}{# gone #}",
    ],
    "conditions": [
        "{{ 'y' if messages[0].role == 'system' else 'n' }}{{ 'y' if false }}",
        "{% if not add_generation_prompt %}a{% elif tools is none %}b{% else %}c{% endif %}",
        "{{ missing is defined }}{{ missing is undefined }}{{ nothing is none }}{{ nothing is not none }}",
        "{% if missing %}a{% endif %}{{ missing | default('d') }}{{ nothing | default('d') }}{{ nothing | default('d', true) }}{{ '' | default('e', boolean=true) }}",
        "{{ messages is string }}{{ messages is iterable }}{{ messages is sequence }}{{ nested is mapping }}{{ 'a' is iterable }}{{ nested is iterable }}",
        "{{ 1 is number }}{{ 1.5 is float }}{{ 1 is integer }}{{ true is boolean }}{{ true is number }}{{ '1' is number }}{{ true is true }}{{ 1 is true }}{{ false is false }}",
        "{{ 3 is odd }}{{ 4 is even }}{{ 6 is divisibleby(3) }}{{ 'a' is in ['a'] }}{{ 'a' is eq('a') }}{{ 1 is lt(2) }}",
        "{{ 'role' in messages[0] }}{{ 'x' not in messages[0] }}{{ 'rie' in 'brief' }}{{ 2 in [1, 2] }}",
        "{{ messages[0].role == 'system' and messages | length > 1 or false }}{{ not (true and false) }}",
        "{{ (messages[1]['role'] == 'user') != (1 % 2 == 0) }}",
        "{{ 'a' == 'a' and none or 'b' }}{{ '' or 'x' }}{{ 'x' and 'y' }}{{ none is none and true }}",
        "{{ messages[0].tool_calls is defined }}{{ messages[0]['tool_calls'] is defined }}{{ messages[0].tool_calls }}",
        "{{ messages[-1].content is string and messages[-1].content is not mapping }}",
        "{{ enable_thinking is defined and enable_thinking is false }}{{ enable_thinking is not defined or enable_thinking }}",
        "{{ 'upper' is upper }}{{ 'UP' is upper }}{{ 'a' is lower }}{{ 'x' is sameas 'x' }}{{ none is sameas none }}",
    ],
    "texts": [
        "[{{ ' a '.strip() }}][{{ ' a '.lstrip() }}][{{ ' a '.rstrip() }}][{{ 'xxaxx'.strip('x') }}][{{ '\n\na'.lstrip('\n') }}]",
        "{{ 'a,b,c'.split(',') }}{{ ' a  b '.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'a,b'.split(',')[-1] }}{{ 'a</t>b'.split('</t>')[0] }}",
        "{{ 'a-b-c'.rsplit('-', 1) }}{{ 'a\nb'.splitlines() }}{{ 'a-b-c'.partition('-')[2] }}{{ 'a-b-c'.rpartition('-')[0] }}{{ 'ab'.partition('-')[0] }}",
        "{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith('c') }}{{ 'abc'.startswith(('x', 'a')) }}{{ 'abc'.endswith(('x', 'y')) }}",
        "{{ 'aXbX'.replace('X', '-') }}{{ 'aXbX'.replace('X', '-', 1) }}{{ 'aXb' | replace('X', '') }}",
        "{{ 'abc'.upper() }}{{ 'ABC'.lower() }}{{ 'hello you'.title() }}{{ 'hello you'.capitalize() }}{{ 'aB' | upper }}{{ 'aB' | lower }}{{ 'a b' | title }}{{ 'ab c' | capitalize }}",
        "{{ 'banana'.find('na') }}{{ 'banana'.count('a') }}{{ 'banana'.find('x') }}{{ 'banana'.rfind('na') }}",
        "{{ '-'.join(['a', 'b']) }}{{ ['a', 'b'] | join('-') }}{{ [1, 2] | join(', ') }}{{ messages | map(attribute='role') | join(',') }}",
        "{{ 'abcdef'[1:3] }}{{ 'abcdef'[-2:] }}{{ 'abcdef'[:-2] }}{{ 'abcdef'[::2] }}{{ 'abcdef'[::-1] }}{{ 'abc'[0] }}{{ 'abc'[-1] }}",
        "{{ 'a' + 'b' }}{{ 'a' ~ 1 ~ none ~ true ~ 1.0 }}{{ 'ab' * 2 }}{{ '%s' | format('x') }}",
        "{{ 'a b'.isdigit() }}{{ '12'.isdigit() }}{{ 'ab'.isalpha() }}{{ 'AB'.isupper() }}{{ 'ab'.islower() }}{{ ' '.isspace() }}{{ 'a1'.isalnum() }}",
        "{{ ' x ' | trim }}{{ 'abc' | length }}{{ 'abc' | first }}{{ 'abc' | last }}{{ 'abc' | reverse }}{{ 'abc' | list }}",
        "{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent(2, blank=true) }}|{{ 'a\nb' | indent(width=4, first=True) }}",
        "{{ '<b>&' | safe }}{{ '12' | int + 1 }}{{ '1.5' | float }}{{ 3.7 | int }}{{ 5 | string + 'a' }}",
        "{{ 'x'.removeprefix('x') }}{{ 'prefix-a'.removeprefix('prefix-') }}{{ 'a.txt'.removesuffix('.txt') }}",
        "{{ '{} is {}'.format('a', 1) }}{{ 'abc' is string }}",
        "{{ 'line one\nline two'.split('\n') | length }}",
    ],
    "numbers": [
        "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 7 / 2 }}{{ -7 // 2 }}{{ 1 + 2 * 3 }}{{ 4 / 2 }}{{ 1.5 + 1 }}{{ 10 - 2.0 }}",
        "{{ 3 | abs }}{{ -3 | abs }}{{ 2.567 | round(2) }}{{ 2.4 | round | int }}{{ [3, 1, 2] | max }}{{ [3, 1, 2] | min }}{{ [1, 2] | sum }}",
        "{{ 1e3 }}{{ 1_000 }}{{ 0.1 + 0.2 }}{{ 1 == 1.0 }}{{ 5 > 3 }}",
    ],
    "lists and dictionaries": [
        "{{ [1, 'a', none, true, 1.5, {'k': 'v'}] }}{{ {'a': [1]} }}{{ [] }}{{ {} }}",
        "{{ messages[1:] | length }}{{ messages[:-1] | length }}{{ messages[-1].role }}{{ messages[0]['role'] }}{{ (messages | last).role }}{{ (messages | first)['role'] }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | selectattr('role', '==', 'user') | list | length }}{{ messages | rejectattr('role', 'in', ['user', 'system']) | map(attribute='role') | list }}{{ messages | selectattr('name') | list }}",
        "{{ messages | map(attribute='content') | map('length') | list }}{{ ['a', 'b'] | map('upper') | join }}{{ messages | map(attribute='name', default='-') | join }}",
        "{{ [1, 2, 3] | select('odd') | list }}{{ [1, 2, 3] | reject('equalto', 2) | list }}{{ ['', 'a'] | select | list }}{{ [0, 1] | select('defined') | list }}",
        "{{ [3, 1, 2] | sort }}{{ ['b', 'A'] | sort }}{{ [3, 1] | sort(reverse=true) }}{{ messages | sort(attribute='role') | map(attribute='role') | join(',') }}{{ [1, 1, 2] | unique | list }}",
        "{{ [1] + [2, 3] }}{{ [1, 2].index(2) }}{{ [1, 1].count(1) }}",
        "{{ nested.get('a') }}{{ nested.get('zz') }}{{ nested.get('zz', 'd') }}{{ nested['t']['x'] }}{{ nested.t.x }}{{ nested | length }}",
        "{{ nested.keys() | list }}{{ nested.values() | list | length }}{{ dict(a=1, b='c') }}{{ dict(nested, z=1) | length }}",
        "{% set l = namespace(v=[]) %}{% for m in messages %}{% set l.v = l.v + [m.role] %}{% endfor %}{{ l.v }}",
        "{{ nested | items | list | length }}{{ nested | attr('missing') is defined }}{{ [1, 2, 3, 4] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}",
        "{{ messages[10] is defined }}{{ [1, 2, 3][1:] }}{{ [1, 2, 3][:10] }}{{ 'a' in nested }}{{ {'a': 1}.a }}{{ {1: 'x'}[1] }}",
    ],
    "JSON": [
        "{{ tools | tojson }}",
        "{{ tools[0].function | tojson(indent=2) }}",
        "{{ nested | tojson(indent=4) }}",
        "{{ nested | tojson(separators=(',', ':')) }}",
        "{{ nested | tojson(sort_keys=true) }}",
        "{{ 'ü <b> & \"q\" \\' \n' | tojson }}{{ 'ü' | tojson(ensure_ascii=true) }}{{ 'ü' | tojson(ensure_ascii=false) }}",
        "{{ none | tojson }}{{ true | tojson }}{{ 1.0 | tojson }}{{ 1 | tojson }}{{ [] | tojson }}{{ {} | tojson }}{{ [] | tojson(indent=2) }}",
        "{{ tools | map(attribute='function') | list | tojson }}{{ tools | map(attribute='function.name') | join }}",
        "{{ nested.t | string }}{{ nested.a | string }}{{ {'q': \"it's\", 'd': 'say \"x\"', 'n': 'a\nb'} }}",
    ],
    "functions": [
        "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d') }}|{{ strftime_now('%B %-d, %Y') }}|{{ strftime_now('%A') }}",
        "{% set today = strftime_now('%d %b %Y') if strftime_now is defined else 'x' %}{{ today }}",
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}ok",
        "{{ raise_exception('roles must alternate') }}",
        "{{ range is defined }}{{ raise_exception is defined }}{{ strftime_now is defined }}{{ namespace is defined }}",
    ],
    "marks and white space": [
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
        "a\n{%- generation -%}\n b\n{%- endgeneration -%}\nc",
        "a\n    {% generation %}\n    b\n    {% endgeneration %}\nc",
        "a\n  {%- if true %}\n  b\n  {%- endif %}\nc\n",
        "  {% if true %}\n  a\n  {% endif %}\nb",
        "a  {%+ if true %}b{% endif +%}\nc",
        "{{ 'a' -}}\n  b\n{{- 'c' }}\n{# x #}\n  {#- y -#}\n d",
        "{%- if true -%}   a   {%- endif -%}",
        "x\n\n{% set a = 1 %}\n\n{{ a }}\n",
        "{{'a'}}{{ \"b\" }}{{ 'a\\nb' }}{{ 'tab\\t' }}{{ '\\u00fc' }}{{ 'it\\'s' }}",
    ],
}

CHATML = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"

# One for each way of writing conversations down. Names are those of families that write so.
FAMILIES = {
    "qwen2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You help.' }}{%- endif %}
    {{- "\\n\\n# Functions\\n<list>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</list><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == "user") or (m.role == "system" and not loop.first) or (m.role == "assistant" and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- elif m.role == "assistant" %}
        {{- '<|im_start|>' + m.role }}
        {%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}{{- call.arguments | tojson }}{{- '}' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<result>\\n' }}{{- m.content }}{{- '\\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(multi=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and m.role == "user" and m.content is string and not(m.content.startswith('<result>') and m.content.endswith('</result>')) %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.content is string %}{%- set content = m.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if m.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- if loop.last or (not loop.last and reasoning) %}
                {{- '<|im_start|>' + m.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + m.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + m.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "qwq": """{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}""",
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns have to alternate') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama3": """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "llama3.2": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Tools are there\\n" }}{%- endif %}
{{- "Day: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("no first message of the user") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("turns have to alternate") }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("only user and assistant, and system first") }}
    {%- endif %}
{%- endfor %}
""",
    "mistral-small": """{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "Today is " + today + "." %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{%- set system_message = messages[0]['content'] %}{%- else %}{%- set system_message = messages[0]['content'][0]['text'] %}{%- endif %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}
            {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST]' }}
            {%- for block in message['content'] %}
                {%- if block['type'] == 'text' %}{{- block['text'] }}{%- elif block['type'] in ['image', 'image_url'] %}{{- '[IMG]' }}{%- else %}{{- raise_exception('text and images only') }}{%- endif %}
            {%- endfor %}
            {{- '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("turns have to alternate") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("invalid content") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
""",
    "phi3": """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "phi4": """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    "smollm2": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "smollm3": """{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- if enable_thinking -%}{%- set mode = "/think" -%}{%- else -%}{%- set mode = "/no_think" -%}{%- endif -%}
{{- "<|im_start|>system\\n" -}}
{%- if messages[0].role == "system" -%}
  {%- set system_message = messages[0].content -%}
  {%- if "/no_think" in system_message -%}{%- set mode = "/no_think" -%}{%- elif "/think" in system_message -%}{%- set mode = "/think" -%}{%- endif -%}
  {%- set instructions = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{%- if "/system_override" in system_message -%}
  {{- instructions.replace("/system_override", "").rstrip() -}}
{%- else -%}
  {{- "## Metadata\\n\\n" -}}
  {{- "Day: " ~ strftime_now("%d %B %Y") ~ "\\nMode: " + mode + "\\n\\n" -}}
  {%- if instructions -%}{{- instructions + "\\n\\n" -}}{%- endif -%}
  {%- if xml_tools or python_tools or tools -%}
    {{- "### Tools\\n\\n" -}}
    {%- set ns = namespace(list="") -%}
    {%- for tool in (xml_tools or tools or []) -%}
      {%- set one = tool.function | string -%}
      {%- set ns.list = ns.list ~ one ~ "\\n" -%}
    {%- endfor -%}
    {{- ns.list | length > 0 -}}
  {%- endif -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\\n"  + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}
        {{ "<|im_start|>" + "user\\n"  + content + "<|im_end|>\\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if mode == "/think" -%}{{ "<|im_start|>assistant\\n" }}{%- else -%}{{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n"  }}{%- endif -%}
{%- endif -%}
""",
    "deepseek-r1": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}{{'<|outputs|>' + message['content'] + eos_token}}{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + content + eos_token}}{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}{{'<|begin|>' + message['content']}}{%- set ns.is_output_first = false %}{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<|outputs|>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>\\n'}}{% endif %}""",
    "deepseek-v3.1": """{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% set ns = namespace(system_prompt='', is_first_sp=true, is_last_user=false) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_last_user = true -%}{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}{%- if ns.is_last_user %}{{'<|Assistant|>'}}{%- if message['prefix'] is defined and message['prefix'] and thinking %}{{'<think>'}}{%- else %}{{'</think>'}}{%- endif %}{%- endif %}{%- set ns.is_last_user = false -%}{%- set content = message['content'] -%}{%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}{{content + eos_token}}{%- endif %}{%- endfor -%}{%- if add_generation_prompt and ns.is_last_user %}{{'<|Assistant|>'}}{%- if not thinking %}{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}{% endif %}""",
    "olmo2": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}{% else %}{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    "granite": """{%- if messages[0]['role'] == 'system' %}
 {%- set system_message = messages[0]['content'] %}
 {%- set loop_messages = messages[1:] %}
 {%- else %}
 {%- set system_message = "Today is " + strftime_now('%B %d, %Y') + "." %}
 {%- if tools and documents %}
 {%- set system_message = system_message + " Tools and documents." %}
 {%- elif tools %}
 {%- set system_message = system_message + " Tools." %}
 {%- elif documents %}
 {%- set system_message = system_message + " Documents." %}
 {%- elif thinking %}
 {%- set system_message = system_message + " Think." %}
 {%- endif %}
 {%- if 'citations' in controls and documents %}{%- set system_message = system_message + ' Cite.' %}{%- endif %}
 {%- set loop_messages = messages %}
 {%- endif %}
 {{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
 {%- if tools %}
 {{- '<|start_of_role|>tools<|end_of_role|>' }}
 {{- tools | tojson(indent=4) }}
 {{- '<|end_of_text|>\\n' }}
 {%- endif %}
 {%- for message in loop_messages %}
 {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
 {%- if loop.last and add_generation_prompt %}
 {{- '<|start_of_role|>assistant' }}
 {%- if controls %}{{- ' ' + controls | tojson()}}{%- endif %}
 {{- '<|end_of_role|>' }}
 {%- endif %}
 {%- endfor %}""",
    "command-r": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% elif false == true %}{% set loop_messages = messages %}{% set system_message = 'x' %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% if system_message != false %}{{ '<|START|><|SYSTEM|>' + system_message + '<|END|>' }}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns have to alternate') }}{% endif %}{% set content = message['content'] %}{% if message['role'] == 'user' %}{{ '<|START|><|USER|>' + content.strip() + '<|END|>' }}{% elif message['role'] == 'assistant' %}{{ '<|START|><|BOT|>'  + content.strip() + '<|END|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|START|><|BOT|>' }}{% endif %}""",
    "gpt-oss": """{%- macro render_type(spec, required, nullable=false) -%}
    {%- if spec.type == "array" -%}{%- if spec['items'] -%}{{- render_type(spec['items'], required) + "[]" }}{%- else -%}any[]{%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type is not mapping and spec.type[0] is defined -%}
        {%- if spec.type | length > 1 -%}{{- spec.type | join(" | ") }}{%- else -%}{{- spec.type[0] }}{%- endif -%}
    {%- elif spec.type == "string" -%}{%- if spec.enum -%}{{- '"' + spec.enum|join('" | "') + '"' -}}{%- else -%}{{- "string" }}{%- endif -%}
    {%- elif spec.type in ["number", "integer"] -%}{{- "number" }}
    {%- else -%}{{- "any" }}{%- endif -%}
{%- endmacro -%}
{%- macro render_tools(name, tools) -%}
    {{- "## " + name + "\\n\\n" }}{{- "namespace " + name + " {\\n\\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\\n" }}
        {{- "type "+ tool.name + " = " }}
        {%- if tool.parameters and tool.parameters.properties -%}
            {{- "(_: {\\n" }}
            {%- for param_name, param in tool.parameters.properties.items() %}
                {{- param_name }}
                {%- if param_name not in (tool.parameters.required or []) -%}{{- "?" }}{%- endif -%}
                {{- ": " }}{{- render_type(param, tool.parameters.required or []) }}
                {%- if not loop.last %}{{- ",\\n" }}{%- else %}{{- "\\n" }}{%- endif -%}
            {%- endfor %}
            {{- "}) => any;\\n\\n" }}
        {%- else -%}{{- "() => any;\\n\\n" }}{%- endif -%}
    {%- endfor %}
    {{- "}" }}
{%- endmacro -%}
{%- macro build_system() -%}
    {%- if model_identity is not defined %}{{- "You are a model.\\n" -}}{%- else %}{{- model_identity + "\\n" }}{%- endif %}
    {{- "Day: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\\n" }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}{{- build_system() }}{{- "<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}{%- set developer = messages[0].content %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set developer = "" %}{%- set loop_messages = messages %}{%- endif %}
{%- if developer or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if developer %}{{- "# Instructions\\n\\n" }}{{- developer }}{%- endif %}
    {%- if tools -%}{{- "\\n\\n# Tools\\n\\n" }}{{- render_tools("functions", tools) }}{%- endif -%}
    {{- "<|end|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "thinking" in message %}{{- raise_exception("no thinking here") }}{%- endif %}
        {%- if loop.last and not add_generation_prompt %}{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}{%- else %}{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}{%- set last_tool_call.name = none %}{%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_tool_call.name is none %}{{- raise_exception("a result without a call") }}{%- endif %}
    {%- elif message.role == 'user' -%}{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
    "glm4": """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- macro visible_text(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- elif item is string -%}{{- item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- content }}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user_index=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last_user_index = loop.index0 -%}{%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible_text(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible_text(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning_content = '' %}
{%- set content = visible_text(m.content) %}
{%- if '</think>' in content %}
{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_user_index and reasoning_content -%}
{{ '\\n<think>' + reasoning_content.strip() +  '</think>'}}
{%- else -%}
{{ '\\n<think></think>' }}
{%- endif -%}
{%- if content.strip() -%}
{{ '\\n' + content.strip() }}
{%- endif -%}
{%- elif m.role == 'system' -%}
<|system|>
{{ visible_text(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "exaone": """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}{% set content = message['content'] %}{% if '</thought>' in content %}{% set content = content.split('</thought>')[-1].lstrip('\\\\n') %}{% endif %}{{ '[|' + message['role'] + '|]' + content }}{% if not message['role'] == 'user' %}{{ '[|endofturn|]' }}{% endif %}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n[|assistant|]' }}{% endif %}""",
    "nemotron": """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "thinking on" %}{%- endif %}{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- system_message }}{{- "<|eot_id|>" }}{%- for message in messages %}{%- if message['role'] == 'assistant' and '</think>' in message['content'] %}{%- set content = message['content'].split('</think>')[-1].lstrip() %}{%- else %}{%- set content = message['content'] %}{%- endif %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + content | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
}


class Generation(Extension):
    """The tag that marks what a model is trained on; it changes no text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = DAY.strftime
    return made


def rendered(template, messages, generate, variables):
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generate}
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        return {"text": environment().from_string(template).render(**{**given, **tokens, **variables})}
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}


def main():
    variables = {"tools": TOOLS, "nested": NESTED, "nothing": None, "enable_thinking": False}
    user, turns = MESSAGES[1:2], MESSAGES[1:]
    conversations = [
        (user, True, {}),
        (MESSAGES, True, {}),
        (turns, True, {"enable_thinking": False}),
        (MESSAGES[:3], False, {}),
        (user, True, {"tools": TOOLS}),
        (MESSAGES[2:], True, {}),
    ]
    out = {
        "jinja2": jinja2.__version__,
        "day": f"{DAY:%Y-%m-%d}",
        "messages": MESSAGES,
        "variables": variables,
        "constructs": [
            {"kind": kind, "template": template, **rendered(template, MESSAGES, True, variables)}
            for kind, templates in CONSTRUCTS.items()
            for template in templates
        ],
        "conversations": [
            {"messages": messages, "add_generation_prompt": generate, "variables": variables}
            for messages, generate, variables in conversations
        ],
        "families": [
            {"name": name, "template": template, "rendered": [rendered(template, *conversation) for conversation in conversations]}
            for name, template in FAMILIES.items()
        ],
    }
    Path(__file__).with_name("cases.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(out['constructs'])} constructs, {len(out['families'])} families")


if __name__ == "__main__":
    main()
