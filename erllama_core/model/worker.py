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
from typing import Final

import attrs

from erllama_core import results
from erllama_core.cache.policy import SavePolicy
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import EngineClosed, ErllamaError, PluginFailed
from erllama_core.interfaces.backend import BackendModel, Context, KVClass, Mark
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.interfaces.log import get_logger
from erllama_core.model.explain import Finding, examine, explain
from erllama_core.model.request import Phase, Request
from erllama_core.model.restorer import Restorer
from erllama_core.model.saver import Saver
from erllama_core.model.tick import TickComposer
from erllama_core.prompt import Prompt
from erllama_core.results import CacheHit, CacheKey, FinishReason

log = get_logger("erllama.model")

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
        self._save_timeout_s: Final = policy.evict_save_timeout_ms / 1000
        self._inbox: Final[queue.SimpleQueue[Callable[[], None]]] = queue.SimpleQueue()
        self._lock: Final = threading.Lock()
        self._accepts = True
        self._stopping = False
        self._waiting: Final[deque[Request]] = deque()
        self._active: Final[list[Request]] = []
        self._free_seqs: list[int] = []
        self._settling: Final[list[tuple[threading.Event, list[Request]]]] = []
        self._reserved_cells = 0
        self._last_hit: CacheHit | None = None
        self._opened: Final = threading.Event()
        self._open_error: Exception | None = None
        self._context_or_none: Context | None = None
        self._context: Context
        self._restorer: Restorer
        self._saver: Saver
        self._composer: TickComposer
        self._space: ModelSpace
        self._thread: Final = threading.Thread(
            target=self._run, name=f"erllama-worker-{name}", daemon=True
        )

    # ----------------------------------------------------- from other threads

    def start(self) -> Context:
        """Open the context; blocks until it is. Raises what the backend raised.

        The context is returned for its properties; only the worker may call its methods. From
        here on the worker owns the model, and frees it when it is closed or failed to open.
        """
        self._thread.start()
        self._opened.wait()
        if self._open_error is not None:
            self._thread.join()
            raise self._open_error
        return self._context

    def submit(self, request: Request) -> None:
        """Queue a request. Raises EngineClosed.

        Reading the prompt's text takes a while for a long one, so the caller's thread does it.
        """
        request.keys = self._space.keys(request.tokens, request.options.cache_salt)
        if request.keys.text is not None:
            request.keys.text.catch_up()
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
            self._inbox.put(lambda: self._wait_settled(settled))
        return settled.wait(timeout_s)

    def save_live(self) -> bool:
        """Save what running requests have computed, with the reason ``evict``; they go on.

        For sequences that are about to lose their cells, or memory that is about to. Returns
        when it is written; False when that took longer than ``evict_save_timeout_ms``, or
        the worker is closed, which saves by itself.
        """
        deadline = time.monotonic() + self._save_timeout_s
        saved = threading.Event()

        def save() -> None:
            for request in self._active:
                if request.phase in {Phase.PREFILLING, Phase.GENERATING, Phase.CLOSING}:
                    self._saver.at_end(request, None, "evict")
            saved.set()

        with self._lock:
            if not self._accepts:
                return False
            self._inbox.put(save)
        if not saved.wait(self._save_timeout_s):
            return False
        return self._space.wait_written(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Answer every request with EngineClosed, free context and weights, end the thread.

        What running requests have computed is saved first. Idempotent.
        """
        with self._lock:
            self._accepts = False
        self._inbox.put(self._stop)
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join()

    @property
    def status(self) -> results.Phase:
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

    def examine(self, prompt: Prompt, salt: str | None) -> tuple[Finding, KVClass]:
        """What is stored of a prompt now. Computes nothing, and waits for nobody."""
        space = self._space
        keys = space.keys(bytearray(prompt.packed), salt)
        match = space.find(keys, may_sample=True)
        other = space.respell(keys, match) if prompt.text is not None else None
        if other is not None:
            keys = space.keys(bytearray(other), salt)
            match = space.find(keys, may_sample=True)
        finding = examine(space, keys, match, respelt=other is not None)
        gate = space.judge(match, len(keys))
        return attrs.evolve(finding, gate=gate), space.kv_class

    def shortfall(self, prompt_tokens: int) -> str | None:
        """What of a prompt would be saved late or not at all, and why. Waits for nobody."""
        return self._saver.shortfall(prompt_tokens, prompt_tokens)

    @property
    def last_hit(self) -> CacheHit | None:
        """What the last admitted request found."""
        return self._last_hit

    # ------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._open()
        except Exception as error:  # noqa: BLE001 - handed to the loading thread
            self._open_error = error
        else:
            self._opened.set()
            try:
                self._serve()
            except Exception:
                log.exception("worker.died", model=self.name)
            with self._lock:
                self._accepts = False
            try:
                self._shut_down()
            except Exception:
                log.exception("worker.not_shut_down", model=self.name)
        # The context first, then the weights under it, on the one thread that used them.
        for free in (self._close_context, self._model.close):
            try:
                free()
            except Exception:
                log.exception("model.not_freed", model=self.name)
        self._opened.set()

    def _open(self) -> None:
        context = self._context_or_none = self._model.open_context()
        self._context = context
        self._space = self._open_space(context)
        self._restorer = Restorer(
            context,
            self._space,
            self._model.vocabulary.n_tokens,
            self._post,
            self._restored,
            self._cells_for,
            self._respell,
        )
        self._saver = Saver(context, self._space, self._policy)
        self._composer = TickComposer(context.n_batch, self._policy.prefill_chunk_size)
        self._free_seqs = list(range(context.n_seq_max))

    def _close_context(self) -> None:
        if self._context_or_none is not None:
            self._context_or_none.close()

    def _serve(self) -> None:
        while not self._stopping:
            self._receive()
            self._end_cancelled()
            self._tick()
            self._admit()  # after whatever sets sequences free, so that nobody waits for news
            if self._settling:
                self._let_settled()

    def _let_settled(self) -> None:
        """Tell those who wait that every request that was being closed then has ended."""
        for settled, closing in self._settling:
            if all(request.phase is Phase.ENDED for request in closing):
                settled.set()
        self._settling[:] = [item for item in self._settling if not item[0].is_set()]

    def _wait_settled(self, settled: threading.Event) -> None:
        closing = [request for request in self._active if request.phase is Phase.CLOSING]
        self._settling.append((settled, closing))

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
        """Answer everybody, then save what there is. Who submits from now on is told at once."""
        self._drain(lambda: not self._inbox.empty())
        error = EngineClosed(f"model {self.name!r} was closed before the request ended")
        requests = [*self._active, *self._waiting]
        unfinished = {Phase.PREFILLING, Phase.GENERATING, Phase.CLOSING}
        with_state = [request for request in self._active if request.phase in unfinished]
        for request in requests:
            if request.phase is not Phase.CLOSING:
                request.fail(error)
            request.phase = Phase.ENDED
        for request in with_state:
            self._saver.at_end(request, None, "shutdown")
        if with_state and not self._space.wait_written(self._save_timeout_s):
            log.warning("save.late", model=self.name, timeout_s=self._save_timeout_s)
        for request in requests:
            _close_sampler(request)
        self._active.clear()
        self._waiting.clear()
        self._let_settled()
        # Reads that are under way hold pages, which their requests will no longer take.
        self._drain(lambda: self._restorer.outstanding > 0)

    def _drain(self, more: Callable[[], bool]) -> None:
        while more():
            try:
                message = self._inbox.get(timeout=_LAST_READS_S)
            except queue.Empty:
                log.warning("worker.reads_abandoned", model=self.name)
                return
            try:
                message()
            except Exception:
                log.exception("worker.message_failed", model=self.name)

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
            self._active.append(request)
            self._guard(request, self._start)

    def _cells_for(self, request: Request) -> int:
        """The cells that no other running request has set aside."""
        others = self._reserved_cells - request.max_tokens
        return min(self._context.n_ctx, self._context.n_cells - others)

    def _start(self, request: Request) -> None:
        self._restorer.start(request)

    def _respell(self, request: Request, tokens: bytes) -> bool:
        """Have a request go on with other tokens of its text, if it has room for them."""
        needed = request.max_tokens_after(len(tokens) // TOKEN_BYTES)
        if needed is None or needed > self._cells_for(request):
            return False
        sampling = request.options.sampling()
        sampler = None
        if sampling.repetition_penalty != 1.0:  # else it has no use for the prompt's tokens
            sampler = self._model.new_sampler(sampling, tokens)
        self._reserved_cells += needed - request.max_tokens
        keys = self._space.keys(request.tokens, request.options.cache_salt)
        request.respell(tokens, keys, sampler)
        return True

    def _restored(self, request: Request, mark: Mark | None) -> None:
        """The sequence of a request is as far as stored state brings it."""
        self._last_hit = CacheHit(request.hit_kind, request.read)
        if mark is None:
            return
        self._take(request, request.sampler.sample_mark(mark, greedy=request.pipeline.greedy))
        if request.phase is Phase.CLOSING and request.computed == request.length:
            self._release(request)  # it said nothing, and what it read is stored

    def _release(self, request: Request) -> None:
        """The request is over: its sequence and cells are free, if it had any."""
        request.phase = Phase.ENDED
        if request in self._active:
            self._active.remove(request)
            self._free_seqs.append(request.seq)
            self._reserved_cells -= request.max_tokens
            self._context.drop(request.seq)
        _close_sampler(request)

    def _end_cancelled(self) -> None:
        for request in [r for r in self._waiting if r.cancelled]:
            self._waiting.remove(request)
            self._guard(request, self._answer_cancelled)
        for request in [r for r in self._active if r.cancelled]:
            if request.phase is Phase.GENERATING:
                self._guard(request, lambda r: self._answer(r, "cancelled"))
            elif request.phase in {Phase.LOADING, Phase.PREFILLING}:
                self._guard(request, self._answer_cancelled)

    def _answer_cancelled(self, request: Request) -> None:
        """It has said nothing: there is no reply to finish."""
        request.finish_reply()
        request.finish(request.stats("cancelled", None, self._explanation(request)))
        self._release(request)

    def _explanation(self, request: Request) -> results.Explanation | None:
        if request.finding is None:
            return None
        return explain(
            request.finding,
            self._model.vocabulary,
            self._space.kv_class,
            kind=request.hit_kind,
            reused_tokens=request.read,
            tiers=request.sources,
            restored_bytes=request.restored_bytes,
            restore_s=request.restore_s,
            saving=self._saver.shortfall(request.prompt_tokens, request.length, request.drops),
        )

    # ------------------------------------------------------------------- tick

    def _tick(self) -> None:
        """One batch: a token of every running reply, then parts of prompts in fair turns."""
        batch, rows = self._composer.compose(self._active)
        if not rows:
            return
        started = time.perf_counter()
        try:
            self._context.step(rows)
        except Exception as error:  # noqa: BLE001 - a backend's own code
            log.warning("step.failed", model=self.name, error=str(error))
            failure = _as_erllama_error(error, "the backend raised in a step")
            for request in batch:
                self._fail(request, failure)
            return
        if self._space.gate is not None:
            tokens = sum(len(row.tokens) for row in rows) // TOKEN_BYTES
            self._space.gate.observe_step(tokens, time.perf_counter() - started)
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

    def _sample(self, request: Request, row: int) -> None:
        greedy = request.pipeline.greedy
        self._take(request, self._context.sample(row, request.sampler, greedy=greedy))

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
        if request.pipeline.ended:
            self._answer(request, "stop")
        elif len(request.generated) >= request.max_generated:
            self._answer(request, "length")

    def _answer(self, request: Request, reason: FinishReason) -> None:
        """Generation has ended: the caller gets the end now, the cache the rest of it next."""
        request.finish_reply()
        if reason == "length" and request.pipeline.stop_sequence is not None:
            reason = "stop"  # it was met, but a better one could have come
        key = None
        if self._saver.saves(request.length) and request.keys is not None:
            key = CacheKey(request.keys.key(request.length))
        request.finish(request.stats(reason, key, self._explanation(request)))
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


def _close_sampler(request: Request) -> None:
    try:
        request.sampler.close()
    except Exception:
        log.exception("sampler.not_freed", request=request.id)


def _as_erllama_error(error: Exception, what: str) -> ErllamaError:
    if isinstance(error, ErllamaError):
        return error
    log.error("plugin.raised", doing=what, exc_info=error)
    failure = PluginFailed(f"{what}: {error!r}")
    failure.__cause__ = error
    return failure


def _nothing() -> None:
    """Wakes the worker."""
