"""A chat, rendered by the model's template and tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from erllama_core.errors import TemplateError
from erllama_core.interfaces.backend import Vocabulary
from erllama_core.model.chat_guard import Occurrence, control_syntax, guard_for
from erllama_core.prompt import Prompt, pack

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

    Raises TemplateError when there is no template, when it is broken, when it refuses the
    messages (with its own words), and when a message is not one.
    """
    # Jinja is loaded by those who render chats.
    from erllama_core.model.chat_template import compile_template, render_template

    if not template or not template.strip():
        raise TemplateError(
            "the model has no chat template; give one with the model option chat_template"
        )
    _check_messages(messages)
    compiled = compile_template(template)
    chat = {"messages": list(messages), "tools": tools, "documents": documents}
    fixed = {
        **_token_texts(vocabulary),
        **(variables or {}),
        "add_generation_prompt": add_generation_prompt,
    }

    plain = render_template(compiled, {**fixed, **chat})
    syntax = control_syntax(vocabulary.control_tokens)
    guard = guard_for(syntax, chat, template + plain)
    if guard is None:
        return _tokenize_whole(vocabulary, plain)

    guarded = render_template(compiled, {**fixed, **guard.protect(chat)})
    genuine = syntax.find(guarded)
    text = guard.restore(guarded)
    if len(text) == len(plain) and text.lower() == plain.lower():
        # The two differ at most where the template changed the case of a stand-in.
        text = plain
    if syntax.find(text) == genuine:
        return _tokenize_whole(vocabulary, text)
    return _tokenize_between(vocabulary, text, genuine)


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
                f"such as 'user'; it has {message.get('role')!r}"
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


def _tokenize_whole(vocabulary: Vocabulary, text: str) -> Prompt:
    packed = vocabulary.tokenize(text, add_bos=vocabulary.add_bos, parse_special=True)
    return Prompt.from_packed(packed, text)


def _tokenize_between(vocabulary: Vocabulary, text: str, controls: list[Occurrence]) -> Prompt:
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
    if vocabulary.add_bos and vocabulary.bos is not None:
        bos = pack([vocabulary.bos])
        packed = packed if packed.startswith(bos) else bos + packed
    return Prompt.from_packed(packed, text)


def _strips(vocabulary: Vocabulary, control: str) -> tuple[bool, bool]:
    """Whether the vocabulary drops white space before, and after, a control token.

    Some do (Phi-3's drop it after most), and no interface says so, so it is tried.
    """

    def same(one: str, other: str) -> bool:
        return vocabulary.tokenize(one, add_bos=False, parse_special=True) == vocabulary.tokenize(
            other, add_bos=False, parse_special=True
        )

    return same(f"x \n{control}", f"x{control}"), same(f"{control} \nx", f"{control}x")
