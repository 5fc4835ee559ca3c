"""The documentation: every block of code in it works, and nothing is left out of it.

CONTRIBUTING.md tells those who write documentation what the marks on a block mean.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import attrs
import click
import pytest

from erllama_core import errors, hookspecs
from erllama_core.cache.policy import SavePolicy
from erllama_core.cli.app import app
from erllama_core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    EngineSettings,
    LoggingConfig,
    ModelConfig,
    PluginsConfig,
    PressureConfig,
    ThinkingMarkers,
    TierConfig,
    ToolCallMarkers,
    load_config,
    structure_options,
)
from erllama_core.host import PluginHost
from erllama_core.interfaces.backend import ContextOptions
from erllama_core.model.options import RequestKwargs, RequestOptions

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")
    for path in (
        *ROOT.glob(pattern),
        *ROOT.glob(f"plugins/*/{pattern}"),
        *ROOT.glob(f"bench/{pattern}"),
        *ROOT.glob(f"examples/{pattern}"),
    )
)
SECTIONS = {field.name for field in attrs.fields(EngineConfig)}

OUTPUT = {"text"}  # what a program shows, or a drawing: nothing to run
SHELL = {"sh", "console", "make"}


@attrs.frozen
class Block:
    """A fenced block and the words behind its fence."""

    page: Path
    line: int
    language: str
    marks: frozenset[str]
    norun: str | None
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = iter(enumerate(page.read_text("utf-8").splitlines(), 1))
    for number, line in lines:
        fence = re.match(r"( *)(`{3,})(.*)", line)
        if fence is None:
            continue
        indent, ticks, info = fence.groups()
        code = []
        for _, inner in lines:
            if inner.strip() == ticks:
                break
            code.append(inner.removeprefix(indent))
        else:
            raise AssertionError(f"{page}:{number}: the block is never closed")
        language, *words = shlex.split(info) or [""]
        reasons = [word.removeprefix("norun=") for word in words if word.startswith("norun=")]
        yield Block(
            page=page,
            line=number,
            language=language,
            marks=frozenset(word for word in words if not word.startswith("norun=")),
            norun=reasons[0] if reasons else None,
            code="\n".join(code) + "\n",
        )


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def pages_with(mark: Callable[[Block], bool]) -> list[Path]:
    return sorted({b.page for b in BLOCKS if b.language == "python" and not b.norun and mark(b)})


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -------------------------------------------------------------------- running


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    """A block has a language that a test runs or reads, or a reason for not being run."""
    assert block.language, f"{block}: a block needs a language"
    assert block.norun != "", f"{block}: norun needs a reason"
    assert block.marks <= {"real_model"}, f"{block}: unknown mark {sorted(block.marks)}"
    if block.language in SHELL:
        assert block.norun, f'{block}: commands are not run; say why: norun="..."'
    else:
        assert block.language in OUTPUT | {"python", "toml", "json"}, f"{block}: {block.language}"


def run_python(page: Path, folder: Path, marks: frozenset[str]) -> None:
    """Run the page's blocks with these marks or none, in order, as one module in ``folder``."""
    module = ModuleType("page")
    with pytest.MonkeyPatch.context() as patch:
        # Annotations given as text are looked up in the module that sys.modules has.
        patch.setitem(sys.modules, module.__name__, module)
        patch.chdir(folder)
        _run_in(vars(module), page, marks)


def _run_in(namespace: dict[str, Any], page: Path, marks: frozenset[str]) -> None:
    for block in blocks_of(page):
        if block.language == "python" and not block.norun and block.marks <= marks:
            # Line numbers of the page, so that a traceback leads there.
            code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, namespace)


@pytest.mark.parametrize("page", pages_with(lambda block: not block.marks), ids=page_name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """The Python of a page runs from top to bottom in an empty folder."""
    run_python(page, tmp_path, frozenset())


@pytest.mark.real_model
@pytest.mark.parametrize(
    "page", pages_with(lambda block: "real_model" in block.marks), ids=page_name
)
def test_python_blocks_run_with_a_model(page: Path, tmp_path: Path, demo_model_path: Path) -> None:
    """All Python of a page runs in a folder where ``model.gguf`` is a small model."""
    (tmp_path / "model.gguf").symlink_to(demo_model_path)
    run_python(page, tmp_path, frozenset({"real_model"}))


def test_python_that_is_not_run_is_python() -> None:
    """A Python block that is not run is at least free of syntax errors."""
    for block in BLOCKS:
        if block.language == "python" and block.norun:
            compile(block.code, str(block), "exec", dont_inherit=True)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=str)
def test_toml_blocks_are_read(block: Block) -> None:
    """TOML is TOML, and a configuration is one that erllama accepts."""
    table = tomllib.loads(block.code)
    if table.keys() & SECTIONS:
        load_config(table, environ={})


def test_json_blocks_are_read() -> None:
    """JSON is JSON."""
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.code)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    """A link to a file of this repository names one that exists."""
    prose = re.sub(
        r"^( *)(`{3,}).*?^ *\2", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page_name(page)}: {target}"


def test_the_index_lists_every_page() -> None:
    """docs/index.md links to every other page beside it."""
    index = (ROOT / "docs/index.md").read_text("utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {name for name in pages if f"({name})" in index} == pages


# --------------------------------------------------------------- completeness


def sections(page: str) -> Mapping[str, str]:
    """The text below each heading, by the heading's words without backquotes."""
    parts = re.split(r"^#+ (.+)$", (ROOT / "docs" / page).read_text("utf-8"), flags=re.MULTILINE)
    names = [name.replace("`", "") for name in parts[1::2]]
    assert len(set(names)) == len(names), f"{page} has a heading twice"
    return dict(zip(names, parts[2::2], strict=True))


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the tables in ``text``, by the backquoted name in their first cell."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        name = re.fullmatch(r"`(\w+)`", cells[0]) if cells else None
        if name is not None:
            assert name[1] not in found, f"{name[1]} has two rows"
            found[name[1]] = cells
    return found


TABLES: dict[str, tuple[type[Any], set[str]]] = {
    "[engine]": (EngineSettings, set()),
    "[plugins]": (PluginsConfig, set()),
    "[cache]": (CacheConfig, set()),
    "[[tiers]]": (TierConfig, {"options"}),  # the keys beside these two
    "[models.<id>]": (ModelConfig, set()),
    "context_opts": (ContextOptions, set()),
    "policy": (SavePolicy, {field.name for field in attrs.fields(SavePolicy)}),  # as [cache]
    "thinking_markers": (ThinkingMarkers, set()),
    "tool_call_markers": (ToolCallMarkers, set()),
    "adapters": (AdapterConfig, set()),
    "[pressure]": (PressureConfig, {"source_options"}),  # the tables below this one
    "[logging]": (LoggingConfig, set()),
}


def test_every_table_of_the_configuration_is_known_here() -> None:
    """A new section of the configuration, or a new table in a model's, is noticed."""
    documented = {heading.strip("[]").partition(".")[0] for heading in TABLES}
    nested = {
        field.name
        for field in attrs.fields(ModelConfig)
        if field.name in {"context_opts", "policy", "adapters"} or field.name.endswith("_markers")
    }
    assert documented == SECTIONS | nested


@pytest.mark.parametrize("heading", TABLES)
def test_every_configuration_key_is_documented(heading: str) -> None:
    """Each table of docs/configuration.md has the keys of its class, with their defaults."""
    class_, left_out = TABLES[heading]
    documented = rows(sections("configuration.md")[heading])
    fields = {field.name: field for field in attrs.fields(class_) if field.name not in left_out}
    assert list(documented) == list(fields)
    required = {name: "x" for name, field in fields.items() if field.default is attrs.NOTHING}
    for name, (_, shown, _) in documented.items():
        if name in required:
            assert shown == "required", name
        elif shown == "none":
            assert fields[name].default is None, name
        else:
            value = tomllib.loads(f"value = {shown.strip('`')}")["value"]
            given = structure_options(class_, {**required, name: value}, heading)
            default = structure_options(class_, required, heading)
            assert getattr(given, name) == getattr(default, name), name


def test_every_error_is_documented() -> None:
    """docs/errors.md has a row for each class, with the builtin that it also is."""
    documented = rows((ROOT / "docs/errors.md").read_text("utf-8"))
    classes = {
        name: class_
        for name, class_ in inspect.getmembers(errors, inspect.isclass)
        if issubclass(class_, errors.ErllamaError)
    }
    assert set(documented) == set(classes)
    assert set(re.findall(r"\w+", errors.__doc__ or "")) >= set(classes), "the tree has all of them"
    numbers = {"three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
    for at, (name, (_, _, words)) in enumerate(documented.items()):
        if below := re.match(r"The root of the next (\w+)", words):
            n = numbers[below[1]]
            assert [c for c in documented if issubclass(classes[c], classes[name])] == [
                *documented
            ][at : at + 1 + n], name
    for name, (_, also, _) in documented.items():
        mixed_in = [b.__name__ for b in classes[name].__bases__ if hasattr(builtins, b.__name__)]
        shown = re.findall(r"`(\w+)`", also)
        assert shown == [base for base in mixed_in if base != "Exception"], name


def test_every_hook_is_documented() -> None:
    """docs/hooks.md has a heading for each hook, its signature, and says when, on which thread,
    whether it may block, and what becomes of errors.
    """
    specified = {
        f"{name}{inspect.signature(value)}".replace("'", "")
        for name, value in vars(hookspecs).items()
        if hasattr(value, f"{hookspecs.PROJECT}_spec")
    }
    documented = {
        heading: text
        for heading, text in sections("hooks.md").items()
        if heading.startswith("erllama_")
    }
    assert set(documented) == specified
    for heading, text in documented.items():
        for fact in ("When", "Thread", "May it block", "Errors"):
            assert f"- **{fact}**: " in text, f"{heading}: {fact}"


def test_every_request_option_is_documented() -> None:
    """docs/requests.md has a row for each option, with its default."""
    documented = rows((ROOT / "docs/requests.md").read_text("utf-8"))
    fields = attrs.fields_dict(RequestOptions)
    assert set(documented) == set(fields) == set(get_type_hints(RequestKwargs))
    for name, (_, shown, _) in documented.items():
        default = None if shown == "none" else ast.literal_eval(shown.strip("`"))
        assert fields[name].default == default, name


def command_line() -> Iterator[tuple[str, click.Command]]:
    yield "erllama", app
    context = click.Context(app)
    assert isinstance(app, click.Group)
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert command is not None
        yield f"erllama {name}", command


COMMANDS = dict(command_line())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    """docs/cli.md has a heading for each command, and a row for each of its options."""
    command = COMMANDS[name]
    documented = set(re.findall(r"^\| `(--?[\w-]+)", sections("cli.md")[name], flags=re.MULTILINE))
    options = {
        parameter.opts[0] for parameter in command.params if isinstance(parameter, click.Option)
    }
    assert documented - {"--help"} == options
    for argument in command.params:
        if isinstance(argument, click.Argument):
            assert (argument.name or "").upper() in sections("cli.md")[name]


def test_no_documented_command_is_gone() -> None:
    """Each heading of docs/cli.md that is a command is one."""
    headings = {heading for heading in sections("cli.md") if heading.startswith("erllama")}
    assert headings == COMMANDS.keys()


def test_every_option_of_a_plugin_is_in_its_readme() -> None:
    """Each key that a shipped provider's table takes is named in its distribution's README."""
    host = PluginHost()
    shipped = {f"erllama-{p.name.replace('_', '-')}": p for p in (ROOT / "plugins").iterdir()}
    seen = set()
    for row in host.listing():
        folder = shipped.get(row.distribution or "")
        if folder is None or row.kind is None or row.kind == "listener" or row.state != "ok":
            continue
        seen.add(folder.name)
        readme = (folder / "README.md").read_text("utf-8")
        for field in attrs.fields(host.get(row.kind, row.name).config):
            assert f"`{field.name}`" in readme, f"{folder.name}: {field.name}"
    assert seen >= {"backend_stub", "tier_disk"}
