"""A chat, rendered by the model's template and tokenised."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from erllama_core.errors import TemplateError
from erllama_core.interfaces.backend import Vocabulary
from erllama_core.interfaces.log import get_logger
from erllama_core.model.chat_guard import Occurrence, control_syntax, guard_for
from erllama_core.model.chat_turns import StandIns, TurnLost
from erllama_core.prompt import Prompt, pack
from erllama_core.results import Replay

log = get_logger("erllama.model")

Message = Mapping[str, Any]
"""``role`` and ``content``, and whatever else the template knows: ``tool_calls``, ``name``."""

_SPACE: Final = " \t\n\v\f\r"
"""What C's isspace takes for white space, which is what tokenizers strip."""


def render_chat(
    vocabulary: Vocabulary,
    template: str | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    replays: Mapping[int, Replay] | None = None,
) -> Prompt:
    """The prompt for a chat, with its text. Thread-safe; runs on the caller's thread.

    The control tokens that the template writes, and those in the messages of role
    ``assistant``, become control tokens. The same characters in any other message, in
    ``tools`` or in ``documents`` stay ordinary text (see :mod:`.chat_guard` for how, and for
    what a template would have to do to defeat it). ``variables`` reach the template by name,
    as ``enable_thinking`` does; they are the application's words, and trusted.

    Without such characters the prompt is the rendered text, tokenised as a whole. With them
    the text is cut at its true control tokens, and what lies between two is tokenised by
    itself, with no control tokens parsed. That gives what the whole would have given, had the
    typed characters not been special: tokenizers cut a text at the control tokens before they
    do anything else, and no token spans a cut. White space that the vocabulary strips beside
    a control token is stripped here too.

    ``replays``: turns, by the places of the messages that they stand for; where the template
    puts out the message, the turn's own tokens stand instead, and behind what they were drawn
    after. A template that does not put a content out as it is gets none.

    Raises TemplateError when there is no template, when it is broken, when it refuses the
    messages (with its own words), when it would use up too much, and when a message is not one.
    """
    template = check_chat(template, messages)
    chat = {"messages": list(messages), "tools": tools, "documents": documents}
    fixed = _fixed_variables(vocabulary, variables, add_generation_prompt=add_generation_prompt)
    if replays:
        try:
            return _render_with_turns(vocabulary, template, fixed, chat, replays)
        except (TurnLost, TemplateError) as error:
            log.debug("replay.not_placed", reason=str(error))
    text, controls = _render(vocabulary, template, fixed, chat)
    return Prompt.from_packed(_tokenize(vocabulary, text, controls), text)


def check_chat(template: str | None, messages: Sequence[Message]) -> str:
    """The template, when it is one and the messages are. Raises TemplateError."""
    if not template or not template.strip():
        raise TemplateError(
            "the model has no chat template; give one with the model option chat_template"
        )
    _check_messages(messages)
    return template


def render_text(
    vocabulary: Vocabulary,
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """The text alone, whoever typed what. ``variables``: tools and documents, too."""
    from erllama_core.model.chat_template import compile_template, render_template

    fixed = _fixed_variables(vocabulary, variables, add_generation_prompt=add_generation_prompt)
    return render_template(compile_template(template), {**fixed, "messages": list(messages)})


def _fixed_variables(
    vocabulary: Vocabulary, variables: Mapping[str, Any] | None, *, add_generation_prompt: bool
) -> dict[str, Any]:
    """What a template gets besides the chat."""
    return {
        **_token_texts(vocabulary),
        **(variables or {}),
        "add_generation_prompt": add_generation_prompt,
    }


def _render(
    vocabulary: Vocabulary, template: str, fixed: Mapping[str, Any], chat: Mapping[str, Any]
) -> tuple[str, list[Occurrence] | None]:
    """The text, and where its control tokens are; None: wherever they seem to be."""
    # Jinja is loaded by those who render chats.
    from erllama_core.model.chat_template import compile_template, render_template

    compiled = compile_template(template)
    plain = render_template(compiled, {**fixed, **chat})
    syntax = control_syntax(vocabulary.control_tokens)
    guard = guard_for(syntax, chat, template + plain)
    if guard is None:
        return plain, None

    guarded = render_template(compiled, {**fixed, **guard.protect(chat)})
    genuine = syntax.find(guarded)
    text = guard.restore(guarded)
    if len(text) == len(plain) and text.lower() == plain.lower():
        # The two differ at most where the template changed the case of a stand-in.
        text = plain
    return text, None if syntax.find(text) == genuine else genuine


def _render_with_turns(
    vocabulary: Vocabulary,
    template: str,
    fixed: Mapping[str, Any],
    chat: Mapping[str, Any],
    replays: Mapping[int, Replay],
) -> Prompt:
    """Raises TurnLost when the template does not put every turn in one place."""
    stood_in = StandIns(template, chat, replays)
    text, controls = _render(vocabulary, template, fixed, stood_in.chat)
    syntax = control_syntax(vocabulary.control_tokens)
    texts: list[str] = []
    packed: list[bytes] = []
    for part in stood_in.parts(text, controls, vocabulary, syntax):
        texts.append(part.text)
        packed.append(_tokenize(vocabulary, part.text, part.controls, is_first=not packed))
        if part.turn is not None:
            texts.append(part.turn.data.decode("utf-8", "replace"))
            packed.append(pack(part.turn.generated))
    return Prompt.from_packed(b"".join(packed), "".join(texts))


def _check_messages(messages: object) -> None:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise TemplateError("messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(
                f"messages[{index}] must be a mapping with a role and a content, "
                f"not {type(message).__name__}"
            )
        if not isinstance(message.get("role"), str):
            raise TemplateError(
                f"messages[{index}] must have a role that is a string, "
                f"such as 'user'; it has {reprlib.repr(message.get('role'))}"
            )


def _token_texts(vocabulary: Vocabulary) -> dict[str, str]:
    """``bos_token`` and ``eos_token``, as templates know them.

    Of several tokens that end a reply the first one stands for ``eos_token``; a template that
    relies on another gets it from ``variables``.
    """
    controls = vocabulary.control_tokens
    texts = {}
    if vocabulary.bos is not None:
        texts["bos_token"] = controls.get(vocabulary.bos, "")
    ends = sorted(vocabulary.end_of_generation)
    if ends:
        texts["eos_token"] = controls.get(ends[0], "")
    return texts


def _tokenize(
    vocabulary: Vocabulary,
    text: str,
    controls: list[Occurrence] | None,
    *,
    is_first: bool = True,
) -> bytes:
    """Packed tokens of a text, or of a part of one. ``controls``: see :func:`_render`."""
    add_bos = vocabulary.add_bos and is_first
    if controls is not None:
        return _tokenize_between(vocabulary, text, controls, add_bos=add_bos)
    if not text and not is_first:
        return b""
    return vocabulary.tokenize(text, add_bos=add_bos, parse_special=True)


def _tokenize_between(
    vocabulary: Vocabulary, text: str, controls: list[Occurrence], *, add_bos: bool
) -> bytes:
    """Tokenise ``text`` with these control tokens in it and no others."""
    parts: list[bytes] = []
    strips = {
        control.token: _strips(vocabulary, text[control.start : control.end])
        for control in controls
    }
    position = 0
    strip_left = False
    for control in [*controls, None]:
        piece = text[position : control.start if control else len(text)]
        if strip_left:
            piece = piece.lstrip(_SPACE)
        if control and strips[control.token][0]:
            piece = piece.rstrip(_SPACE)
        if piece:
            parts.append(vocabulary.tokenize(piece, add_bos=False, parse_special=False))
        if control:
            parts.append(pack([control.token]))
            position = control.end
            strip_left = strips[control.token][1]
    packed = b"".join(parts)
    if add_bos and vocabulary.bos is not None:
        bos = pack([vocabulary.bos])
        packed = packed if packed.startswith(bos) else bos + packed
    return packed


def _strips(vocabulary: Vocabulary, control: str) -> tuple[bool, bool]:
    """Whether the vocabulary drops white space before, and after, a control token.

    Some do (Phi-3's drop it after most), and no interface says so, so it is tried.
    """

    def same(one: str, other: str) -> bool:
        return vocabulary.tokenize(one, add_bos=False, parse_special=True) == vocabulary.tokenize(
            other, add_bos=False, parse_special=True
        )

    return same(f"x \n{control}", f"x{control}"), same(f"{control} \nx", f"{control}x")
