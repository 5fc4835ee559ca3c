"""Templates that attack: they are stopped before they use up memory or time."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erllama_core.errors import TemplateError
from erllama_core.model import template_budget
from erllama_core.model.chat_template import compile_template, render_template

CHAT = [{"role": "user", "content": "hi"}]

# Lists, or tuples, of two references to the one before: 2**60 numbers, written out.
_LISTS = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
_TUPLES = _LISTS.replace("[1]", "(1,)").replace("[ns.a, ns.a]", "(ns.a, ns.a)")
_DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}BODY{% endfor %}"

ATTACKS: dict[str, list[str]] = {
    "attributes": [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ (messages | map('list')).send(1) }}",
    ],
    "loops": [
        "{% for a in range(99999999) %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        (
            "{% for a in range(100000) %}{{ messages | map('list') | list }}{% endfor %}"
            "{% for a in range(100000) %}{{ [range(100000)] | map('list') | list }}{% endfor %}"
        ),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    ],
    "strings": [
        "{{ 'a' * 300000000 }}",
        "{{ 300000000 * 'a' }}",
        "{{ ('a' | safe) * 300000000 }}",
        "{{ 'a'.center(10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'.zfill(10**9) }}",
        "{{ ('\t' * 1000).expandtabs(10**8) }}",
        "{{ 'aaa'.translate({97: 'x' * 10000000}) }}",
        "{{ ('a' * 9000000).replace('a', 'b' * 9000) }}",
        "{{ ('a' * 9000000).replace('', 'b' * 9000) }}",
        "{{ 'x'.join(['a' * 100000] * 1000000) }}",
        "{{ ('a ' * 7000000).split() }}",
        "{{ ('a ' * 7000000).rsplit(' ') }}",
        "{{ ('a\n' * 7000000).splitlines() }}",
        _DOUBLING.replace("BODY", "{% set ns.x = ns.x + ns.x %}"),
        _DOUBLING.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"),
        _DOUBLING.replace("BODY", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
        _DOUBLING.replace("BODY", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
        _DOUBLING.replace("BODY", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
        _DOUBLING.replace("BODY", "{% set ns.x = ns.x.join(['', '', '']) %}"),
        "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}"
        + _DOUBLING.replace("BODY", "{% set ns.x = d(ns.x) %}"),
        "{% for a in range(100000) %}" + "static text " * 100 + "{% endfor %}",
        (
            "{% set ns = namespace(l=[], s='x' * 10000000) %}{% for i in range(100000) %}"
            "{% set ns.l = [ns.l, ns.s[1:]] %}{% endfor %}"
        ),
        "{% set s = 'x' * 10000000 %}" + "{{ s == s[1:] }}" * 5000,
    ],
    "formats": [
        "{{ '%999999999d' % 1 }}",
        "{{ '%.999999999f' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%(a)999999999s' % {'a': 1} }}",
        "{{ ('%999999999d' | safe) % 1 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '%*d' | format(999999999, 1) }}",
        "{{ '%999999999d' is odd }}",
        "{{ '%*s' is divisibleby((999999999, 1)) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:.999999999f}'.format(1.0) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ '{0:>{w}}'.format(1, w=999999999) }}",
        "{{ '{a:999999999}'.format_map({'a': 1}) }}",
        "{{ ('{:999999999}' | safe).format(1) }}",
        "{{ strftime_now('%999999999Y') }}",
        "{{ strftime_now('%Y' * 100000) }}",
    ],
    "numbers": [
        "{{ 10 ** (10 ** 9) }}",
        "{{ (1).to_bytes(10 ** 9, 'big') }}",
        "{{ 5 | round(-1000000000) }}",
        "{{ 5 | round(1000000000, 'ceil') }}",
        "{{ 'a' | round(300, 'ceil') }}",
        (
            "{% set ns = namespace(x=3) %}{% for i in range(100) %}"
            "{% set ns.x = ns.x * ns.x %}{% endfor %}"
        ),
        (
            "{% set ns = namespace(x=3) %}{% for i in range(99999) %}"
            "{% set ns.x = ns.x + ns.x %}{% endfor %}"
        ),
    ],
    "lists": [
        "{{ [0] * 1000000000 }}",
        "{{ (0,) * 1000000000 }}",
        "{% for m in messages * 100000000 %}{% endfor %}",
        "{{ {}.fromkeys(range(100000), 1) }}",
        (
            "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
            "{% set ns.x = ns.x + ns.x %}{% endfor %}"
        ),
        "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}"
        "{% set ns.l = [ns.l, " + "1, " * 100 + "] %}{% endfor %}",
    ],
    "filters": [
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a\nb' | indent(10 ** 9) }}",
        "{{ 'a\nb' | indent('x' * 9000000, first=true) }}",
        "{{ ('a\n' * 1000000) | indent(1000) }}",
        "{% filter indent(10 ** 9) %}a\nb{% endfilter %}",
        "{{ 'a' | wordwrap(1, wrapstring='x' * 9000000) }}",
        "{{ (['a'] * 1000000) | join('b' * 1000) }}",
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{{ [[[1]]] | tojson(indent='x' * 9000000) }}",
        "{{ ([1] * 100000) | tojson(separators=('x' * 10000, ':')) }}",
        "{{ range(10) | batch(10 ** 9, 0) | list }}",
        "{{ range(10) | slice(10 ** 9) | list }}",
        "{{ ('a' * 9000000) | replace('a', 'b' * 9000) }}",
        "{{ ('a' * 9000000) | title }}",
        "{{ ('a' * 9000000) | wordcount }}",
        "{{ ('f' * 9000000) | int(0, 16) }}",
        "{{ ('a' * 9000000) | list }}",
        "{{ ([[1]] * 100000) | sum(start=[]) }}",
        "{{ range(100000) | map('string') | map('center', 10000) | join }}",
        "{{ lipsum(n=1000000) }}",
    ],
    "lists of lists": [
        _LISTS + what
        for what in (
            "{{ ns.a }}",
            "{{ ns.a ~ '' }}",
            "{{ ns.a == ns.b }}",
            "{{ ns.a in [ns.b] }}",
            "{% if ns.a < ns.b %}{% endif %}",
            "{{ '%s' % ns.a }}",
            "{{ '%s' % [ns.a] }}",
            "{{ '{}'.format(ns.a) }}",
            "{{ '{!r}'.format(ns.a) }}",
            "{{ 'x'.startswith(ns.a) }}",
            "{{ [ns.a].index(ns.b) }}",
            "{{ messages[ns.a].x }}",
            "{{ messages | attr(ns.a) }}",
            "{{ ns.a | tojson }}",
            "{{ ns.a | tojson(indent=1) }}",
            "{{ ns.a | string }}",
            "{{ ns.a | upper }}",
            "{{ ns.a | replace('1', '2') }}",
            "{{ [ns.a] | join }}",
            "{{ [ns.a, ns.b] | sort }}",
            "{{ [ns.a, ns.b] | max }}",
            "{{ [ns.a] | select('eq', ns.b) | list }}",
            "{{ [{'k': ns.a}, {'k': ns.b}] | groupby('k') }}",
            "{{ ns.a is eq(ns.b) }}",
            "{{ ns.a is lower }}",
            "{{ {'x': ns.a}.values() }}",
            "{{ raise_exception(ns.a) }}",
            "{% for i in [1, 2] %}{{ loop.changed(ns.a) }}{{ loop.cycle(ns.a, 1) }}{% endfor %}",
        )
    ],
    "tuples of tuples": [
        _TUPLES + what
        for what in (
            "{{ {ns.a: 1} }}",
            "{{ {}[ns.a] }}",
            "{{ {}.get(ns.a) }}",
            "{{ ns.a in {} }}",
            "{{ ns.a is filter }}",
            "{{ [1] | map(ns.a) | list }}",
            "{{ [ns.a] | unique | list }}",
            "{{ dict([[ns.a, 1]]) }}",
        )
    ],
    "sources": [
        "{{ ((( " * 20_000,
        "{% if 1 %}" * 2_000,
        "{{ 1" + "+1" * 50_000 + " }}",
        "{{ x" + ".a" * 30_000 + " }}",
        "{{ " + "9" * 10_000 + " }}",
        "x" * 200_000,
    ],
}

_RUN = """
import resource, sys
from erllama_core.errors import TemplateError
from erllama_core.model.chat_template import compile_template, render_template
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
for source in {sources!r}:
    try:
        text = render_template(compile_template(source), {{"messages": {chat!r}}})
    except TemplateError as error:
        print("refused", str(error)[:100].replace(chr(10), " "))
    else:
        print("rendered", len(text))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
print("grown", peak - used)
"""


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_is_refused(kind: str) -> None:
    """Each template of a kind ends with a TemplateError, and all of them together have taken no
    more memory than an honest program has, nor for ever.
    """
    sources = ATTACKS[kind]
    run = _RUN.format(sources=sources, chat=CHAT)
    done = subprocess.run(
        [sys.executable, "-"], input=run, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *results, grown = done.stdout.splitlines()
    for source, result in zip(sources, results, strict=True):
        assert result.startswith("refused the chat template"), (source, result)
        assert "MemoryError" not in result, (source, result)
    assert int(grown.split()[1]) < 256 << 20


def test_what_holds_itself_is_harmless() -> None:
    """Namespaces that hold one another are not written out."""
    text = render_template(
        compile_template(
            "{% set ns = namespace() %}{% set ns.me = ns %}"
            "{% for i in range(60) %}{% set ns.a = namespace(a=ns.a, b=ns.a) %}{% endfor %}"
            "{{ ns }}{{ [ns.a] }}"
        ),
        {},
    )
    assert text == "<Namespace>[<Namespace>]"


def test_the_message_says_what_was_too_much() -> None:
    """A template that was stopped is told which of its bounds it met, a refusal in its words."""
    expected = {
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}": "steps",
        "{{ 'a' * 300000000 }}": "builds more than",
        "{{ 2 ** 100000 }}": "integer",
        "{{ '%99999d' % 1 }}": "field",
        "{{ (1).to_bytes(9, 'big') }}": "int.to_bytes cannot be called",
        "{{ raise_exception('x' * 5000) }}": "refused the messages: x{2000}$",
    }
    for source, message in expected.items():
        with pytest.raises(TemplateError, match=message):
            render_template(compile_template(source), {"messages": CHAT})


def test_a_template_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are few and slow are bounded by the thread's own time."""
    monkeypatch.setattr(template_budget, "MAX_SECONDS", 0.0)
    slow = compile_template("{% for i in range(1000) %}{{ i }}{% endfor %}")
    with pytest.raises(TemplateError, match="longer than 0 s"):
        render_template(slow, {})


def test_long_chats_may_build_more() -> None:
    """What is allowed grows with what is given: a chat of 8 MB, said twice, is no attack."""
    chat = [{"role": "user", "content": "word " * 1600}] * 1000
    source = (
        "{% set ns = namespace(said=0) %}{% for m in messages %}{% set ns.said = ns.said + 1 %}"
        "{{ m.content }}{{ m.content | trim }}{{ m.content.strip() + '.' }}{% endfor %}"
    )
    text = render_template(compile_template(source), {"messages": chat})
    assert len(text) == 1000 * (3 * 8000 - 2 + 1)


def test_templates_on_many_threads() -> None:
    """Honest templates and attacks at the same time: each has its own bounds."""
    honest = compile_template("{% for m in messages %}{{ m.content ~ '!' }}{% endfor %}")
    attack = compile_template(
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    )
    barrier = threading.Barrier(8, timeout=60)

    def render(number: int) -> str:
        barrier.wait()
        if number % 4 == 0:
            with pytest.raises(TemplateError, match="steps"):
                render_template(attack, {})
            return ""
        chat = [{"role": "user", "content": str(number)}] * 100
        return "".join(render_template(honest, {"messages": chat}) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(render, range(8)))
    assert results == ["" if n % 4 == 0 else f"{n}!" * 2000 for n in range(8)]


# ---------------------------------------------------------------- random programs

_ATOMS = st.sampled_from(
    [
        *("x", "y", "messages", "messages[0].content", "'ab'", "'%5d %s'", "'{:>9}{}'", "[x, y]"),
        *("(x, y)", "{'k': x, y: 1}", "3", "100", "100000", "2.5", "none", "range(1000)", "ns.v"),
    ]
)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        st.builds("({0[0]} {1} {0[1]})".format, pair, st.sampled_from([*"+-*/%~", "//", "**"])),
        st.builds(
            "({0[0]} {1} {0[1]})".format, pair, st.sampled_from(["==", "<", "in", "not in", "or"])
        ),
        st.builds(
            "({0} | {1})".format,
            inner,
            st.sampled_from(
                [
                    *("list", "string", "tojson", "tojson(indent=2)", "upper", "title", "length"),
                    *("sort", "unique | list", "reverse | list", "join", "join('--')", "sum"),
                    *("map('string') | list", "batch(3) | list", "slice(3) | list", "indent(50)"),
                    *("center(1000)", "format(x, y)", "replace('a', 'bcd')", "first", "last"),
                    *("int", "float", "round(3)", "escape", "trim", "dictsort", "min", "max"),
                    *("groupby(0)", "truncate(9)", "wordcount", "abs", "items | list", "attr('x')"),
                ]
            ),
        ),
        st.builds("({0[0]} | join({0[1]}))".format, pair),
        st.builds("({0[0]} | replace('a', {0[1]}))".format, pair),
        st.builds(
            "{0}.{1}".format,
            inner,
            st.sampled_from(
                [
                    *("split()", "split('a')", "strip()", "center(1000)", "upper()", "items()"),
                    *("format(x, y)", "join(y)", "join(x)", "replace('a', x)", "splitlines()"),
                    *("get('k')", "values()", "count('a')", "index(x)", "zfill(500)", "copy()"),
                ]
            ),
        ),
        st.builds("{0[0]}[{0[1]}]".format, pair),
        st.builds("{0}[1:]".format, inner),
    )


_EXPRESSIONS = st.recursive(_ATOMS, _larger, max_leaves=8)


def _bodies(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds(lambda e: "{% set ns.v = " + e + " %}", _EXPRESSIONS),
        st.builds(
            lambda e: "{% set ns.w = [ns.v, " + e + "] %}{% set ns.v = ns.w %}", _EXPRESSIONS
        ),
        st.builds(lambda b: "{% for x in range(300) %}" + b + "{% endfor %}", inner),
        st.builds(
            lambda e, b: "{% for x in " + e + " %}" + b + "{% endfor %}", _EXPRESSIONS, inner
        ),
        st.builds(lambda b: "{% set y %}" + b + "{% endset %}", inner),
        st.builds(lambda a, b: a + b, inner, inner),
    )


_PROGRAMS = st.recursive(
    st.builds(lambda e: "{{ " + e + " }}", _EXPRESSIONS), _bodies, max_leaves=8
)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """As much address space as there is now, and 2 GiB."""
    if sys.platform == "darwin":
        pytest.skip("macOS does not hold a process to a limit of its address space")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _holds(program: str) -> None:
    variables: dict[str, Any] = {"messages": CHAT * 3, "x": "a b", "y": ["a", "b"]}
    source = "{% set ns = namespace(v='v', w=1) %}" + program
    try:
        result = render_template(compile_template(source), variables)
    except TemplateError as error:
        result = str(error)
    assert "MemoryError" not in result
    assert len(result) < 1 << 28


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(_PROGRAMS)
def test_any_program_ends(little_memory: None, program: str) -> None:
    """Whatever a template does, it gives a text or a TemplateError, within its bounds."""
    _holds(program)


@pytest.mark.fuzz
@settings(
    max_examples=20_000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(_PROGRAMS)
def test_any_program_ends_long(little_memory: None, program: str) -> None:
    """The same, for longer."""
    _holds(program)
