"""The vocabulary: 256 bytes and the control tokens of a chat.

Packed little-endian u32 tokens are the UTF-32-LE encoding of a string with one character per
token, since every id here is a character below U+0200. Both directions are thus codecs that
run in C, and searching tokens is searching that string. A string of this kind is called a
*tape* here.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Final

import attrs

from erllama_core.errors import InvalidPrompt
from erllama_core.interfaces.backend import PackedTokens

_TAPE: Final = "utf-32-le"

BOS: Final = 256
EOS: Final = 257
PAD: Final = 258
IM_START: Final = 259
IM_END: Final = 260
THINK: Final = 261
THINK_END: Final = 262
TOOL_CALL: Final = 263
TOOL_CALL_END: Final = 264
N_TOKENS: Final = 265
"""Of a vocabulary without digraphs: the tokens that have logits."""

DIGRAPHS: Final = ("th", "in", "on", "ou", "ng", "wh", "ll", "ea")
"""Two letters in one token, ids from N_TOKENS on. None is in the name of a chat's role."""

_CONTROL: Final[Mapping[int, str]] = types.MappingProxyType(
    {
        BOS: "<|bos|>",
        EOS: "<|eos|>",
        PAD: "<|pad|>",
        IM_START: "<|im_start|>",
        IM_END: "<|im_end|>",
        THINK: "<think>",
        THINK_END: "</think>",
        TOOL_CALL: "<tool_call>",
        TOOL_CALL_END: "</tool_call>",
    }
)
_CONTROL_IDS: Final = {text: chr(token) for token, text in _CONTROL.items()}
_CONTROL_TEXT: Final = re.compile("|".join(map(re.escape, _CONTROL_IDS)))
_PIECES: Final = tuple(
    bytes((token,)) if token < BOS else _CONTROL[token].encode() for token in range(N_TOKENS)
)
_DIGRAPH_TEXT: Final = re.compile("|".join(DIGRAPHS))
_DIGRAPH_IDS: Final = {text: chr(N_TOKENS + number) for number, text in enumerate(DIGRAPHS)}
_ALL_PIECES: Final = _PIECES + tuple(text.encode() for text in DIGRAPHS)
_TEXTS: Final[Mapping[int, str]] = types.MappingProxyType(
    {**_CONTROL, **{ord(token): text for text, token in _DIGRAPH_IDS.items()}}
)
_END_OF_GENERATION: Final = frozenset({EOS, IM_END})


def tape_of(text: str, *, parse_special: bool) -> str:
    """The tape of a text. Raises InvalidPrompt for text that UTF-8 cannot express."""
    try:
        tape = text.encode().decode("latin-1")
    except UnicodeEncodeError as error:
        raise InvalidPrompt(
            f"the text is not valid Unicode: a lone surrogate at index {error.start}"
        ) from error
    if parse_special:
        # Control tokens' text is ASCII, so it is found among the bytes as it is in the text.
        return _CONTROL_TEXT.sub(lambda match: _CONTROL_IDS[match[0]], tape)
    return tape


def size_of_vocabulary(*, digraphs: bool) -> int:
    """Ids that may occur in a context."""
    return N_TOKENS + (len(DIGRAPHS) if digraphs else 0)


def tape_from_tokens(tokens: PackedTokens, n_tokens: int = N_TOKENS) -> str:
    """The tape of packed tokens. Raises InvalidPrompt for ids outside the vocabulary."""
    if len(tokens) % 4:
        raise InvalidPrompt(f"{len(tokens)} bytes are not packed u32 tokens")
    try:
        tape = str(tokens, _TAPE)
    except UnicodeDecodeError as error:
        token = int.from_bytes(error.object[error.start : error.start + 4], "little")
        raise _outside(token, n_tokens) from error
    if tape and ord(top := max(tape)) >= n_tokens:
        raise _outside(ord(top), n_tokens)
    return tape


def _outside(token: int, n_tokens: int) -> InvalidPrompt:
    return InvalidPrompt(f"token {token} is outside the vocabulary of {n_tokens}")


@attrs.frozen
class StubVocabulary:
    """Ids 0 to 255 are the bytes; control tokens follow. Any text round-trips.

    With ``digraphs`` some pairs of letters are tokens too: a text is then tokenised in another
    way than a model says it, which says letter after letter.
    """

    add_bos: bool = False
    digraphs: bool = False

    @property
    def n_tokens(self) -> int:
        return size_of_vocabulary(digraphs=self.digraphs)

    @property
    def bos(self) -> int | None:
        return BOS

    @property
    def end_of_generation(self) -> frozenset[int]:
        return _END_OF_GENERATION

    @property
    def control_tokens(self) -> Mapping[int, str]:
        return _CONTROL

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> bytes:
        """See the protocol. Raises InvalidPrompt for text that UTF-8 cannot express."""
        tape = tape_of(text, parse_special=parse_special)
        if self.digraphs:
            tape = _DIGRAPH_TEXT.sub(lambda match: _DIGRAPH_IDS[match[0]], tape)
        if add_bos and not tape.startswith(chr(BOS)):
            tape = chr(BOS) + tape
        return tape.encode(_TAPE)

    def detokenize(self, tokens: PackedTokens) -> bytes:
        """See the protocol. Raises InvalidPrompt for ids outside the vocabulary."""
        tape = tape_from_tokens(tokens, self.n_tokens)
        try:
            return tape.encode("latin-1")
        except UnicodeEncodeError:
            return tape.translate(_TEXTS).encode("latin-1")

    def piece(self, token: int) -> bytes:
        """The byte, or a control token's text. Raises IndexError for ids beyond the vocabulary."""
        return (_ALL_PIECES if self.digraphs else _PIECES)[token]


VOCABULARY: Final = StubVocabulary()
"""The vocabulary of a model with default options."""
