"""A model's calls, by its id: what an engine passes on to the model that it means."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Unpack

from erllama_core.model.model import Model, ModelRef, PromptLike
from erllama_core.model.options import ReplyKwargs, RequestKwargs
from erllama_core.prompt import Prompt
from erllama_core.results import (
    AdapterInfo,
    CacheHit,
    CacheKey,
    Completion,
    Explanation,
    ModelInfo,
    Phase,
    Prefill,
    Replay,
)
from erllama_core.stream.stream import Stream


class ModelCalls(ABC):
    """The methods of :class:`Model` with a model, or its id, as their first argument.

    They raise ModelNotFound and EngineClosed besides what the model's raise.
    """

    @abstractmethod
    def _resolve(self, model: ModelRef) -> Model:
        """A loaded model. Raises ModelNotFound, EngineClosed."""

    @abstractmethod
    def _find(self, model: ModelRef) -> Model | None:
        """A loaded model; None for an unknown one, also when the engine is closed."""

    # ---------------------------------------------------- what a model is doing

    def phase(self, model: ModelRef) -> Phase:
        """What a model is doing, without waiting for it; an unknown one is idle."""
        found = self._find(model)
        return "idle" if found is None else found.phase()

    def pending_len(self, model: ModelRef) -> int:
        """Requests that wait for a sequence of a model; 0 for an unknown one."""
        found = self._find(model)
        return 0 if found is None else found.pending_len()

    def last_cache_hit(self, model: ModelRef) -> CacheHit | None:
        """What the request found that a model admitted last; None before, or if unknown."""
        found = self._find(model)
        return None if found is None else found.last_cache_hit()

    def model_info(self, model: ModelRef) -> ModelInfo:
        """One loaded model. Raises ModelNotFound."""
        return self._resolve(model).info()

    # ----------------------------------------------------------------- requests

    def complete(
        self, model: ModelRef, prompt: PromptLike, **options: Unpack[RequestKwargs]
    ) -> Completion:
        """See :meth:`Model.complete`."""
        return self._resolve(model).complete(prompt, **options)

    def infer(
        self, model: ModelRef, prompt: PromptLike, **options: Unpack[RequestKwargs]
    ) -> Stream:
        """See :meth:`Model.infer`."""
        return self._resolve(model).infer(prompt, **options)

    def prefill_only(
        self,
        model: ModelRef,
        prompt: PromptLike,
        *,
        parent_key: CacheKey | None = None,
        cache_salt: str | None = None,
        pin: bool = False,
    ) -> Prefill:
        """See :meth:`Model.prefill_only`."""
        return self._resolve(model).prefill_only(
            prompt, parent_key=parent_key, cache_salt=cache_salt, pin=pin
        )

    def continue_session(
        self,
        model: ModelRef,
        suffix_tokens: Sequence[int],
        *,
        session_id: Hashable,
        expect_committed: Sequence[int] | None = None,
        **options: Unpack[ReplyKwargs],
    ) -> Stream:
        """See :meth:`Model.continue_session`."""
        return self._resolve(model).continue_session(
            suffix_tokens, session_id=session_id, expect_committed=expect_committed, **options
        )

    def end_session(self, model: ModelRef, session_id: Hashable) -> None:
        """See :meth:`Model.end_session`; an unknown model is a no-op too."""
        found = self._find(model)
        if found is not None:
            found.end_session(session_id)

    def reset_session(self, model: ModelRef, session_id: Hashable) -> bool:
        """See :meth:`Model.reset_session`."""
        return self._resolve(model).reset_session(session_id)

    def why(
        self, model: ModelRef, prompt: PromptLike, *, cache_salt: str | None = None
    ) -> Explanation:
        """See :meth:`Model.why`."""
        return self._resolve(model).why(prompt, cache_salt=cache_salt)

    # ----------------------------------------------------------------- adapters

    def load_adapter(
        self,
        model: ModelRef,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        scale: float = 1.0,
        timeout_s: float | None = None,
    ) -> AdapterInfo:
        """See :meth:`Model.load_adapter`."""
        return self._resolve(model).load_adapter(path, name=name, scale=scale, timeout_s=timeout_s)

    def unload_adapter(self, model: ModelRef, name: str, *, timeout_s: float | None = None) -> None:
        """See :meth:`Model.unload_adapter`."""
        self._resolve(model).unload_adapter(name, timeout_s=timeout_s)

    def set_adapter_scale(
        self, model: ModelRef, name: str, scale: float, *, timeout_s: float | None = None
    ) -> None:
        """See :meth:`Model.set_adapter_scale`."""
        self._resolve(model).set_adapter_scale(name, scale, timeout_s=timeout_s)

    def list_adapters(self, model: ModelRef) -> list[AdapterInfo]:
        """See :meth:`Model.list_adapters`."""
        return self._resolve(model).list_adapters()

    # ---------------------------------------------------------- text and tokens

    def tokenize(
        self,
        model: ModelRef,
        text: str,
        *,
        add_bos: bool | None = None,
        parse_special: bool = True,
    ) -> Prompt:
        """See :meth:`Model.tokenize`."""
        return self._resolve(model).tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, model: ModelRef, tokens: Sequence[int]) -> str:
        """See :meth:`Model.detokenize`."""
        return self._resolve(model).detokenize(tokens)

    def apply_chat_template(
        self,
        model: ModelRef,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        **variables: Any,
    ) -> Prompt:
        """See :meth:`Model.apply_chat_template`."""
        return self._resolve(model).apply_chat_template(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            cache_salt=cache_salt,
            **variables,
        )

    def put_replay(
        self,
        model: ModelRef,
        ids: str | Sequence[str],
        completion: Completion,
        *,
        cache_salt: str | None = None,
    ) -> bool:
        """See :meth:`Model.put_replay`."""
        return self._resolve(model).put_replay(ids, completion, cache_salt=cache_salt)

    def get_replay(
        self, model: ModelRef, replay_id: str, *, cache_salt: str | None = None
    ) -> Replay | None:
        """See :meth:`Model.get_replay`."""
        return self._resolve(model).get_replay(replay_id, cache_salt=cache_salt)

    def drop_replay(
        self, model: ModelRef, replay_id: str, *, cache_salt: str | None = None
    ) -> None:
        """See :meth:`Model.drop_replay`."""
        self._resolve(model).drop_replay(replay_id, cache_salt=cache_salt)

    def embed(self, model: ModelRef, prompt: PromptLike) -> list[float]:
        """See :meth:`Model.embed`."""
        return self._resolve(model).embed(prompt)
