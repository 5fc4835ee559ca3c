"""Jinja's sandbox, with a budget for each rendering.

Jinja's own keeps a template from Python's insides, and from changing what it is given. Here it is
kept from using up time and memory too. Operators, calls, filters and tests are intercepted where
Jinja lets them be. The rest is done to the syntax tree before it is compiled, with Jinja's own
nodes: bodies that may be run again and again begin with a filter that counts, and what joins,
cuts, compares or hashes values goes through one that pays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2 import nodes

from erllama_core.model import template_calls as calls
from erllama_core.model import template_filters as filters
from erllama_core.model.template_budget import Budget

_STEP: Final = " step"
"""No template can spell a name with a space in it."""
_JOIN: Final = " join all"
_CUT: Final = " cut"
_COMPARED: Final = " compared"
_HASHED: Final = " hashed"
_REFERENCE: Final = 64


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model wrote, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Context(jinja2.runtime.Context):
    """A rendering's variables, and its budget."""

    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> jinja2.runtime.Context:  # noqa: A002
        new = super().derived(locals)
        assert isinstance(new, _Context)
        new.budget = self.budget
        return new


class _Namespace(jinja2.utils.Namespace):
    """Not written out, as Jinja's is: namespaces may hold one another, and themselves."""

    def __repr__(self) -> str:
        return "<Namespace>"


# ------------------------------------------------------- what the tree goes through


@jinja2.pass_context
def _step(context: _Context, characters: int) -> None:
    context.budget.step(characters)


@jinja2.pass_context
def _join_all(context: _Context, values: tuple[Any, ...]) -> str:
    """``~``."""
    budget = context.budget
    budget.step()
    for value in values:
        budget.pay_for(value)
    if context.eval_ctx.autoescape:
        return jinja2.runtime.markup_join(values)
    return "".join(map(str, values))


@jinja2.pass_context
def _cut(context: _Context, value: Any) -> Any:
    """A slice, which is a copy."""
    context.budget.step()
    context.budget.pay_for_items(value, 1 if isinstance(value, str) else _REFERENCE)
    return value


@jinja2.pass_context
def _compared(context: _Context, value: Any) -> Any:
    context.budget.pay_to_search(value)
    return value


@jinja2.pass_context
def _hashed(context: _Context, value: Any) -> Any:
    if type(value) is not str:
        context.budget.pay_for(value)
    return value


@jinja2.pass_context
def _finalize(context: _Context, value: Any) -> Any:
    """Whatever the template puts out."""
    context.budget.pay_for(value)
    return value


class _Metering(jinja2.visitor.NodeTransformer):
    """Puts the filters above into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name for it
        return self._metered(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._metered(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._metered(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:  # noqa: N802
        return self._metered(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(_JOIN, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(_CUT, node)
        node.arg = _unless_constant(_HASHED, node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _unless_constant(_HASHED, node.key)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        searches = any(operand.op in {"in", "notin"} for operand in node.ops)
        # Being equal to a constant takes as long as the constant; being in it, too.
        if len(sides) > 2 or not any(map(_is_constant, sides)):
            node.expr = _filtered(_COMPARED, node.expr)
            searches = True
        if searches:
            for operand in node.ops:
                operand.expr = _unless_constant(_COMPARED, operand.expr)
        return node

    def _metered(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        price = _price(node)
        step = _filtered(_STEP, nodes.Const(price, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _unless_constant(name: str, node: nodes.Expr) -> nodes.Expr:
    return node if _is_constant(node) else _filtered(name, node)


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Const)


def _price(node: nodes.Node) -> int:
    """Characters of what is built by running a body once, but for what depends on values."""
    text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    groups = node.find_all((nodes.List, nodes.Tuple, nodes.Dict))
    items = sum(1 + sum(1 for _ in group.iter_child_nodes()) for group in groups)
    return text + _REFERENCE * items


# ------------------------------------------------------------------- the environment


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """For chat templates. Thread-safe, as are the templates that it makes."""

    intercepted_binops = frozenset(calls.OPERATORS)
    context_class = _Context

    def __init__(self, extra_globals: Mapping[str, Any]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
            finalize=_finalize,
            optimized=False,  # that is, no operation is done before there is a budget
        )
        self._guard_filters()
        plain: dict[str, Any] = dict(self.tests)
        self.tests = {f" {name}": function for name, function in plain.items()}
        for name, test in plain.items():
            self.tests[name] = filters.guarded_test(name, test)
        self.globals = {
            "range": self.globals["range"],
            "dict": filters.new_dict,
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "namespace": _Namespace,
            **extra_globals,
        }

    def _guard_filters(self) -> None:
        plain = self.filters
        self.filters = {
            _STEP: _step,
            _JOIN: _join_all,
            _CUT: _cut,
            _COMPARED: _compared,
            _HASHED: _hashed,
            "join": filters.join,
            "tojson": filters.tojson,
        }
        for name, function in plain.items():
            guarded = filters.guarded_filter(name)
            if guarded is not None:
                self.filters[name] = guarded
                self.filters[f" {name}"] = function
        for name in ("join", "map"):
            self.filters[f" {name}"] = plain[name]

    def compile_metered(self, source: str) -> jinja2.Template:
        """A template that counts and pays. Raises TemplateSyntaxError."""
        tree = _Metering().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        assert isinstance(context, _Context)
        context.budget.step()
        calls.OPERATORS[operator](context.budget, left, right)
        return self.binop_table[operator](left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if (
            isinstance(value, MethodType | BuiltinMethodType)
            and value.__name__ in {"format", "format_map"}
            and isinstance(value.__self__, str)
        ):
            return calls.TextFormat(value.__self__, is_map=value.__name__ == "format_map")
        return None

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(context, _Context)
        go_on = functools.partial(super().call, context)
        return calls.call_guarded(self, context.budget, obj, args, kwargs, go_on)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The template's text. Raises whatever the template does, TooMuch among it."""
    context = template.new_context(dict(variables))
    assert isinstance(context, _Context)
    context.budget = Budget(variables)
    pieces: Iterator[str] = template.root_render_func(context)
    return "".join(pieces)
