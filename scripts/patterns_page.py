# ruff: noqa: INP001 - a script, run by make
"""Write docs/patterns.md from the examples, whose output the tests have seen.

python scripts/patterns_page.py            # write it
python scripts/patterns_page.py --check    # exit code 1 when it is not up to date
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "patterns"
PAGE = ROOT / "docs" / "patterns.md"

HEAD = """# Patterns

What erllama is used for, each as a small program that runs as it stands. They are the files of
[`examples/patterns`](../examples/patterns); the tests run all of them and compare what they print.
Those that need no model use the stub backend: with `model_path` instead of `backend="stub"` they
are the same programs.

<!-- made by scripts/patterns_page.py: change the examples, not this page -->
"""


def section(path: Path) -> str:
    """A pattern's title, text, program and output."""
    source = path.read_text("utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    title, _, text = docstring.partition("\n\n")
    code = source.split('"""', 2)[2].strip()
    number = int(path.name.split("_")[0])
    output = path.with_suffix(".out").read_text("utf-8").rstrip()
    reason = f"tests/test_examples.py runs {path.name}"
    return (
        f"\n## {number}. {title}\n\n{text}\n\n"
        f'```python norun="{reason}"\n{code}\n```\n\n'
        f"```text\n{output}\n```\n"
    )


def page() -> str:
    """The whole page."""
    return HEAD + "".join(map(section, sorted(EXAMPLES.glob("[0-9]*.py"))))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text("utf-8") != page())
    PAGE.write_text(page(), "utf-8")
