"""A grammar of llama.cpp's, asked before it is told anything.

``llama_sampler_accept`` of a token that does not fit throws through the C interface, which ends
the process: every token that is accepted here was allowed before.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llama_cpp import llama_cpp

from erllama_backend_llama import native
from erllama_backend_llama.candidates import Candidates, array_of
from erllama_backend_llama.vocabulary import LlamaVocabulary
from erllama_core.errors import EngineClosed, InvalidGrammar
from erllama_core.interfaces.backend import Constraint

_MOST_SECONDS: Final = 1.0
"""That one token may take; a usual one takes microseconds. The reader in the core turns down
grammars that multiply the places at which a reply can stand, as far as it can tell."""


class LlamaGrammar:
    """How far a reply has come in a grammar. Owns its native sampler, which ``close`` frees.

    Made on any thread, used by one. Raises InvalidGrammar when llama.cpp refuses the grammar.
    """

    # Kept on the class: module globals may be gone when the interpreter ends.
    _free = staticmethod(llama_cpp.llama_sampler_free)

    def __init__(self, vocabulary: LlamaVocabulary, constraint: Constraint) -> None:
        self._sampler: Any = None
        self._piece: Final[Callable[[int], bytes]] = vocabulary.piece
        self._whole: Final = vocabulary.has_whole_characters
        self._ends: Final = vocabulary.end_of_generation
        self._excluded: Final = constraint.excluded
        self._excluded_ids: Final = np.fromiter(constraint.excluded, dtype=np.int32)
        self._pending = b""
        """The first bytes of a character that the reply has not all of."""
        text = constraint.grammar.text.encode()
        if not text.strip() or b"\0" in text:  # which llama.cpp takes for no grammar at all
            raise InvalidGrammar("llama.cpp refuses the grammar: it is empty, or has a NUL")
        with native.collect_log() as lines:
            self._sampler = vocabulary.with_native(
                lambda vocab: llama_cpp.llama_sampler_init_grammar(vocab, text, b"root")
            )
        if not self._sampler:
            raise InvalidGrammar(
                f"llama.cpp refuses the grammar: {native.reason(lines) or 'without a reason'}"
            )
        self._one: Final = llama_cpp.llama_token_data()
        self._array: Final = llama_cpp.llama_token_data_array(
            data=ctypes.pointer(self._one), size=1, selected=-1, sorted=False
        )

    def allows(self, token: int) -> bool:
        """Whether the reply may go on with the token, or end if it is one that ends it."""
        if token in self._excluded or not self._is_text(token):
            return False
        one = self._one
        one.id = token  # type: ignore[assignment]  # ctypes fields take plain numbers
        one.logit = 0.0
        self._apply(self._array)
        return bool(one.logit == 0.0)

    def allowed(self, candidates: Candidates) -> Candidates:
        """Those that fit, in the same order."""
        tried = candidates.copy()
        self._apply(array_of(tried))
        fits = np.isfinite(tried["logit"])
        if self._excluded_ids.size:
            fits &= ~np.isin(tried["id"], self._excluded_ids)
        fitting: Candidates = tried[fits]
        # Within a character few fit; elsewhere few are not whole characters.
        unsure = np.ones(fitting.size, bool) if self._pending else ~self._whole[fitting["id"]]
        is_text = np.ones(fitting.size, dtype=np.bool_)
        is_text[unsure] = [self._is_text(token) for token in fitting["id"][unsure].tolist()]
        texts: Candidates = fitting[is_text]
        return texts

    def accept(self, token: int) -> None:
        """The reply goes on with a token that was allowed."""
        if token in self._ends:
            return
        began = time.perf_counter()
        llama_cpp.llama_sampler_accept(self._native, token)
        self._check_pace(began)
        data = self._pending + self._piece(token)
        self._pending = _cut_off(data)

    def close(self) -> None:
        """Free it. Idempotent."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            self._free(sampler)

    def __del__(self) -> None:
        self.close()

    @property
    def _native(self) -> Any:
        if self._sampler is None:
            raise EngineClosed("the sampler was closed; its request has ended")
        return self._sampler

    def _apply(self, array: Any) -> None:
        began = time.perf_counter()
        llama_cpp.llama_sampler_apply(self._native, ctypes.byref(array))
        self._check_pace(began)

    @staticmethod
    def _check_pace(began: float) -> None:
        taken = time.perf_counter() - began
        if taken > _MOST_SECONDS:
            raise InvalidGrammar(
                f"the grammar is too ambiguous: following one token took {taken:.1f} s"
            )

    def _is_text(self, token: int) -> bool:
        """Whether the reply stays UTF-8 with the token, which llama.cpp does not see to.

        It takes the bytes within a token as they come, overlong forms among them. ASCII within a
        character, or the end of the reply there, it does turn down.
        """
        data = self._piece(token)
        if token in self._ends or data.isascii():
            return True
        try:
            (self._pending + data).decode()
        except UnicodeDecodeError as error:
            at_end = error.end == len(self._pending) + len(data)
            return at_end and error.reason == "unexpected end of data"
        return True


def _cut_off(data: bytes) -> bytes:
    """The bytes of a character at the end that is not whole."""
    if data.isascii():
        return b""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data[error.start :]
    return b""
