"""What a vocabulary promises: tests of the kit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from erllama_core.conformance.backend.driving import unpack
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.interfaces.backend import BackendModel


class VocabularyPromises(BackendKit):
    """What a vocabulary promises."""

    def test_text_survives_the_vocabulary(
        self, subject: BackendSubject, model: BackendModel
    ) -> None:
        """A text that is tokenised and detokenised is the same text.

        A space in front, which some vocabularies add, is let pass.

        If this fails: prompts reach the model changed.
        """
        vocabulary = model.vocabulary
        packed = vocabulary.tokenize(subject.text, add_bos=False, parse_special=False)
        assert isinstance(packed, bytes)
        assert all(token < vocabulary.n_tokens for token in unpack(packed))
        text = vocabulary.detokenize(packed).decode()
        assert text in (subject.text, f" {subject.text}")
        assert vocabulary.detokenize(memoryview(packed)) == text.encode()
        assert vocabulary.tokenize("", add_bos=False, parse_special=False) == b""
        assert vocabulary.detokenize(b"") == b""

    def test_pieces_make_the_text(self, subject: BackendSubject, model: BackendModel) -> None:
        """The bytes that tokens append to a reply, joined, are their text.

        If this fails: streamed replies lose bytes, mostly those of characters in several tokens.
        """
        vocabulary = model.vocabulary
        packed = vocabulary.tokenize(subject.text, add_bos=False, parse_special=False)
        pieces = b"".join(map(vocabulary.piece, unpack(packed)))
        assert pieces.lstrip(b" ") == vocabulary.detokenize(packed).lstrip(b" ")

    def test_every_token_has_a_piece(self, model: BackendModel) -> None:
        """All ids from 0 to n_tokens - 1 can be asked for, control tokens too.

        If this fails: a rare token ends a request, or the load of the model.
        """
        vocabulary = model.vocabulary
        assert vocabulary.n_tokens > 0
        assert all(isinstance(vocabulary.piece(n), bytes) for n in range(vocabulary.n_tokens))
        special = {*vocabulary.end_of_generation, *vocabulary.control_tokens}
        if vocabulary.bos is not None:
            special.add(vocabulary.bos)
        assert all(0 <= token < vocabulary.n_tokens for token in special)

    def test_control_tokens_are_parsed_on_request_only(self, model: BackendModel) -> None:
        """The text of a control token is that token with ``parse_special``, else ordinary text.

        If this fails: a user who types ``<|im_end|>`` ends the system's message.
        """
        vocabulary = model.vocabulary
        for token, text in list(vocabulary.control_tokens.items())[:20]:
            typed = vocabulary.tokenize(f"a{text}b", add_bos=False, parse_special=False)
            assert not set(unpack(typed)) & set(vocabulary.control_tokens), text
            parsed = vocabulary.tokenize(f"a{text}b", add_bos=False, parse_special=True)
            assert token in unpack(parsed), text

    def test_bos_comes_first_and_once(self, subject: BackendSubject, model: BackendModel) -> None:
        """``add_bos`` puts it in front, unless the text has it already.

        If this fails: every key differs from the one under which the prompt was stored, or the
        model reads a doubled BOS.
        """
        vocabulary = model.vocabulary
        bos = vocabulary.bos
        if bos is None:
            assert not vocabulary.add_bos
            return
        without = vocabulary.tokenize(subject.text, add_bos=False, parse_special=True)
        with_bos = vocabulary.tokenize(subject.text, add_bos=True, parse_special=True)
        assert unpack(with_bos) == [bos, *unpack(without)]
        text = vocabulary.control_tokens.get(bos)
        if text is not None:
            given = vocabulary.tokenize(text + subject.text, add_bos=True, parse_special=True)
            assert unpack(given).count(bos) == 1

    def test_the_vocabulary_is_for_many_threads(
        self, subject: BackendSubject, model: BackendModel
    ) -> None:
        """Threads that tokenise at once get what each would alone.

        If this fails: callers' prompts are mixed up, as tokenising is done on their threads.
        """
        vocabulary = model.vocabulary
        texts = [subject.text[number % 7 :] * (1 + number % 3) for number in range(40)]

        def tokenize(text: str) -> bytes:
            return vocabulary.tokenize(text, add_bos=False, parse_special=False)

        alone = [tokenize(text) for text in texts]
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(tokenize, texts)) == alone
