"""State that is forged under right checksums, and what becomes of llama.cpp that imports it.

llama.cpp checks little of a state, and aborts the process on some of what it does check. Whoever
can write to a tier can forge an object; a request that restores it may be told anything, but
nothing else may come of it.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from state_forging import KINDS, WORDS, Good, Kind, forged, seeds
from target import Run, Target
from targets_store import in_memory

from erllama_core.errors import DecodeFailed, StateRejected
from erllama_core.interfaces.backend import (
    BackendRequest,
    ContextOptions,
    KVClass,
    RangeExport,
    RangeImport,
    Row,
)
from erllama_core.prompt import pack
from tiny_gguf import write_tiny_gguf

_CUTS: Final = (0, 16, 24)
_TOKENS: Final = tuple((7 * n + n // 3) % 250 for n in range(_CUTS[-1]))
_OTHER: Final = tuple((11 * n + 5) % 250 for n in range(_CUTS[-1]))
"""Of the same length: what its state has in common with the first's are the fields."""
_BESIDE: Final = tuple((13 * n + 2) % 250 for n in range(16))
"""Of the sequence that nothing may happen to."""
_CELLS: Final = 256
_MOST_GROWTH_KIB: Final = 48 << 10
"""Of the process, by one import: what is refused must not take memory first."""


class Memory:
    """An open context, a sequence that lives in it, and the good state of another."""

    def __init__(self, kind: Kind, path: Path) -> None:
        from erllama_backend_llama.model import load_model
        from erllama_backend_llama.options import LlamaOptions

        options: dict[str, Any] = {"flash_attn": False, "n_threads": 1, **kind.context}
        context = ContextOptions(n_ctx=_CELLS, n_batch=64, n_ubatch=64, n_seq_max=2, **options)
        request = BackendRequest(model_path=path, options=LlamaOptions(), context=context)
        self._model: Final = load_model(request)
        self._context: Final[Any] = self._model.open_context()
        first, second = self._objects(_TOKENS), self._objects(_OTHER)
        self.objects: Final = [Good.between(*pair) for pair in zip(first, second, strict=True)]
        self._filling: Final = self._made_filling()
        self._next = self._logits_after(first)
        self._beside: Final = self._made_beside()

    # ---------------------------------------------------------- good states

    def _feed(self, seq: int, tokens: tuple[int, ...]) -> None:
        at = self._context.length(seq)
        for start in range(0, len(tokens), 64):
            part = tokens[start : start + 64]
            self._context.step([Row(seq, at + start, pack(part), logits=True)])

    def _objects(self, tokens: tuple[int, ...]) -> list[bytes]:
        """What a context is stored as: its ranges, and then its snapshot, as far as it has them."""
        self._context.drop(0)
        self._feed(0, tokens)
        return self._exported(0, _CUTS)

    def _exported(self, seq: int, cuts: tuple[int, ...]) -> list[bytes]:
        context = self._context
        made = []
        if context.kv_class is not KVClass.WHOLE:
            for start, end in zip(cuts, cuts[1:], strict=False):
                made.append(bytearray(context.range_bytes(seq, start, end)))
                context.export_ranges(seq, [RangeExport(start, end, memoryview(made[-1]))])
        if context.kv_class is not KVClass.SPAN:
            made.append(bytearray(context.snapshot_bytes(seq)))
            context.export_snapshot(seq, memoryview(made[-1]))
        return [bytes(one) for one in made]

    def _import(self, seq: int, objects: list[bytes], cuts: tuple[int, ...]) -> None:
        context, left = self._context, [memoryview(one) for one in objects]
        if context.kv_class is not KVClass.WHOLE:
            bounds = zip(cuts, cuts[1:], strict=False)
            ranges = [RangeImport(start, end, end, left.pop(0)) for start, end in bounds]
            context.import_ranges(seq, ranges)
        if left:
            context.import_snapshot(seq, cuts[-1], left[0])

    def _logits_after(self, objects: list[bytes]) -> Any:
        self._context.drop(0)
        self._import(0, objects, _CUTS)
        self._feed(0, (9,))
        return self._row()

    def _row(self) -> Any:
        import numpy as np

        mark = self._context.mark(0, None)
        row = np.empty(mark.n_vocab, dtype=np.float32)
        row[np.frombuffer(mark.tokens, "<u4")] = np.frombuffer(mark.logits, "<f4")
        return row

    def _made_filling(self) -> list[bytes]:
        """Ranges of as many tokens as one sequence can have beside the other."""
        if self._context.kv_class is KVClass.WHOLE:
            return []
        self._context.drop(0)
        length = _CELLS - len(_BESIDE)
        self._feed(0, tuple(n % 250 for n in range(length)))
        made = []
        for start in range(0, length, 48):
            made.append(bytearray(self._context.range_bytes(0, start, start + 48)))
            item = RangeExport(start, start + 48, memoryview(made[-1]))
            self._context.export_ranges(0, [item])
        self._context.drop(0)
        return [bytes(one) for one in made]

    def _made_beside(self) -> list[bytes]:
        self._context.drop(0)
        self._feed(1, _BESIDE)
        return self._exported(1, (0, len(_BESIDE)))

    # -------------------------------------------------------------- forged

    def take(self, which: int, data: bytes) -> None:
        """Import the good state with one object of it forged. Raises what is a finding."""
        context = self._context
        context.drop(0)
        objects = [one.data for one in self.objects]
        objects[which] = data
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            self._import(0, objects, _CUTS)
        except StateRejected:
            taken = False
        else:
            taken = True
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown <= _MOST_GROWTH_KIB, f"{grown} KiB for an import"
        assert data != self.objects[which].data or taken, "good state was refused"
        beside = self._exported(1, (0, len(_BESIDE)))
        assert beside == self._beside, "another sequence has another state"
        healthy = not taken or self._step()
        context.drop(0)
        if not healthy:
            context.drop(1)
        self._check_sound()

    def _step(self) -> bool:
        """Both sequences go on; whether what came out were numbers."""
        rows = [
            Row(0, _CUTS[-1], pack([9]), logits=True),
            Row(1, len(_BESIDE), pack([9]), logits=True),
        ]
        try:
            self._context.step(rows)
        except DecodeFailed:
            return False
        self._context.drop(1)
        self._import(1, self._beside, (0, len(_BESIDE)))
        return True

    def _check_sound(self) -> None:
        """All cells are there, and what is computed now is what was computed before."""
        import numpy as np

        context = self._context
        if not context.length(1):
            self._import(1, self._beside, (0, len(_BESIDE)))
        if self._filling:
            starts = range(0, _CELLS - len(_BESIDE), 48)
            filling = zip(starts, self._filling, strict=True)
            ranges = [RangeImport(at, at + 48, at + 48, memoryview(one)) for at, one in filling]
            context.import_ranges(0, ranges)
            context.drop(0)
        off = np.abs(self._logits_after([one.data for one in self.objects]) - self._next).max()
        assert off < 0.1, f"logits are off by {off} afterwards"
        context.drop(0)
        assert self._exported(1, (0, len(_BESIDE))) == self._beside

    def close(self) -> None:
        """Free it."""
        self._model.close()


@contextmanager
def _per_kind(opened: Callable[[Kind, Path], Any]) -> Iterator[Callable[[int], Any]]:
    """What is opened for each kind of memory when it is first asked for."""
    folder = in_memory()
    there: dict[int, Any] = {}

    def of(number: int) -> Any:
        if number not in there:
            kind = KINDS[number]
            path = write_tiny_gguf(folder / f"{number}.gguf", kind.arch, **kind.weights)
            there[number] = opened(kind, path)
        return there[number]

    try:
        yield of
    finally:
        for one in there.values():
            one.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _state() -> Iterator[Run]:
    with _per_kind(Memory) as memory_of:

        def run(data: bytes) -> None:
            if len(data) < 2:
                return
            memory = memory_of(data[0] % len(KINDS))
            which = data[1] % len(memory.objects)
            memory.take(which, forged(memory.objects[which], data))

        yield run


TARGETS = (
    Target(
        name="state",
        open=_state,
        made=lambda: seeds(3),
        words=WORDS,
        seconds=20.0,
        base_bytes=64 << 20,
        native=True,
        needs=("llama_cpp",),
        quick_runs=250,
    ),
)
