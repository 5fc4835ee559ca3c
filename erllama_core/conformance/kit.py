"""What every class of the kit shares: no silent override, and no leak."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_JOIN_S: Final = 5.0
"""How long a thread that was told to end may take."""


class ConformanceKit:
    """Base of the kit's classes.

    A test that a plugin cannot pass may be overridden by one that is marked
    ``@pytest.mark.xfail(reason=...)``, so that the promise that is not kept stays in sight; any
    other override, and a test set to None, is a TypeError when the class is made.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.__module__.startswith("erllama_core."):
            return
        for name, value in vars(cls).items():
            if name.startswith("test_") and _is_of_the_kit(cls, name) and not _is_xfail(value):
                raise TypeError(
                    f"{cls.__qualname__}.{name} replaces a test of the conformance kit; mark it "
                    "with @pytest.mark.xfail(reason=...), or give it a name of its own"
                )

    @pytest.fixture(autouse=True)
    def _nothing_is_leaked(self) -> Iterator[None]:
        with no_leaks():
            yield


def random_walks(walk: Callable[[st.DataObject], None]) -> Callable[[], None]:
    """Run ``walk`` with drawn data, some dozens of times.

    For a function inside a test: Hypothesis holds a method that two classes inherit for one
    test with two meanings.
    """
    run: Callable[[], None] = settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )(given(st.data())(walk))
    return run


@contextmanager
def no_leaks() -> Iterator[None]:
    """Fail when what is done inside leaves threads or file descriptors behind.

    Threads that are ending are waited for. On systems without ``/dev/fd`` or ``/proc/self/fd``
    descriptors are not counted.
    """
    threads = set(threading.enumerate())
    descriptors = open_descriptors()
    yield
    left = [thread for thread in threading.enumerate() if thread not in threads]
    for thread in left:
        thread.join(_JOIN_S)
    alive = [thread.name for thread in left if thread.is_alive()]
    assert not alive, f"threads are left running: {', '.join(alive)}"
    more = open_descriptors() - descriptors
    if more:
        # What is only waiting to be collected is no leak. Collecting takes a tenth of a second
        # once a suite is in memory, so that it is not done after every test.
        gc.collect()
        more = open_descriptors() - descriptors
    assert not more, f"file descriptors are left open: {sorted(more)}"


def open_descriptors() -> frozenset[tuple[int, str]]:
    """The open file descriptors of this process, each with what it leads to where that is told."""
    folder = next((p for p in map(Path, ("/proc/self/fd", "/dev/fd")) if p.is_dir()), None)
    found = set()
    for entry in () if folder is None else list(folder.iterdir()):
        try:
            leads_to = str(entry.readlink()) if entry.is_symlink() else ""
        except OSError:
            continue  # the one that listed the folder
        found.add((int(entry.name), leads_to))
    return frozenset(found)


def _is_of_the_kit(cls: type, name: str) -> bool:
    return any(
        name in vars(base)
        for base in cls.__mro__[1:]
        if base.__module__.startswith("erllama_core.conformance")
    )


def _is_xfail(value: object) -> bool:
    marks = getattr(value, "pytestmark", ())
    return any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)
