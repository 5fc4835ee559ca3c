"""What is fuzzed: a reader of foreign bytes, behind a function that takes bytes.

A target's function returns when the reader accepted the bytes, and when it refused them with an
error that it documents. Whatever else it raises is a finding.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import attrs

Run = Callable[[bytes], None]

CORPUS: Final = Path(__file__).resolve().parent / "corpus"
MOST_BYTES: Final = 1 << 16
"""Of one input. What needs more to show itself has a test of its own."""

_MODULES: Final = (
    "targets_format",
    "targets_store",
    "targets_config",
    "targets_chat",
    "targets_grammar",
    "targets_model",
    "targets_state",
    "targets_redis",
    "targets_requests",
    "targets_cli",
)


@attrs.frozen(kw_only=True)
class Target:
    """One reader."""

    name: str
    open: Callable[[], AbstractContextManager[Run]]
    """Sets up what the reader needs, once for many inputs."""
    made: Callable[[], dict[str, bytes]] = dict
    """Seeds that are not kept but made, as they depend on more than the reader."""
    words: tuple[bytes, ...] = ()
    """What its inputs are made of, for mutations to put in."""
    is_json: bool = False
    """Whether its inputs are JSON, to be changed as such more often than not."""
    seconds: float = 2.0
    """Of the process's time that an input may take, at most."""
    base_bytes: int = 8 << 20
    """Of Python's memory that an input may take, whatever its size."""
    factor: int = 400
    """Bytes more for each byte of the input."""
    native: bool = False
    """Whether the reader is native code, which can end the process."""
    quick_runs: int = 200
    """Mutations in the ordinary test suite."""
    needs: tuple[str, ...] = ()
    """Modules without which there is no such reader here."""

    @property
    def missing(self) -> str | None:
        """The first of its modules that is not installed."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)

    def seeds(self) -> dict[str, bytes]:
        """Its good inputs, and those that once brought something to light, by name."""
        kept = sorted((CORPUS / self.name).glob("*"))
        return {**self.made(), **{path.name: path.read_bytes() for path in kept}}


def all_targets() -> dict[str, Target]:
    """Every target, by name."""
    found: dict[str, Target] = {}
    tests = str(Path(__file__).resolve().parent.parent / "tests")
    if tests not in sys.path:  # helpers that they share
        sys.path.append(tests)
    for module in _MODULES:
        for target in importlib.import_module(module).TARGETS:
            assert target.name not in found
            found[target.name] = target
    return found
