"""Chat templates drawn from a grammar: what templates of models use, and what leaves, loops, grows and recurses."""

# ruff: noqa: E501 - tables of words
from __future__ import annotations

from hypothesis import strategies as st

from tests.endurance.hostile.mutants import pieces

SOUND = """\
{% for m in messages %}{{ bos_token if loop.first }}<|im_start|>{{ m.role }}
{{ m['content'] | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NAMES = (
    "messages", "bos_token", "tools", "loop", "cycler", "joiner", "namespace", "dict", "range", "self", "lipsum",
    "raise_exception", "strftime_now", "x", "none", "true", "''", "[]", "{}", "()", "1", "10**9", "'a'", "1.5", "-1",
    "'\\x1b[31m'", "'\u202e'", "'{}'", "'%s'", "'a'*10**6",
)  # fmt: skip
ATTRIBUTES = (
    "__class__", "__mro__", "__subclasses__()", "__globals__", "__init__", "__builtins__", "__call__", "__dict__",
    "__reduce__", "__getattribute__", "gi_frame", "cr_frame", "f_globals", "format", "format_map", "func_code", "items()",
    "append(1)", "pop()", "update({})", "clear()", "role", "content", "0", "strip()", "split('')", "join", "zfill(10**9)",
    "ljust(10**8)", "center(10**8)", "replace('', 'aaaa')", "encode()", "fromkeys('ab')", "mro()", "_environment",
    "environment", "undefined_to_none", "template", "index", "x",
)  # fmt: skip
FILTERS = (
    "trim", "tojson", "tojson(indent=10**7)", "list", "join(',')", "replace('a','aaaaaaaaaa')", "length", "string", "int", "upper", "safe",
    "map('upper')", "map(attribute='__class__')", "attr('__class__')", "attr('format')", "selectattr('role')", "sort", "reverse",
    "batch(1)", "slice(10**9)", "indent(10**8)", "center(10**8)", "wordwrap(1)", "truncate(10**9)", "format(1)",
    "format(10**9)", "xmlattr", "pprint", "groupby('role')", "sum", "urlize", "random", "filesizeformat", "dictsort",
    "striptags", "wordcount", "unique", "map('replace','a','aaaa')", "first", "last", "default('')", "e",
)  # fmt: skip
BINARY = ("+", "*", "**", "~", "//", "/", "%", "-", "==", "in", "and", "or", "<", "is defined and", "if 1 else")


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """Draw an expression."""
    text = draw(st.sampled_from(NAMES))
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.integers(0, 4))
        if shape == 0:
            text += f".{draw(st.sampled_from(ATTRIBUTES))}"
        elif shape == 1:
            text = f"({text})|{draw(st.sampled_from(FILTERS))}"
        elif shape == 2 and depth:
            text += f"[{draw(expressions(depth - 1))}]"
        elif shape == 3 and depth:
            text += f"({draw(expressions(depth - 1))})"
        elif depth:
            text = f"({text}) {draw(st.sampled_from(BINARY))} ({draw(expressions(depth - 1))})"
    return text


def _block(before: str, after: str) -> st.SearchStrategy[str]:
    return st.tuples(expressions(), st.deferred(statements)).map(lambda t: before.replace("E", t[0], 1) + t[1] + after)


def statements() -> st.SearchStrategy[str]:
    """Draw a part of a template."""
    return st.one_of(
        st.sampled_from((SOUND, "text", "\x1b[31m", "\u202e", "{{", "{% ", "{#", "{% break %}", "{{ caller() }}",
                         "{{ m(1) }}", "{{ self.b() }}", "{% include 'a' %}", "{% import 'os' as x %}", "{% extends x %}",
                         "{% raw %}{% endraw %}", "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}")),
        expressions().map(lambda e: "{{ " + e + " }}"),
        expressions().map(lambda e: "{% set x = " + e + " %}"),
        expressions().map(lambda e: "{% set ns = namespace(x=1) %}{% set ns.x = " + e + " %}"),
        expressions().map(lambda e: "{% do " + e + " %}"),
        _block("{% for x in E %}", "{% endfor %}"),
        _block("{% for x in range(99999) %}{{ E }}", "{% endfor %}"),
        _block("{% for x in E recursive %}{{ loop(x) }}", "{% endfor %}"),
        _block("{% if E %}", "{% endif %}"),
        _block("{% macro m(x) %}{{ m(x) }}{{ E }}", "{% endmacro %}{{ m(1) }}"),
        _block("{% set x %}{{ E }}", "{% endset %}"),
        _block("{% filter E %}", "{% endfilter %}"),
        _block("{% generation %}{{ E }}", "{% endgeneration %}"),
        _block("{% block b %}{{ E }}{{ self.b() }}", "{% endblock %}"),
    )  # fmt: skip


def drawn() -> st.SearchStrategy[bytes]:
    """Draw a template."""
    made = st.lists(statements(), min_size=1, max_size=4).map(lambda parts: "".join(parts).encode())
    return made | made | pieces(SOUND.encode())
