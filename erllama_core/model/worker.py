"""The one thread that touches a model's context.

Callers hand requests in and read events from mailboxes; the thread admits requests to free
sequences, computes all of them together, one batch a tick, and saves what they leave behind.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

from erllama_core.cache.policy import SavePolicy
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import EngineClosed, ErllamaError, PluginFailed
from erllama_core.interfaces.backend import BackendModel, Context, Mark, Row
from erllama_core.interfaces.log import get_logger
from erllama_core.model.request import Phase, Request
from erllama_core.model.restorer import Restorer
from erllama_core.model.saver import Saver
from erllama_core.results import CacheHit, CacheKey, FinishReason

log = get_logger("erllama.model")

_MIN_CHUNK: Final = 64
_LAST_READS_S: Final = 10.0
"""How long closing waits for a tier that does not answer."""


class Worker:
    """Runs one model's requests. ``submit`` and ``cancel`` from any thread.

    ``open_space`` is called on the worker once the context is open, since only the open
    context says what KV class it has and what makes its state incompatible.
    """

    def __init__(
        self,
        name: str,
        model: BackendModel,
        open_space: Callable[[Context], ModelSpace],
        policy: SavePolicy,
    ) -> None:
        self.name: Final = name
        self._model: Final = model
        self._open_space: Final = open_space
        self._policy: Final = policy
        self._inbox: Final[queue.SimpleQueue[Callable[[], None]]] = queue.SimpleQueue()
        self._lock: Final = threading.Lock()
        self._accepts = True
        self._stopping = False
        self._waiting: Final[deque[Request]] = deque()
        self._active: Final[list[Request]] = []
        self._free_seqs: list[int] = []
        self._settling: Final[list[threading.Event]] = []
        self._reserved_cells = 0
        self._turn = 0
        self._last_hit: CacheHit | None = None
        self._opened: Final = threading.Event()
        self._open_error: Exception | None = None
        self._context: Context
        self._restorer: Restorer
        self._saver: Saver
        self._space: ModelSpace
        self._thread: Final = threading.Thread(
            target=self._run, name=f"erllama-worker-{name}", daemon=True
        )

    # ----------------------------------------------------- from other threads

    def start(self) -> Context:
        """Open the context; blocks until it is. Raises what the backend raised.

        The context is returned for its properties; only the worker may call its methods.
        """
        self._thread.start()
        self._opened.wait()
        if self._open_error is not None:
            self._thread.join()
            raise self._open_error
        return self._context

    def submit(self, request: Request) -> None:
        """Queue a request. Raises EngineClosed."""
        with self._lock:
            if not self._accepts:
                raise EngineClosed(f"model {self.name!r} is closed")
            self._inbox.put(lambda: self._waiting.append(request))

    def cancel(self, request: Request) -> None:
        """End a request at its next token; nothing happens when it has ended."""
        if not request.cancelled and request.phase not in {Phase.CLOSING, Phase.ENDED}:
            request.cancelled = True
            self._inbox.put(_nothing)

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until every answered request has handed over its state to be saved.

        False when time ran out. A closed worker is settled.
        """
        settled = threading.Event()
        with self._lock:
            if not self._accepts:
                return True
            self._inbox.put(lambda: self._settling.append(settled))
        return settled.wait(timeout_s)

    def close(self) -> None:
        """Answer every request with EngineClosed, free the context, end the thread.

        What running requests have computed is saved first. Idempotent.
        """
        with self._lock:
            self._accepts = False
        self._inbox.put(self._stop)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def status(self) -> Literal["idle", "prefilling", "generating"]:
        """What it is doing, as seen without waiting for it."""
        phases = {request.phase for request in tuple(self._active)}
        if Phase.GENERATING in phases:
            return "generating"
        return "prefilling" if phases & {Phase.LOADING, Phase.PREFILLING} else "idle"

    @property
    def available_seqs(self) -> int:
        """Sequences that no request has now."""
        return len(self._free_seqs)

    @property
    def pending_len(self) -> int:
        """Requests that wait for a sequence."""
        return len(self._waiting)

    @property
    def last_hit(self) -> CacheHit | None:
        """What the last admitted request found."""
        return self._last_hit

    # ------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._context = self._model.open_context()
        except Exception as error:  # noqa: BLE001 - handed to the loading thread
            self._open_error = error
            self._opened.set()
            return
        try:
            space = self._open_space(self._context)
            self._restorer = Restorer(self._context, space, self._post, self._restored)
            self._saver = Saver(self._context, space, self._policy)
            self._space = space
            self._free_seqs = list(range(self._context.n_seq_max))
        except Exception as error:  # noqa: BLE001 - handed to the loading thread
            self._open_error = error
            self._context.close()
            self._opened.set()
            return
        self._opened.set()
        try:
            self._serve()
        except Exception:
            log.exception("worker.died", model=self.name)
        finally:
            with self._lock:
                self._accepts = False
            self._shut_down()

    def _serve(self) -> None:
        while not self._stopping:
            self._receive()
            self._end_cancelled()
            self._tick()
            self._admit()  # after whatever sets sequences free, so that nobody waits for news
            if self._settling and all(r.phase is not Phase.CLOSING for r in self._active):
                self._let_settled()

    def _let_settled(self) -> None:
        for settled in self._settling:
            settled.set()
        self._settling.clear()

    def _receive(self) -> None:
        """Take everything from the inbox; wait for something while there is nothing to do."""
        working = {Phase.PREFILLING, Phase.GENERATING, Phase.CLOSING}
        if not any(request.phase in working for request in self._active):
            self._inbox.get()()
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            message()

    def _post(self, request: Request, act: Callable[[Request], None]) -> None:
        """Do something for a request, on the worker; from any thread."""
        self._inbox.put(lambda: self._guard(request, act))

    def _stop(self) -> None:
        self._stopping = True

    def _shut_down(self) -> None:
        """Answer everybody. Whoever submits from now on is told at once."""
        self._drain(lambda: not self._inbox.empty())
        error = EngineClosed(f"model {self.name!r} was closed before the request ended")
        for request in [*self._active, *self._waiting]:
            try:
                if request.phase in {Phase.PREFILLING, Phase.GENERATING, Phase.CLOSING}:
                    self._saver.at_end(request, None, "shutdown")
            except Exception:
                log.exception("save.failed", model=self.name, request=request.id)
            if request.phase is not Phase.CLOSING:
                request.fail(error)
            request.phase = Phase.ENDED
            request.sampler.close()
        self._active.clear()
        self._waiting.clear()
        self._let_settled()
        # Reads that are under way hold pages, which their requests will no longer take.
        self._drain(lambda: self._restorer.outstanding > 0)
        self._context.close()

    def _drain(self, more: Callable[[], bool]) -> None:
        while more():
            try:
                self._inbox.get(timeout=_LAST_READS_S)()
            except queue.Empty:
                log.warning("worker.reads_abandoned", model=self.name)
                return

    # -------------------------------------------------------------- admission

    def _admit(self) -> None:
        """Give free sequences to waiting requests, in order, while their cells are free."""
        while self._waiting and self._free_seqs:
            request = self._waiting[0]
            if self._reserved_cells + request.max_tokens > self._context.n_cells:
                return
            self._waiting.popleft()
            self._reserved_cells += request.max_tokens
            request.seq = self._free_seqs.pop()
            request.admitted_at = time.perf_counter()
            request.keys = self._space.keys(request.tokens, request.options.cache_salt)
            self._active.append(request)
            self._guard(request, self._restorer.start)

    def _restored(self, request: Request, mark: Mark | None) -> None:
        """The sequence of a request is as far as stored state brings it."""
        self._last_hit = CacheHit(request.hit_kind, request.read)
        if mark is None:
            return
        self._take(request, request.sampler.sample_mark(mark))
        if request.phase is Phase.CLOSING and request.computed == request.length:
            self._release(request)  # it said nothing, and what it read is stored

    def _release(self, request: Request) -> None:
        """The request is over: its sequence and cells are free."""
        request.phase = Phase.ENDED
        self._context.drop(request.seq)
        self._free_seqs.append(request.seq)
        self._reserved_cells -= request.max_tokens
        self._active.remove(request)
        request.sampler.close()

    def _end_cancelled(self) -> None:
        for request in [r for r in self._waiting if r.cancelled]:
            self._waiting.remove(request)
            request.phase = Phase.ENDED
            request.finish(request.stats("cancelled", None))
            request.sampler.close()
        for request in [r for r in self._active if r.cancelled]:
            if request.phase is Phase.GENERATING:
                self._guard(request, lambda r: self._answer(r, "cancelled"))
            elif request.phase in {Phase.LOADING, Phase.PREFILLING}:
                request.finish(request.stats("cancelled", None))
                self._release(request)

    # ------------------------------------------------------------------- tick

    def _tick(self) -> None:
        """One batch: a token of every running reply, then parts of prompts in fair turns."""
        batch, rows = self._compose()
        if not rows:
            return
        try:
            self._context.step(rows)
        except Exception as error:  # noqa: BLE001 - a backend's own code
            log.warning("step.failed", model=self.name, error=str(error))
            failure = _as_erllama_error(error, "the backend raised in a step")
            for request in batch:
                self._fail(request, failure)
            return
        ends: list[tuple[Request, int | None]] = []
        for number, (request, row) in enumerate(zip(batch, rows, strict=True)):
            request.computed += len(row.tokens) // 4
            ends.append((request, number if row.logits else None))
            if row.logits and request.phase is not Phase.CLOSING:
                self._guard(request, functools.partial(self._sample, row=number))
        # Tokens are on their way to the callers; now what was computed is saved.
        for request, last in ends:
            if request.phase is not Phase.ENDED:
                self._guard(request, functools.partial(self._save, row=last))

    def _compose(self) -> tuple[list[Request], list[Row]]:
        batch: list[Request] = []
        rows: list[Row] = []
        room = self._context.n_batch
        for request in self._active:
            if request.phase in {Phase.GENERATING, Phase.CLOSING} and room:
                start = request.computed
                batch.append(request)
                rows.append(Row(request.seq, start, bytes(request.tokens[4 * start :]), True))
                room -= 1
        prefilling = [r for r in self._active if r.phase is Phase.PREFILLING]
        if prefilling and room:
            self._turn = (self._turn + 1) % len(prefilling)
            for request in prefilling[self._turn :] + prefilling[: self._turn]:
                start = request.computed
                stop = min(request.prompt_tokens, start + min(self._chunk(), room))
                if stop == start:
                    break
                tokens = bytes(request.tokens[4 * start : 4 * stop])
                batch.append(request)
                rows.append(Row(request.seq, start, tokens, stop == request.prompt_tokens))
                room -= stop - start
        return batch, rows

    def _chunk(self) -> int:
        return self._policy.prefill_chunk_size or max(_MIN_CHUNK, self._context.n_batch // 4)

    def _sample(self, request: Request, row: int) -> None:
        self._take(request, self._context.sample(row, request.sampler))

    def _take(self, request: Request, token: int) -> None:
        """A token was sampled: tell the caller, and see whether it was the last one."""
        if request.phase is Phase.PREFILLING:
            now = time.perf_counter()
            request.first_token_at = now
            if request.computed > request.read:
                request.prefill_s = now - request.prefill_at
            request.phase = Phase.GENERATING
        if token in self._model.vocabulary.end_of_generation:
            self._answer(request, "stop")
            return
        request.append(token)
        for event in request.pipeline.feed(token):
            request.mailbox.put(event)
        if len(request.generated) >= request.max_generated:
            self._answer(request, "length")

    def _answer(self, request: Request, reason: FinishReason) -> None:
        """Generation has ended: the caller gets the end now, the cache the rest of it next."""
        key = None
        if self._saver.saves(request.length) and request.keys is not None:
            key = CacheKey(request.keys.key(request.length))
        request.finish(request.stats(reason, key))
        request.phase = Phase.CLOSING

    def _save(self, request: Request, row: int | None) -> None:
        """After a step: save what is due, and let go of a request whose context is whole."""
        if request.computed <= request.prompt_tokens:
            self._saver.after_prefill(request, row)
        else:
            self._saver.after_token(request)
        if request.phase is Phase.CLOSING and request.computed == request.length:
            self._saver.at_end(request, row)
            self._release(request)

    # ----------------------------------------------------------------- errors

    def _guard(self, request: Request, act: Callable[[Request], None]) -> None:
        """Do something for one request; what it raises ends that request and no other."""
        try:
            act(request)
        except Exception as error:  # noqa: BLE001 - a plugin's own code
            what = f"a plugin raised while request {request.id} ran"
            self._fail(request, _as_erllama_error(error, what))

    def _fail(self, request: Request, error: Exception) -> None:
        if request.phase is Phase.ENDED:
            return
        if request.phase is not Phase.CLOSING:  # else the caller has its answer already
            request.fail(error)
        self._release(request)


def _as_erllama_error(error: Exception, what: str) -> ErllamaError:
    if isinstance(error, ErllamaError):
        return error
    log.error("plugin.raised", doing=what, exc_info=error)
    failure = PluginFailed(f"{what}: {error!r}")
    failure.__cause__ = error
    return failure


def _nothing() -> None:
    """Wakes the worker."""
