"""One step of a context: what is computed, with cells for all of it, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from erllama_core.cache.space import ModelSpace
from erllama_core.errors import DecodeAborted, DecodeTimeout, NotNumbers
from erllama_core.interfaces.backend import Context, Mark, Row, Vocabulary
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.interfaces.log import get_logger, told
from erllama_core.model.endings import Endings, as_erllama_error
from erllama_core.model.logprobs import marked_logprob, row_logprob
from erllama_core.model.request import Phase, Request
from erllama_core.model.restorer import Restorer
from erllama_core.model.roster import Roster
from erllama_core.model.saver import Saver
from erllama_core.model.sequences import SequencePool
from erllama_core.model.tick import Pace, Tick, TickComposer
from erllama_core.model.watch import StepWatch

log = get_logger("erllama.model")

_MOST_ABORTS: Final = 8
"""Steps in a row that a request takes part in, and that are aborted for reasons not its own."""


class Stepper:
    """Computes batches for the requests that run. The worker's alone, but for ``pace``."""

    def __init__(
        self,
        context: Context,
        vocabulary: Vocabulary,
        space: ModelSpace,
        saver: Saver,
        pool: SequencePool,
        roster: Roster,
        restorer: Restorer,
        endings: Endings,
        composer: TickComposer,
        watch: StepWatch,
    ) -> None:
        self._context: Final = context
        self._vocabulary: Final = vocabulary
        self._end_of_generation: Final = vocabulary.end_of_generation
        self._space: Final = space
        self._saver: Final = saver
        self._pool: Final = pool
        self._roster: Final = roster
        self._restorer: Final = restorer
        self._endings: Final = endings
        self._composer = composer
        self._watch: Final = watch
        self.pace: Final = Pace()
        self.preemptions = 0

    def set_composer(self, composer: TickComposer) -> None:
        """Compose batches in another way from the next one on."""
        self._composer = composer

    def step(self) -> bool:
        """One batch: a token of every running reply, then parts of prompts in fair turns.

        Whether there was anything that could be computed.
        """
        tick = self._compose()
        batch, rows = tick.requests, tick.rows
        if not rows:
            return False
        started = time.perf_counter()
        error = self._compute(batch, rows)
        if error is not None:
            self._recover(batch, error)
            return True
        seconds = time.perf_counter() - started
        self.pace.note(tick.n_tokens - tick.n_replies, tick.n_replies, seconds)
        if self._space.gate is not None:
            self._space.gate.observe_step(tick.n_tokens, seconds)
        grow = self._pool.ledger.grow
        for request, row in zip(batch, rows, strict=True):
            count = len(row.tokens) // TOKEN_BYTES
            request.computed += count
            request.aborts = 0
            request.unproven = None
            grow(row.seq, count)
        # Tokens go to the callers first; then what was computed is saved.
        guard = self._endings.guard
        for number, (request, row) in enumerate(zip(batch, rows, strict=True)):
            at_end = request.computed == request.length  # else they are kept beside a snapshot
            if row.logits and at_end and request.phase is not Phase.CLOSING:
                guard(request, self._sample, number)
        for number, (request, row) in enumerate(zip(batch, rows, strict=True)):
            if request.phase is not Phase.ENDED:
                guard(request, self._save, number if row.logits else None)
        return True

    # ------------------------------------------------------------------------ cells

    def _compose(self) -> Tick:
        """The next batch, with cells for all of it.

        Who came first keeps its cells, and can have all others': it will end, and so will they.
        """
        while True:
            tick = self._composer.compose(self._roster.active, self.pace)
            needed = tick.n_tokens
            if not needed or self._pool.make_room(needed) or not self._take_cells():
                return tick

    def _take_cells(self) -> bool:
        """Take the cells of one request for the others; whether there was one."""
        active = self._roster.active
        first = min(active, key=lambda request: request.order)
        others = [request for request in active if request is not first]
        victim = self._victim(others)
        if victim is not None:
            self._preempt(victim)
            return True
        for request in others:
            if request.phase is Phase.CLOSING:
                # It is answered, and does without its very last token.
                self._saver.at_end(request, None, "evict")
                self._endings.release(request)
                return True
            if request.phase is Phase.LOADING and request.computed:
                self._saver.at_end(request, None, "evict")
                self._restorer.empty(request)
                return True
        return False

    def _victim(self, others: Sequence[Request]) -> Request | None:
        """Who can go on later."""
        running = [r for r in others if r.phase in {Phase.PREFILLING, Phase.GENERATING}]
        if not running:
            return None
        ledger = self._pool.ledger
        return max(running, key=lambda r: (ledger.exclusive({r.seq}), r.order))

    def _preempt(self, request: Request) -> None:
        """Take a request's cells; it goes on where it was when all that it needs is free."""
        log.debug(
            "request.preempted", request=request.id, model=request.model, tokens=request.computed
        )
        self.preemptions += 1
        self._saver.at_end(request, None, "evict")
        self._saver.let_go(request)
        live = request.live
        assert live is not None
        self._roster.suspend(request)
        self._restorer.hand_over(request)
        request.lose_sequence()
        self._pool.forget(live)

    # ---------------------------------------------------------------------- compute

    def _compute(self, batch: Sequence[Request], rows: Sequence[Row]) -> Exception | None:
        self._watch.begin(batch)
        try:
            self._context.step(rows)
        except Exception as error:  # noqa: BLE001 - a backend's own code
            return error
        finally:
            self._watch.end()
        return None

    def _recover(self, batch: Sequence[Request], error: Exception) -> None:
        """A step failed. Its callers get an answer, and what can go on goes on."""
        asked = isinstance(error, DecodeAborted) and not self._watch.over_budget
        if isinstance(error, DecodeAborted) and self._watch.over_budget:
            error = DecodeTimeout(
                "a step took longer than decode_budget_ms and was aborted; give the model more "
                "time, or compute less at once (n_batch, prefill_chunk_size)"
            )
        elif not asked:
            requests = [request.id for request in batch]
            log.warning("step.failed", model=batch[0].model, requests=requests, error=told(error))
        if isinstance(error, NotNumbers):
            self._recover_numbers(batch, error)
            return
        failure = as_erllama_error(error, "the backend raised in a step", model=batch[0].model)
        # All of them before any ends: who waits for one of them looks at what the others hold.
        broken = [r for r in batch if self._context.length(r.seq) != r.computed]
        for request in broken:
            self._restorer.empty(request)
        for request in batch:
            request.aborts += not request.cancelled
            if not asked or request.aborts > _MOST_ABORTS:
                self._endings.fail(request, failure)
            elif request in broken:
                self._start_again(request)

    def _recover_numbers(self, batch: Sequence[Request], error: NotNumbers) -> None:
        """A step computed NaN. Where that came from is given up, and all others go on.

        State that was stored is suspected if nothing was computed from it before. It is not
        kept, and whoever went on from it computes instead. Without any it is the weights.
        """
        spoilt = [request for request in batch if request.seq in error.seqs]
        around: list[Request] = spoilt
        if error.reaches_others:  # it may come from cells that no row of this step had
            idle = [live.request for live in self._pool.residents() if live.request is not None]
            around = [*self._roster.active, *idle]
        suspects = [request for request in around if request.unproven is not None]
        for request in suspects:
            assert request.unproven is not None
            self._space.condemned(request.unproven)
        broken = [r for r in batch if r in spoilt or self._context.length(r.seq) != r.computed]
        if error.reaches_others:
            broken += self._save_others(batch)
        for request in broken:
            self._restorer.empty(request)
        for request in broken:
            if request in spoilt and not suspects:
                self._endings.fail(request, error)
            elif request.phase is not Phase.LOADING:  # else it is given something any moment
                self._start_again(request, reads=request not in suspects)

    def _save_others(self, batch: Sequence[Request]) -> list[Request]:
        """Save what is not in a batch, as no sequence may keep its cells; requests that run."""
        self._pool.drop_all_idle()
        others = [r for r in self._roster.active if r not in batch and r.live and r.computed]
        for request in others:
            self._saver.at_end(request, None, "evict")
        return others

    def _start_again(self, request: Request, *, reads: bool = True) -> None:
        """A request lost its state for nothing that it did. ``reads``: it may be stored."""
        if request.phase is Phase.CLOSING:
            self._endings.release(request)
        else:
            self._saver.let_go(request)
            request.saved = request.tried = 0
            restorer = self._restorer
            self._endings.guard(request, restorer.start if reads else restorer.compute_all)

    # ----------------------------------------------------------------- what comes of it

    def restored(self, request: Request, mark: Mark | None, token: int | None) -> None:
        """The sequence of a request is as far as anything but computing brings it.

        ``mark``: the logits at its end, if they were stored; ``token``: what was drawn from them.
        """
        self._saver.plan(request)
        if mark is None:
            return
        if token is None:
            self._endings.answer(request, "length")
        else:
            self._take(request, token, mark)
        if request.phase is Phase.CLOSING and request.computed == request.length:
            self._endings.leave(request)  # it said nothing, and what it read is stored

    def _sample(self, request: Request, row: int) -> None:
        if not request.generates:
            self._endings.answer(request, "length")
            return
        token = self._context.sample(row, request.sampler, greedy=request.pipeline.greedy)
        self._take(request, token, row)

    def _take(self, request: Request, token: int, source: Mark | int) -> None:
        """A token was sampled: tell the caller, and see whether it was the last one.

        ``source``: what it was drawn from, a mark or a row of the last step.
        """
        if request.phase is Phase.PREFILLING:
            request.phase = Phase.GENERATING
            if request.first_token_at is None:
                now = time.perf_counter()
                request.first_token_at = now
                if request.computed > request.read:
                    request.prefill_s = now - request.prefill_at
        if token in self._end_of_generation:
            self._endings.answer(request, "stop")
            return
        request.append(token)
        if request.logprobs is not None:
            n_top = request.options.logprobs or 0
            if isinstance(source, int):
                likely = row_logprob(self._context, source, self._vocabulary, token, n_top)
            else:
                likely = marked_logprob(source, self._vocabulary, token, n_top)
            request.note_logprob(likely)
        for event in request.pipeline.feed(token):
            request.mailbox.put(event)
        if request.pipeline.ended:
            self._endings.answer(request, "stop")
        elif len(request.generated) >= request.max_generated:
            self._endings.answer(request, "length")

    def _save(self, request: Request, row: int | None) -> None:
        """After a step: save what is due, and let go of a request whose context is whole."""
        if request.computed <= request.prompt_tokens:
            self._saver.after_prefill(request, row)
        else:
            self._saver.after_token(request)
        if request.phase is Phase.CLOSING and request.computed == request.length:
            self._saver.at_end(request, row)
            self._endings.leave(request)
