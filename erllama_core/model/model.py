"""A loaded model, as a caller holds it."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Unpack

import attrs

from erllama_core.cache.policy import SavePolicy
from erllama_core.errors import (
    CacheError,
    EngineClosed,
    InvalidPrompt,
    NoSession,
    NotSupported,
    PromptTooLong,
)
from erllama_core.interfaces.backend import (
    Embeds,
    KVClass,
    TellsLogits,
)
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.telemetry import RequestFinished
from erllama_core.model.adapters import (
    Withdrawal,
    adapter_name,
    added,
    as_scale,
    check_is_new,
    open_adapter,
    removed,
    scaled,
)
from erllama_core.model.chat import check_chat, render_chat, render_text
from erllama_core.model.chat_append import AppendOnlyCheck
from erllama_core.model.chat_opening import with_opening
from erllama_core.model.constraint import sampler_maker
from erllama_core.model.explain import explain
from erllama_core.model.options import ReplyKwargs, RequestKwargs, RequestOptions
from erllama_core.model.parts import ModelParts
from erllama_core.model.replay import Replays
from erllama_core.model.request import Request
from erllama_core.prompt import Prompt, pack
from erllama_core.results import (
    AdapterInfo,
    CacheHit,
    CacheKey,
    Completion,
    Explanation,
    HitKind,
    ModelInfo,
    Phase,
    Prefill,
    Replay,
    Stats,
)
from erllama_core.stream.stream import Stream

PromptLike = str | Prompt | Sequence[int]
"""Text, or token ids. Always the full context."""

log = get_logger("erllama.model")

_request_ids = itertools.count(1)


class Model:
    """Weights, a context and its worker, under an id. Thread-safe."""

    def __init__(self, parts: ModelParts, unload: Callable[[Model], None]) -> None:
        self.id: Final = parts.id
        self._parts: Final = parts
        self._backend: Final = parts.backend
        self._worker: Final = parts.worker
        self._unload: Final = unload
        self._append_only: Final = AppendOnlyCheck(parts.id)
        self._closed = False
        self._pid: Final = os.getpid()

    def __repr__(self) -> str:
        return f"Model({self.id!r})"

    # ---------------------------------------------------------------- requests

    def complete(self, prompt: PromptLike, **options: Unpack[RequestKwargs]) -> Completion:
        """Generate a reply and wait for all of it.

        Raises InvalidPrompt, PromptTooLong, InvalidGrammar, NotSupported, SeqCapacity,
        StickyBusy, TimeoutExceeded, EngineError, EngineClosed; TypeError and ValueError for the
        options.
        """
        self._check_open()
        chosen = RequestOptions.of(options)
        return self._stream(self._request(self._as_prompt(prompt, chosen), chosen)).result()

    def infer(self, prompt: PromptLike, **options: Unpack[RequestKwargs]) -> Stream:
        """Start generating; events come as the reply grows. Raises as :meth:`complete`."""
        self._check_open()
        chosen = RequestOptions.of(options)
        whole = self._as_prompt(prompt, chosen)
        return self._stream(self._request(whole, chosen, is_streamed=True))

    def prefill_only(
        self,
        prompt: PromptLike,
        *,
        parent_key: CacheKey | None = None,
        cache_salt: str | None = None,
        pin: bool = False,
    ) -> Prefill:
        """Compute a prompt and save it, without a reply; waits until it is computed.

        ``pin``: also wait until a tier has it, and keep it there as :meth:`Cache.pin` does;
        ``engine.cache.unpin(finish_key)`` lets it go. Raises InvalidPrompt, PromptTooLong,
        EngineError, EngineClosed.
        """
        stream = self.start_prefill(prompt, parent_key=parent_key, cache_salt=cache_salt)
        return self.prefill_of(stream.result().stats, pin=pin)

    def start_prefill(
        self,
        prompt: PromptLike,
        *,
        parent_key: CacheKey | None = None,
        cache_salt: str | None = None,
    ) -> Stream:
        """:meth:`prefill_only` without the wait: the stream has no event but its end."""
        self._check_open()
        chosen = RequestOptions(parent_key=parent_key, cache_salt=cache_salt)
        return self._stream(self._request(self._as_prompt(prompt, chosen), chosen, generates=False))

    def prefill_of(self, stats: Stats, *, pin: bool = False) -> Prefill:
        """What :meth:`prefill_only` returns, of how its request went. Blocks to pin."""
        return Prefill(
            finish_key=stats.finish_key,
            committed_tokens=stats.committed_tokens,
            cache_hit_kind=stats.cache_hit_kind,
            cache_delta=stats.cache_delta,
            is_pinned=pin and stats.finish_key is not None and self._pin(stats.finish_key),
        )

    def _pin(self, key: CacheKey) -> bool:
        """Pin what an answered request has computed; whether it could be."""
        self._worker.settle()
        try:
            self._parts.cache.pin(key)
        except CacheError as error:  # trouble of the cache fails no request
            log.warning("prefill.not_pinned", model=self.id, error=str(error))
            return False
        return True

    # ---------------------------------------------------------------- sessions

    def continue_session(
        self,
        suffix_tokens: Sequence[int],
        *,
        session_id: Hashable,
        expect_committed: Sequence[int] | None = None,
        **options: Unpack[ReplyKwargs],
    ) -> Stream:
        """Go on from what a session holds, with more tokens or none, whatever they are.

        The caller vouches for them: nothing is rendered, tokenised or compared.
        ``expect_committed``: the token ids that the caller believes the session holds. Raises
        NoSession, StickyBusy, TranscriptMismatch, and as :meth:`infer`.
        """
        self._check_open()
        chosen = RequestOptions.of(RequestKwargs(**options, session_id=session_id))
        expected = None if expect_committed is None else self._packed(expect_committed)
        stored, salt = self._worker.transcript(session_id, expected)
        if chosen.cache_salt not in {None, salt}:
            raise NoSession(f"session {session_id!r} has another cache_salt; give a whole prompt")
        whole = self._checked(Prompt.from_packed(stored + self._packed(suffix_tokens)))
        # Look-up by content finds what the session has lost; a hint would not help it.
        chosen = attrs.evolve(chosen, cache_salt=salt, parent_key=None)
        request = self._request(whole, chosen, continues=True, is_streamed=True)
        return self._stream(request, goes_on_from=stored)

    def end_session(self, session_id: Hashable) -> None:
        """Forget a session. Idempotent, unknown is a no-op; a turn that runs ends as usual."""
        self._worker.end_session(session_id)

    def reset_session(self, session_id: Hashable) -> bool:
        """Forget a session and drop its state; a turn that runs ends with EngineReset.

        False for an unknown session.
        """
        self._check_open()
        return self._worker.reset_session(session_id)

    # ------------------------------------------------------------------- inside

    def _request(
        self,
        prompt: Prompt,
        options: RequestOptions,
        *,
        generates: bool = True,
        continues: bool = False,
        is_streamed: bool = False,
    ) -> Request:
        limit = self._parts.context_size
        if len(prompt) >= limit + (not generates):
            raise PromptTooLong(len(prompt), limit)
        if options.logprobs is not None and not isinstance(self._parts.context, TellsLogits):
            raise NotSupported(
                f"the backend {self._parts.backend_name!r} of model {self.id!r} gives no "
                "log-probabilities"
            )
        new_sampler = sampler_maker(
            self._backend, self._parts.backend_name, options, self._parts.reply.markers(options)
        )
        pipeline = self._parts.reply.pipeline(self.id, self._backend.vocabulary, prompt, options)
        return Request(
            next(_request_ids),
            prompt,
            options,
            model=self.id,
            context_size=limit,
            new_sampler=new_sampler,
            pipeline=pipeline,
            generates=generates,
            continues=continues,
            is_streamed=is_streamed,
            on_answer=None if self._parts.tell_finished is None else self._answered,
        )

    def _answered(self, request: Request, outcome: Stats | Exception) -> None:
        tell = self._parts.tell_finished
        assert tell is not None
        if isinstance(outcome, Exception):
            stats, error = getattr(outcome, "stats", None), outcome
        else:
            stats, error = outcome, None
        tell(RequestFinished(model_id=self.id, request_id=request.id, stats=stats, error=error))

    def cancel(self, request_id: int) -> bool:
        """End a request at its next token, by its stream's ``request_id``; whether it runs."""
        return self._worker.cancel_id(request_id)

    def _stream(self, request: Request, goes_on_from: bytes | None = None) -> Stream:
        worker = self._worker
        try:
            worker.submit(request, goes_on_from)
        except BaseException:
            request.sampler.close()
            raise
        return Stream(
            request.id,
            request.mailbox,
            cancel=lambda: worker.cancel(request),
            context_tokens=lambda: request.context_tokens,
        )

    def why(self, prompt: PromptLike, *, cache_salt: str | None = None) -> Explanation:
        """What a greedy request with this prompt would reuse now, and why not more.

        Nothing is computed, loaded or counted as a hit.
        """
        self._check_open()
        whole = self._as_prompt(prompt, RequestOptions(cache_salt=cache_salt))
        finding, kv_class = self._worker.examine(whole, cache_salt)
        reused = finding.reusable_tokens
        if finding.gate is not None:
            reused -= finding.gate.withheld_tokens
        kind: HitKind = "cold" if not reused else "exact" if reused == len(whole) else "partial"
        return explain(
            finding,
            self._backend.vocabulary,
            kv_class,
            kind=kind,
            reused_tokens=reused,
            saving=self._worker.shortfall(len(whole)),
        )

    # ---------------------------------------------------------------- adapters

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        scale: float = 1.0,
        timeout_s: float | None = None,
        withdrawal: Withdrawal | None = None,
    ) -> AdapterInfo:
        """Load a LoRA adapter, under its file's name if not under another, and use it.

        Requests that run end with the adapters that they began with; those that come or wait
        run with this one too. Returns when it is in effect. ``timeout_s``: seconds that the
        requests that run have to end, None for any time. ``withdrawal``: takes the change back, for
        coroutines. Raises AdapterLoadError, AlreadyLoaded,
        NotSupported, AdapterTimeout, EngineClosed; nothing was changed then.
        """
        self._check_open()
        check_is_new(adapter_name(Path(path), name), self._worker.adapters)
        adapter = open_adapter(
            self._backend,
            self._parts.backend_name,
            path,
            name=name,
            scale=scale,
            memory=self._parts.memory,
        )
        try:
            self._worker.change_adapters(functools.partial(added, adapter), timeout_s, withdrawal)
        except BaseException:
            # An interrupt does not take back what is in effect by then.
            if all(one.weights is not adapter.weights for one in self._worker.adapters):
                adapter.close()
            raise
        return adapter.info

    def unload_adapter(
        self,
        name: str,
        *,
        timeout_s: float | None = None,
        withdrawal: Withdrawal | None = None,
    ) -> None:
        """Go on without an adapter, and free it; like :meth:`load_adapter` when requests run.

        Raises AdapterNotFound, AdapterTimeout, EngineClosed.
        """
        self._check_open()
        self._worker.change_adapters(functools.partial(removed, name), timeout_s, withdrawal)

    def set_adapter_scale(
        self,
        name: str,
        scale: float,
        *,
        timeout_s: float | None = None,
        withdrawal: Withdrawal | None = None,
    ) -> None:
        """Have an adapter work more or less; like :meth:`load_adapter` when requests run.

        Raises AdapterNotFound, AdapterTimeout, EngineClosed; AdapterLoadError when the model
        computes no numbers with that scale.
        """
        self._check_open()
        as_scale(scale)
        self._worker.change_adapters(functools.partial(scaled, name, scale), timeout_s, withdrawal)

    def list_adapters(self) -> list[AdapterInfo]:
        """The adapters in effect, in the order in which they were loaded; waits for nobody."""
        return [one.info for one in self._worker.adapters]

    # ----------------------------------------------------------- text and tokens

    def tokenize(
        self, text: str, *, add_bos: bool | None = None, parse_special: bool = True
    ) -> Prompt:
        """The tokens of a text, BOS first where the model asks for it (``add_bos`` None).

        ``parse_special``: the text of a control token is that token.
        """
        self._check_open()
        vocabulary = self._backend.vocabulary
        packed = vocabulary.tokenize(
            text,
            add_bos=vocabulary.add_bos if add_bos is None else add_bos,
            parse_special=parse_special,
        )
        return Prompt.from_packed(packed, text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens included; bytes that are not UTF-8 as U+FFFD."""
        self._check_open()
        if not len(tokens):
            return ""
        prompt = self._checked(tokens)
        return self._backend.vocabulary.detokenize(prompt.packed).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        **variables: Any,
    ) -> Prompt:
        """A chat as the model's own template renders it.

        The characters of a control token in a user's or a tool's message stay ordinary text.
        ``variables`` reach the template by name. An assistant's message with an id that a turn
        was kept under (:meth:`put_replay`) is that turn, token by token: ``replay``, or the ids
        of its tool calls, or the signature of its thinking; ``cache_salt`` must be the one that
        it was kept with. Raises TemplateError, also for a template that would use up too much, and
        InvalidPrompt for text with a lone surrogate.
        """
        self._check_open()
        vocabulary = self._backend.vocabulary
        template = check_chat(self._parts.chat_template, messages)
        replays = Replays(self._worker.space, vocabulary).of_messages(messages, cache_salt)
        render = functools.partial(
            render_chat,
            vocabulary,
            template,
            messages,
            tools=tools,
            documents=documents,
            variables=variables,
            replays=replays,
        )
        prompt = render(add_generation_prompt=add_generation_prompt)
        if add_generation_prompt and self._parts.context.kv_class is not KVClass.SPAN:
            prompt = with_opening(prompt, lambda: render(add_generation_prompt=False))
        if not replays and prompt.text is not None:
            given = {**variables, "tools": tools, "documents": documents}
            self._append_only.look(
                messages,
                prompt.text,
                lambda part, asks: render_text(
                    vocabulary, template, part, given, add_generation_prompt=asks
                ),
                given,
            )
        return prompt

    # ------------------------------------------------------------------- replay

    def put_replay(
        self,
        ids: str | Sequence[str],
        completion: Completion,
        *,
        cache_salt: str | None = None,
    ) -> bool:
        """Keep a turn under an id, or several, for :meth:`apply_chat_template` to put in place.

        ``completion``: what this model replied. Kept in the model's tiers, and found by every
        process that shares one, also after a restart. Keeping the same again is harmless. False
        when no tier had room for it. Ids are strings of 1 to 1,024 characters; whoever knows one
        can have the turn put into a prompt, so let ids be unguessable, or use ``cache_salt``.
        May wait for a tier. Raises ValueError for an id that stands for another turn, and for a
        turn without tokens.
        """
        self._check_open()
        if completion.generated:
            self._checked(completion.context_tokens)
        replays = Replays(self._worker.space, self._backend.vocabulary)
        return replays.put(ids, completion, cache_salt)

    def get_replay(self, replay_id: str, *, cache_salt: str | None = None) -> Replay | None:
        """The turn that is kept under an id; None when there is none. May wait for a tier."""
        self._check_open()
        replays = Replays(self._worker.space, self._backend.vocabulary)
        return replays.get([replay_id], cache_salt).get(replay_id)

    def drop_replay(self, replay_id: str, *, cache_salt: str | None = None) -> None:
        """Forget a turn; unknown is a no-op. May wait for a tier.

        Raises CacheError when a tier could not delete it: it may come back from there.
        """
        self._check_open()
        Replays(self._worker.space, self._backend.vocabulary).drop(replay_id, cache_salt)

    def embed(self, prompt: PromptLike) -> list[float]:
        """One vector for a text. Raises NotSupported when the backend makes none."""
        self._check_open()
        if not isinstance(self._backend, Embeds):
            raise NotSupported(
                f"the backend {self._parts.backend_name!r} of model {self.id!r} makes no embeddings"
            )
        return list(self._backend.embed(self._as_prompt(prompt, RequestOptions()).packed))

    # ------------------------------------------------------------------- others

    def info(self) -> ModelInfo:
        """What the model is, and what it is doing, without waiting for its worker."""
        parts, context = self._parts, self._parts.context
        return ModelInfo(
            id=self.id,
            backend=parts.backend_name,
            description=parts.backend.description,
            status=self._worker.status,
            context_size=parts.context_size,
            n_ctx=context.n_ctx,
            n_seq_max=context.n_seq_max,
            available_seqs=self._worker.available_seqs,
            pinned_idle_seqs=self._worker.pinned_idle_seqs,
            prefill_tokens_per_s=self._worker.rates[0],
            decode_tokens_per_s=self._worker.rates[1],
            preemptions=self._worker.preemptions,
            quarantined_contexts=self._worker.quarantined,
            kv_class=context.kv_class.value,
            n_vocab=parts.backend.vocabulary.n_tokens,
            fingerprint=parts.fingerprint.hex(),
            quant_type=parts.quantisation.type,
            quant_bits=parts.quantisation.bits,
            tiers=parts.tiers,
        )

    def phase(self) -> Phase:
        """What the worker is doing, without waiting for it."""
        return self._worker.status

    def pending_len(self) -> int:
        """Requests that wait for a sequence, without waiting for the worker."""
        return self._worker.pending_len

    def queue_depth(self) -> int:
        """Streams that have not ended, without waiting for the worker."""
        return self._worker.queue_depth

    def last_cache_hit(self) -> CacheHit | None:
        """What the request admitted last found; None before the first."""
        return self._worker.last_hit

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until answered requests have handed their state over; False when time ran out."""
        return self._worker.settle(timeout_s)

    def set_policy(self, policy: SavePolicy) -> None:
        """Go by another save policy, from the next step on; for the engine.

        Of :data:`LIVE_POLICY` alone: the others must be what they were.
        """
        self._worker.set_policy(policy)

    def drop_residents(self, timeout_s: float = 0.0, *, save: bool = True) -> int:
        """See :meth:`Worker.drop_residents`."""
        return self._worker.drop_residents(timeout_s, save=save)

    @property
    def tiers(self) -> tuple[str, ...]:
        """The names of its tiers, nearest first."""
        return self._parts.tiers

    @property
    def last_used_s(self) -> float:
        """When a request came or ended last, or it was loaded; on the monotonic clock."""
        return self._worker.last_used_s

    def stop_if_idle(self) -> bool:
        """Take no more requests, if none runs or waits; for the engine, which closes it then."""
        return self._worker.stop_if_idle()

    def unload(self) -> None:
        """End its requests with EngineClosed and free it. Idempotent."""
        self._unload(self)

    def close(self) -> None:
        """What :meth:`unload` does, without telling the engine; for the engine. Idempotent."""
        self._closed = True
        self._worker.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed(f"model {self.id!r} was unloaded")
        if os.getpid() != self._pid:
            raise EngineClosed(
                f"model {self.id!r} was loaded before the process forked, and its worker is the "
                "parent's; load it after the fork"
            )

    def _as_prompt(self, prompt: PromptLike, options: RequestOptions) -> Prompt:
        if isinstance(prompt, str):
            return self._checked(
                self.tokenize(prompt, add_bos=options.add_bos, parse_special=options.parse_special)
            )
        return self._checked(prompt)

    @staticmethod
    def _packed(tokens: Sequence[int]) -> bytes:
        try:
            return tokens.packed if isinstance(tokens, Prompt) else pack(tokens)
        except ValueError as error:
            raise InvalidPrompt(f"not a prompt: {error}") from error

    def _checked(self, tokens: Sequence[int]) -> Prompt:
        """Tokens that the vocabulary has: no others reach a backend."""
        packed = self._packed(tokens)
        prompt = tokens if isinstance(tokens, Prompt) else Prompt.from_packed(packed)
        if not len(prompt):
            raise InvalidPrompt("the prompt has no tokens")
        largest = max(memoryview(prompt.packed).cast("I"))
        n_tokens = self._backend.vocabulary.n_tokens
        if largest >= n_tokens:
            raise InvalidPrompt(
                f"token id {largest} is outside the vocabulary of model {self.id!r}, "
                f"whose ids are 0 to {n_tokens - 1}"
            )
        return prompt


ModelRef = str | Model
"""A loaded model, or its id."""
