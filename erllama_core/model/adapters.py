"""LoRA adapters of a model: which there are, how strongly each works, and changes to that.

State computed with other adapters is other state. So a change is a *barrier*: requests that
were let in end with the adapters that they began with, those that wait, and those that come,
are let in after it; between the two nothing that was computed before is left in the context.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from erllama_core.cache.budget import Hold
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import (
    AdapterLoadError,
    AdapterNotFound,
    AdapterTimeout,
    AlreadyLoaded,
    ErllamaError,
    ModelLoadError,
    NotSupported,
    unknown_name,
)
from erllama_core.interfaces.backend import Adapter, Adapts, BackendModel, Context
from erllama_core.interfaces.log import get_logger
from erllama_core.model.fingerprint import file_fingerprint, file_identity
from erllama_core.model.footprint import Footprint
from erllama_core.model.request import Request
from erllama_core.model.roster import Roster
from erllama_core.model.sequences import SequencePool
from erllama_core.model.watch import Abandoned, StepWatch
from erllama_core.results import AdapterInfo

log = get_logger("erllama.model")

_SCALE: Final = struct.Struct("<f")


@attrs.frozen
class LoadedAdapter:
    """An adapter whose weights are in memory."""

    info: AdapterInfo
    weights: Adapter
    _memory: Hold | None = None
    """What is set aside for the weights."""

    @property
    def effective_scale(self) -> float:
        """The scale as backends compute with it: a 32-bit float."""
        return as_scale(self.info.scale)

    def close(self) -> None:
        """Free the weights. Raises what the backend raises."""
        try:
            self.weights.close()
        finally:
            if self._memory is not None:
                self._memory.release()


Adapters = tuple[LoadedAdapter, ...]
"""In the order in which they were loaded."""


def as_scale(value: float) -> float:
    """The 32-bit float nearest to a scale. Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"scale={value!r}: a number is needed")
    try:
        scale: float = _SCALE.unpack(_SCALE.pack(value))[0]
    except OverflowError:
        scale = math.inf
    if not math.isfinite(scale):
        raise ValueError(f"scale={value!r}: a finite number is needed")
    return scale


def adapter_name(path: Path, name: str | None) -> str:
    """What an adapter is called: by default what its file is, without the suffix."""
    chosen = path.stem if name is None else name
    if not isinstance(chosen, str):
        raise TypeError(f"name={name!r}: a string is needed")
    if not chosen.strip():
        raise ValueError(f"name={name!r}: an adapter's name is empty")
    return chosen


def open_adapter(
    backend: BackendModel,
    backend_name: str,
    path: str | os.PathLike[str],
    *,
    name: str | None,
    scale: float,
    memory: Footprint | None,
) -> LoadedAdapter:
    """Read an adapter's file; nothing computes with it yet. On the caller's thread.

    As many bytes as the file has are set aside in ``memory`` first. Raises NotSupported,
    AdapterLoadError; TypeError and ValueError for a scale or a name.
    """
    as_scale(scale)
    file = Path(path).expanduser()
    name = adapter_name(file, name)
    if not isinstance(backend, Adapts):
        raise NotSupported(f"the backend {backend_name!r} has no adapters")
    hold: Hold | None = None
    try:
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            raise AdapterLoadError(f"the adapter file {file} {what}")
        before = file.stat()
        if memory is not None:
            hold = memory.hold_adapter(name, before.st_size)
        fingerprint = file_fingerprint(file)
        weights = _load(backend, backend_name, file)
    except BaseException as error:
        if hold is not None:
            hold.release()
        if isinstance(error, OSError | ValueError):  # ValueError: a NUL in the path
            reason = str(error)
        elif isinstance(error, ModelLoadError) and not isinstance(error, AdapterLoadError):
            reason = error.reason or str(error)
        else:
            raise
        raise AdapterLoadError(f"cannot read the adapter file {file}", reason=reason) from error
    adapter = LoadedAdapter(
        AdapterInfo(name=name, path=str(path), scale=float(scale), fingerprint=fingerprint.hex()),
        weights,
        hold,
    )
    try:
        is_same = file_identity(file.stat()) == file_identity(before)
    except OSError:
        is_same = False
    if not is_same:
        adapter.close()
        raise AdapterLoadError(f"the adapter file {file} was changed while it was loaded")
    return adapter


def _load(backend: Adapts, backend_name: str, file: Path) -> Adapter:
    try:
        return backend.load_adapter(file)
    except ErllamaError:
        raise
    except Exception as error:
        raise AdapterLoadError(
            f"the backend {backend_name!r} failed with the adapter {file}", reason=repr(error)
        ) from error


# ------------------------------------------------------------------- changes


def added(adapter: LoadedAdapter, there: Adapters) -> Adapters:
    """With one more. Raises AlreadyLoaded."""
    check_is_new(adapter.info.name, there)
    return (*there, adapter)


def check_is_new(name: str, there: Adapters) -> None:
    """Raise AlreadyLoaded when an adapter has that name."""
    if any(one.info.name == name for one in there):
        raise AlreadyLoaded(f"an adapter is loaded as {name!r}; unload it or give another name")


def removed(name: str, there: Adapters) -> Adapters:
    """With one less. Raises AdapterNotFound."""
    _index(name, there)
    return tuple(one for one in there if one.info.name != name)


def scaled(name: str, scale: float, there: Adapters) -> Adapters:
    """With another scale for one. Raises AdapterNotFound."""
    at = _index(name, there)
    info = attrs.evolve(there[at].info, scale=float(scale))
    return (*there[:at], attrs.evolve(there[at], info=info), *there[at + 1 :])


def _index(name: str, there: Adapters) -> int:
    names = [one.info.name for one in there]
    if name not in names:
        raise AdapterNotFound(unknown_name("adapter", name, names))
    return names.index(name)


def names_of_state(adapters: Adapters) -> list[tuple[bytes, float]]:
    """What of adapters decides what state means: fingerprints and scales.

    A scale of 0 is no adapter: backends are not even told of it.
    """
    return sorted(
        (bytes.fromhex(one.info.fingerprint), one.effective_scale)
        for one in adapters
        if one.effective_scale
    )


class Withdrawal:
    """Takes a change back from outside of the thread that waits for it. Thread-safe.

    For callers who are told to give up while a thread works for them, as coroutines are.
    """

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._act: Callable[[], None] | None = None
        self._is_asked = False

    def check(self) -> None:
        """Raise AdapterTimeout when what is to be asked for is to be taken back already."""
        if self._is_asked:
            raise _taken_back()

    def ask(self) -> None:
        """Take the change back, now or as soon as it is asked for, unless it is being made."""
        with self._lock:
            self._is_asked = True
            act = self._act
        if act is not None:
            act()

    def arm(self, act: Callable[[], None]) -> None:
        """``act`` takes back what was just asked for."""
        with self._lock:
            self._act = act
            is_late = self._is_asked
        if is_late:
            act()


class Change:
    """A change on its way to the worker. Its caller waits for it."""

    def __init__(self, apply: Callable[[Adapters], Adapters]) -> None:
        self.apply: Final = apply
        self.done: Final = threading.Event()
        self.error: ErllamaError | None = None
        self.has_begun = False
        """The context is being changed: it can no longer be taken back."""


class AdapterTable:
    """The adapters of one model, and the changes that wait, in their order. Thread-safe.

    It outlives a context that was given up: the next one gets what was in effect.
    """

    def __init__(self, backend: BackendModel, adapters: Adapters = ()) -> None:
        self._backend: Final = backend
        self._lock: Final = threading.Lock()
        self._current = adapters
        self._changes: Final[deque[Change]] = deque()

    @property
    def current(self) -> Adapters:
        """What is in effect."""
        return self._current

    # ------------------------------------------------------------ for callers

    def ask(self, apply: Callable[[Adapters], Adapters]) -> Change:
        """Queue a change. Raises what ``apply`` raises after those before it."""
        with self._lock:
            expected = self._current
            for change in self._changes:
                expected = _attempt(change, expected)
            apply(expected)
            change = Change(apply)
            self._changes.append(change)
            return change

    def withdraw(self, change: Change) -> bool:
        """Take a change back; False when it is done, or being done."""
        with self._lock:
            if change.has_begun or change not in self._changes:
                return False
            self._changes.remove(change)
            return True

    def recall(self, change: Change) -> bool:
        """:meth:`withdraw` for another thread than the one that waits, which raises then."""
        if not self.withdraw(change):
            return False
        change.error = _taken_back()
        change.done.set()
        return True

    def wait(self, change: Change, timeout_s: float | None, withdrawn: Callable[[], None]) -> None:
        """Return when a change is in effect. Raises what kept it from that, AdapterTimeout.

        ``withdrawn`` is called when it was taken back, since the time was up or the wait was
        interrupted. What interrupts a change that is being made, as Ctrl-C does, is raised when
        that is over.
        """
        taken_back = False
        try:
            if not change.done.wait(timeout_s):
                taken_back = self.withdraw(change)
                if not taken_back:
                    change.done.wait()  # it is being done, and nobody is waited for any more
        except BaseException:
            if self.withdraw(change):
                withdrawn()
            elif change.has_begun:
                change.done.wait()
            raise
        if taken_back:
            withdrawn()
            raise AdapterTimeout(
                f"the requests that run did not end within {timeout_s} s, and adapters are "
                f"changed between requests; wait longer, or cancel them"
            )
        if change.error is not None:
            raise change.error

    # -------------------------------------------------------------- for workers

    def first(self) -> Change | None:
        """The change that is next."""
        with self._lock:
            return self._changes[0] if self._changes else None

    def begin(self, change: Change) -> bool:
        """A change is being made from now on; False when it was taken back."""
        with self._lock:
            change.has_begun = change in self._changes
            return change.has_begun

    def finish(self, change: Change, outcome: Adapters | ErllamaError) -> bool:
        """A change is in effect, or came to nothing. False when it was taken back before."""
        with self._lock:
            if change not in self._changes:
                return False
            self._changes.remove(change)
            if isinstance(outcome, ErllamaError):
                change.error = outcome
            else:
                self._current = outcome
        change.done.set()
        return True

    def fail_all(self, error: ErllamaError) -> None:
        """No change will be made any more."""
        while (change := self.first()) is not None:
            self.finish(change, error)

    def attach(self, context: Context, adapters: Adapters) -> None:
        """Have a context compute with these. On its thread. Raises what the backend raises."""
        assert isinstance(self._backend, Adapts)
        chosen = [(one.weights, one.effective_scale) for one in adapters if one.effective_scale]
        self._backend.attach(context, chosen)

    def close(self) -> None:
        """Free all of them; the contexts are closed."""
        for one in self._current:
            free_adapter(one)


class Barrier:
    """Makes the changes of a table in one context. The worker's alone.

    ``watch`` notices attaching that does not come back.
    """

    def __init__(
        self,
        table: AdapterTable,
        context: Context,
        space: ModelSpace,
        pool: SequencePool,
        roster: Roster,
        watch: StepWatch,
        *,
        save_timeout_s: float,
    ) -> None:
        self._table: Final = table
        self._context: Final = context
        self._space: Final = space
        self._pool: Final = pool
        self._roster: Final = roster
        self._watch: Final = watch
        self.save_timeout_s = save_timeout_s

    def open(self) -> None:
        """The context is new: give it the adapters that are in effect."""
        current = self._table.current
        if names_of_state(current):
            self._table.attach(self._context, current)
        self._space.adapt(names_of_state(current))

    def may_begin(self, request: Request) -> bool:
        """Whether a waiting request may be let in now; its context is then named for that.

        While a change waits, only one that had begun, and goes on.
        """
        if not request.order and self._table.first() is not None:
            return False
        salt = request.options.cache_salt
        if request.keys is None or request.keys.namespace != self._space.namespace(salt):
            request.keys = self._space.keys(request.tokens, salt)
        return True

    @property
    def _is_drained(self) -> bool:
        """Whether all have ended who had begun."""
        return not self._roster.active and not any(r.order for r in self._roster.waiting)

    def proceed(self) -> None:
        """Make the changes that can be made, in order. What changes no state waits for nobody."""
        table = self._table
        while (change := table.first()) is not None:
            if change.has_begun:  # in another context, which was given up in the middle of it
                lost = "the context was lost as these adapters were attached, and is replaced"
                table.finish(change, AdapterLoadError(lost))
                continue
            before = table.current
            try:
                after = change.apply(before)
            except ErllamaError as error:  # what it builds on was taken back, or failed
                table.finish(change, error)
                continue
            if names_of_state(after) != names_of_state(before):
                if not self._is_drained:
                    return
                if table.begin(change):
                    self._make(change, before, after)
            elif table.finish(change, after):
                self._free_left(before, after)

    def _make(self, change: Change, before: Adapters, after: Adapters) -> None:
        self._save_and_drop()
        try:
            self._attach(after)
        except Abandoned:
            raise
        except Exception as error:  # noqa: BLE001 - a backend's own code; told to the caller
            self._attach(before)
            self._table.finish(change, _as_refusal(error))
            return
        self._space.adapt(names_of_state(after))
        log.info("adapters.changed", adapters=[one.info.name for one in after])
        self._table.finish(change, after)
        self._free_left(before, after)

    def _attach(self, adapters: Adapters) -> None:
        self._watch.begin(())
        try:
            self._table.attach(self._context, adapters)
        finally:
            self._watch.end()

    def _save_and_drop(self) -> None:
        """Empty every sequence. What it held is of use when these adapters come back."""
        deadline = time.monotonic() + self.save_timeout_s
        for live in self._pool.residents():
            assert live.request is not None
            drops = live.request.drops
            self._pool.save(live)
            if live.request.drops > drops:  # too much is on its way; nobody else is waiting now
                self._space.wait_written(max(0.0, deadline - time.monotonic()))
                self._pool.save(live)
            self._pool.forget(live)

    @staticmethod
    def _free_left(before: Adapters, after: Adapters) -> None:
        kept = {id(one.weights) for one in after}
        for one in before:
            if id(one.weights) not in kept:
                free_adapter(one)


def _attempt(change: Change, there: Adapters) -> Adapters:
    try:
        return change.apply(there)
    except ErllamaError:
        return there


def _taken_back() -> AdapterTimeout:
    return AdapterTimeout("the change of adapters was taken back by whoever asked for it")


def _as_refusal(error: Exception) -> ErllamaError:
    if isinstance(error, ErllamaError):
        return error
    refusal = AdapterLoadError("the backend raised as adapters were changed", reason=repr(error))
    refusal.__cause__ = error
    return refusal


def free_adapter(adapter: LoadedAdapter) -> None:
    """Free what nothing computes with; trouble is logged, as nobody could do anything about it."""
    try:
        adapter.close()
    except Exception:
        log.exception("adapter.not_freed", adapter=adapter.info.name)
