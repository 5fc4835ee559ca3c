"""State that is forged under right checksums, and what becomes of llama.cpp that imports it.

llama.cpp checks little of a state, and aborts the process on some of what it does check. Whoever
can write to a tier can forge an object; a request that restores it may be told anything, but
nothing else may come of it.
"""

from __future__ import annotations

import functools
import itertools
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from state_forging import KINDS, WORDS, Good, Kind, forged, seeds
from target import Run, Target
from targets_store import FORGED, in_memory, objects_of, read_root, write_root

from erllama_core import Engine
from erllama_core.errors import DecodeFailed, NotNumbers, StateRejected
from erllama_core.interfaces.backend import (
    BackendRequest,
    ContextOptions,
    KVClass,
    RangeExport,
    RangeImport,
    Row,
)
from erllama_core.interfaces.block import Header, decode_header, header_length
from erllama_core.prompt import pack
from recomputed import off_by
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
            for start, end in itertools.pairwise(cuts):
                made.append(bytearray(context.range_bytes(seq, start, end)))
                context.export_ranges(seq, [RangeExport(start, end, memoryview(made[-1]))])
        if context.kv_class is not KVClass.SPAN:
            made.append(bytearray(context.snapshot_bytes(seq)))
            context.export_snapshot(seq, memoryview(made[-1]))
        return [bytes(one) for one in made]

    def _import(self, seq: int, objects: list[bytes], cuts: tuple[int, ...]) -> None:
        context, left = self._context, [memoryview(one) for one in objects]
        if context.kv_class is not KVClass.WHOLE:
            bounds = itertools.pairwise(cuts)
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
def _forging(opened: Callable[[Kind, Path], Any]) -> Iterator[Run]:
    """An input's first bytes choose a kind and one of its objects, the rest forges it."""
    with _per_kind(opened) as of:

        def run(data: bytes) -> None:
            if len(data) < 2:
                return
            subject = of(data[0] % len(KINDS))
            which = data[1] % len(subject.objects)
            subject.take(which, forged(subject.objects[which], data))

        yield run


# ------------------------------------------------------- by way of a tier

_PROMPT: Final = tuple((5 * n + n // 7) % 250 for n in range(72))
_ANOTHER: Final = tuple((9 * n + 4) % 250 for n in range(72))
"""Stored as well, of the same length, and never forged."""
_REPLY: Final = 3


class Stored:
    """What a model of one kind stores of two prompts, and an engine on it with one object forged.

    The engine is new each time, as it is after whoever forges has been there.
    """

    def __init__(self, kind: Kind, path: Path) -> None:
        self._kind: Final = kind
        self._path: Final = path
        self._root: Final = path.with_suffix("")
        with self._serving() as model:
            self._cold: Final = {prompt: _said(model, prompt) for prompt in (_PROMPT, _ANOTHER)}
        objects = objects_of(read_root(self._root))[1]
        split = [(decode_header(one), one) for one in objects]
        self._others: Final = [one for header, one in split if not _is_of(header, _PROMPT)]
        its = sorted((_place(header), one) for header, one in split if _is_of(header, _PROMPT))
        alike = {_place(header): one for header, one in split if _is_of(header, _ANOTHER)}
        self.objects: Final = [
            Good.between(_payload(one), _payload(alike.get(place, one))) for place, one in its
        ]
        self._heads: Final = [one[: header_length(one[:16])] for _, one in its]

    @contextmanager
    def _serving(self) -> Iterator[Any]:
        config: dict[str, Any] = {
            "tiers": [{"name": "disk", "kind": "disk", "root": str(self._root)}],
            "models": {
                "tiny": {
                    "backend": "llama",
                    "model_path": str(self._path),
                    "tier": ["disk"],
                    "context_opts": {
                        "n_ctx": _CELLS,
                        "n_seq_max": 2,
                        "n_threads": 1,
                        "flash_attn": False,
                        "resident_cells_max": 0,
                        **self._kind.context,
                    },
                    "policy": {
                        "boundary_align_tokens": 32,
                        "min_tokens": 8,
                        "cold_min_tokens": 8,
                        "cost_gate": "off",
                    },
                }
            },
        }
        with Engine.from_config(config) as engine:
            engine.cache.wait_scanned()
            yield engine.model("tiny")
            assert engine.flush(20)

    def take(self, which: int, data: bytes) -> None:
        """Serve from a root in which one object of a prompt is forged. Raises what is a finding."""
        objects = [
            head + (data if number == which else good.data)
            for number, (head, good) in enumerate(zip(self._heads, self.objects, strict=True))
        ]
        shutil.rmtree(self._root)
        write_root(self._root, FORGED + b"".join([*self._others, *objects]))
        with self._serving() as model:
            beside = model.infer(list(_ANOTHER), response_tokens=_REPLY)
            with suppress(NotNumbers):  # what was restored may be any numbers, huge ones too
                done = model.complete(list(_PROMPT), response_tokens=_REPLY)
                restored = done.cache_delta.read
                assert restored or data != self.objects[which].data, "good state is not used"
                if not restored:
                    self._check(model, _PROMPT, done)
            self._check(model, _ANOTHER, beside.result())
            # And whoever asks next is told what is right.
            salted = model.complete(list(_PROMPT), response_tokens=_REPLY, cache_salt="new")
            self._check(model, _PROMPT, salted)
            assert model.settle(20)
            info = model.info()
            assert info.available_seqs == info.n_seq_max

    def _check(self, model: Any, prompt: tuple[int, ...], done: Any) -> None:
        if done.generated != self._cold[prompt]:
            off = off_by(model, done)
            assert off < 0.2, f"{done.generated} is off by {off}, not by rounding"

    def close(self) -> None:
        """Nothing is open."""


def _said(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    generated: tuple[int, ...] = model.complete(list(prompt), response_tokens=_REPLY).generated
    return generated


def _is_of(header: Header, prompt: tuple[int, ...]) -> bool:
    path = header.lead_tokens + header.tokens
    at = header.start - len(header.lead_tokens) // 4
    whole = pack(prompt)
    return path[: len(whole) - 4 * at] == whole[4 * at : 4 * at + len(path)]


def _place(header: Header) -> tuple[str, int, int]:
    return header.kind.name, header.start, header.end


def _payload(data: bytes) -> bytes:
    return data[header_length(data[:16]) :]


TARGETS = (
    Target(
        name="state_request",
        open=functools.partial(_forging, Stored),
        made=lambda: seeds((2, 5), (0,)),
        words=WORDS,
        seconds=20.0,
        base_bytes=64 << 20,
        native=True,
        needs=("llama_cpp",),
        quick_runs=70,
    ),
    Target(
        name="state",
        open=functools.partial(_forging, Memory),
        made=lambda: seeds((0, 1, 2), (0, 3, 5)),
        words=WORDS,
        seconds=20.0,
        base_bytes=64 << 20,
        native=True,
        needs=("llama_cpp",),
        quick_runs=250,
    ),
)
