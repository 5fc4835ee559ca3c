# ruff: noqa: INP001 - hooks of mkdocs, loaded by their path
"""Pages of the site that live outside ``docs``, and links between all of them.

Links in this repository are paths of files, so that they work where it is read. Here they become
links between pages; one to a file that is no page loses its link and keeps its words.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent
ELSEWHERE: Final = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/README.md": "bench.md",
    "examples/README.md": "examples.md",
    "docs/template_plugin/README.md": "template_plugin.md",
    **{
        path.relative_to(ROOT).as_posix(): f"plugins/{path.parent.name}.md"
        for path in sorted(ROOT.glob("plugins/*/README.md"))
    },
}
"""Pages by their path in the repository."""

_LINK: Final = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE: Final = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^ *\2 *$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that live elsewhere."""
    for path, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    """Links as they are in the site; fences without the words that are for the tests."""
    del config
    here = next((path for path, uri in ELSEWHERE.items() if uri == page.file.src_uri), None)
    folder = Path(here or f"docs/{page.file.src_uri}").parent

    def link(found: re.Match[str]) -> str:
        words, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return found[0]
        in_repository = os.path.normpath(folder / path)
        uri = ELSEWHERE.get(in_repository, in_repository.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return str(words)
        relative = os.path.relpath(uri, Path(page.file.src_uri).parent)
        return f"[{words}]({relative}{'#' + anchor if anchor else ''})"

    parts: list[str] = []
    at = 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(link, markdown[at : fence.start()])]
        indent, ticks, language, code = fence.groups()
        parts += [f"{indent}{ticks}{language}\n{code}{indent}{ticks}"]
        at = fence.end()
    return "".join([*parts, _LINK.sub(link, markdown[at:])])
