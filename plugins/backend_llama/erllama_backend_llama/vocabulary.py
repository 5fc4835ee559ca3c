"""Tokens and text."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp

from erllama_backend_llama.batch import TOKEN
from erllama_backend_llama.large_stack import SMALL_TEXT_BYTES, check_runs, on_large_stack
from erllama_core.errors import EngineClosed, InvalidPrompt, ModelLoadError
from erllama_core.interfaces.backend import PackedTokens

_T = TypeVar("_T")

_MAX_TEXT_BYTES: Final = 2**31 - 1
"""llama.cpp counts bytes and tokens of a text in an int32."""


class LlamaVocabulary:
    """The vocabulary of a loaded model. Immutable; thread-safe until :meth:`close`.

    Token texts are read once, when the model is loaded, and text is put together from them
    here: llama.cpp's own ``llama_detokenize`` removes the space before a comma for many
    vocabularies (Llama 3 among them), which would make the text of a context something else
    than the pieces that were streamed.
    """

    def __init__(self, model: int) -> None:
        self._changed: Final = threading.Condition()
        self._users = 0
        """Native calls under way."""
        self._vocab: int | None = llama_cpp.llama_model_get_vocab(llama_cpp.llama_model_p(model))
        vocab = self._vocab
        count = llama_cpp.llama_vocab_n_tokens(vocab)
        bos = llama_cpp.llama_vocab_bos(vocab)
        self.n_tokens: Final = count
        self.bos: Final[int | None] = bos if bos >= 0 else None
        self.add_bos: Final = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
        is_eog = llama_cpp.llama_vocab_is_eog
        self.end_of_generation: Final = frozenset(
            token for token in range(count) if is_eog(vocab, token)
        )
        self._pieces: Final = _read_pieces(vocab, count)
        _check_bytes(vocab, self._pieces)
        get_attr = llama_cpp.llama_vocab_get_attr
        # What parse_special turns text into; the unknown token is neither text nor control.
        parsed = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        control = [token for token in range(count) if get_attr(vocab, token) & parsed]
        self.control_tokens: Final[Mapping[int, str]] = MappingProxyType(
            {token: self._pieces[token].decode("utf-8", "replace") for token in control}
        )
        self._is_control = np.zeros(count, dtype=np.bool_)
        self._is_control[control] = True
        # All pieces in one run of bytes, so that text is gathered without a step per token.
        self._text: Final = np.frombuffer(b"".join(self._pieces), dtype=np.uint8)
        self._lengths: Final = np.fromiter(map(len, self._pieces), dtype=np.int64, count=count)
        self._starts: Final = np.cumsum(self._lengths) - self._lengths
        self._adds_space: Final = (
            self._join(self._native_tokens(b"a", parse_special=False)) == b" a"
        )

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> bytes:
        """Packed tokens of ``text``; never an EOS, whatever the model's metadata asks for.

        Raises InvalidPrompt for text with lone surrogates, of 2 GiB and more, or of which,
        without ``parse_special``, a control token would be made all the same: vocabularies
        that merge characters freely (SPM) can do that, and it would let a user forge turns.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidPrompt(
                f"the text cannot be encoded as UTF-8 at character {error.start} "
                f"({error.reason}); remove or replace lone surrogates"
            ) from error
        tokens = self._native_tokens(data, parse_special=parse_special)
        if not parse_special:
            forged = self._is_control[tokens]
            if forged.any():
                token = int(tokens[int(forged.argmax())])
                raise InvalidPrompt(
                    f"this vocabulary makes the control token {self.control_tokens[token]!r} of "
                    f"ordinary text; remove it from the text"
                )
        packed = tokens.astype(TOKEN, copy=False).tobytes()
        if add_bos and self.bos is not None and (not tokens.size or tokens[0] != self.bos):
            packed = self.bos.to_bytes(4, "little") + packed
        return packed

    def detokenize(self, tokens: PackedTokens) -> bytes:
        """The bytes of all pieces, one after another.

        A vocabulary that puts a space before every text (SPM) gets it taken off again, if the
        first piece starts with one. Raises InvalidPrompt for ids outside the vocabulary.
        """
        ids = np.frombuffer(tokens, dtype=TOKEN) if len(tokens) else np.empty(0, TOKEN)
        if ids.size and int(ids.max()) >= self.n_tokens:
            raise InvalidPrompt(
                f"token {int(ids.max())} is outside the vocabulary of {self.n_tokens} tokens"
            )
        text = self._join(ids)
        if self._adds_space and text[:1] == b" " and self._pieces[int(ids[0])][:1] == b" ":
            return text[1:]
        return text

    @functools.cached_property
    def has_whole_characters(self) -> npt.NDArray[np.bool_]:
        """By token, whether its bytes are whole characters of UTF-8."""
        return np.array([_is_text(piece) for piece in self._pieces], dtype=np.bool_)

    def piece(self, token: int) -> bytes:
        if token < 0:
            raise IndexError(f"token {token} is outside the vocabulary of {self.n_tokens} tokens")
        return self._pieces[token]

    def with_native(self, use: Callable[[int], _T]) -> _T:
        """What ``use`` makes of the native vocabulary, which is not freed meanwhile.

        Raises EngineClosed when it is gone.
        """
        with self._in_use() as vocab:
            return use(vocab)

    def close(self) -> None:
        """Forget the native vocabulary, which goes with its model; tokenising then raises
        EngineClosed. Waits for calls that are under way.
        """
        with self._changed:
            self._vocab = None
            self._changed.wait_for(lambda: self._users == 0)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[int]:
        """The native vocabulary, which is not freed meanwhile."""
        with self._changed:
            vocab = self._vocab
            if vocab is None:
                raise EngineClosed("the model was unloaded; load it again to tokenise")
            self._users += 1
        try:
            yield vocab
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _native_tokens(self, data: bytes, *, parse_special: bool) -> npt.NDArray[np.int32]:
        with self._in_use() as vocab:
            if len(data) <= SMALL_TEXT_BYTES:
                return _tokens_of(vocab, data, parse_special=parse_special)
            check_runs(data)
            return on_large_stack(
                functools.partial(_tokens_of, vocab, data, parse_special=parse_special)
            )

    def _join(self, ids: npt.NDArray[Any]) -> bytes:
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        if not ends.size:
            return b""
        # For every byte of the result its place in the run of all pieces: the piece's start
        # there, less the piece's start in the result, plus the byte's own number.
        shift = np.repeat(self._starts[ids] - (ends - lengths), lengths)
        return self._text[shift + np.arange(int(ends[-1]))].tobytes()


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _tokens_of(vocab: int, data: bytes, *, parse_special: bool) -> npt.NDArray[np.int32]:
    if len(data) > _MAX_TEXT_BYTES:
        raise InvalidPrompt(f"the text has {len(data)} bytes; {_MAX_TEXT_BYTES} at most")
    # One token per byte is the most that vocabularies make of a text, and SPM adds a space.
    room = len(data) + 8
    for _ in range(2):
        tokens = np.empty(room, dtype=np.int32)
        written: int = llama_cpp.llama_tokenize(
            vocab,
            data,
            len(data),
            tokens.ctypes.data_as(llama_cpp.llama_token_p),
            room,
            False,
            parse_special,
        )
        if written >= 0:
            return tokens[:written]
        room = -written
        if room > _MAX_TEXT_BYTES:
            break
    raise InvalidPrompt("the text has more tokens than llama.cpp can count; shorten it")


def _check_bytes(vocab: Any, pieces: list[bytes]) -> None:
    """An SPM vocabulary spells what it does not know in bytes; without one of them llama.cpp
    throws through its C interface, which ends the process.
    """
    if llama_cpp.llama_vocab_type(vocab) != llama_cpp.LLAMA_VOCAB_TYPE_SPM:
        return
    known = set(pieces)
    missing = [byte for byte in range(256) if bytes((byte,)) not in known]
    if missing:
        raise ModelLoadError(
            f"the vocabulary (SPM) lacks tokens for {len(missing)} of the 256 bytes, "
            f"0x{missing[0]:02x} for one; the file was converted incompletely"
        )


def _read_pieces(vocab: Any, count: int) -> list[bytes]:
    pieces: list[bytes] = []
    size = 256
    buffer = ctypes.create_string_buffer(size)
    to_piece = llama_cpp.llama_token_to_piece
    for token in range(count):
        length: int = to_piece(vocab, token, buffer, size, 0, True)
        if length < 0:
            size = -length
            buffer = ctypes.create_string_buffer(size)
            length = to_piece(vocab, token, buffer, size, 0, True)
        pieces.append(ctypes.string_at(buffer, length))
    return pieces
