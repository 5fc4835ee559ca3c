"""Every error that erllama raises, in one tree.

::

    ErllamaError
    ├── ConfigError (ValueError)          a configuration, every mistake of it
    ├── PluginError
    │   ├── PluginMissing (LookupError)   nothing provides that name
    │   ├── PluginFailed                  a plugin raised, or broke its contract
    │   ├── PluginUnavailable             installed, not usable on this machine
    │   └── PluginDuplicate               two plugins claim one name
    ├── ModelError
    │   ├── ModelNotFound (LookupError)   no model is loaded under that id
    │   ├── AlreadyLoaded                 a model or an adapter has that name already
    │   ├── ModelLoadError                the backend refused the model
    │   │   └── AdapterLoadError          it refused an adapter of the model
    │   ├── AdapterNotFound (LookupError) the model has no adapter of that name
    │   └── AdapterTimeout (TimeoutError) requests did not end in time for a change of adapters
    ├── RequestError
    │   ├── InvalidPrompt (ValueError)    no tokens, or ids outside the vocabulary
    │   ├── PromptTooLong (ValueError)    the prompt does not fit the context
    │   │   └── TextTooLong               a text cannot be embedded at once
    │   ├── TemplateError (ValueError)    the chat template refused the messages
    │   ├── InvalidGrammar (ValueError)   a grammar or a JSON schema cannot be followed
    │   ├── SeqCapacity                   all sequences are in use
    │   ├── TimeoutExceeded (TimeoutError)  it took longer than it was given
    │   └── NotSupported                  this backend cannot do it
    ├── SessionError
    │   ├── NoSession (LookupError)       no session has that id
    │   ├── StickyBusy                    a request of that session is running
    │   └── TranscriptMismatch (ValueError)  it holds other tokens than expected
    ├── EngineError
    │   ├── DecodeFailed                  the native decode failed
    │   │   ├── DecodeAborted             it was told to end early
    │   │   └── NotNumbers                it computed NaN or infinity
    │   ├── DecodeTimeout                 a step took longer than it may
    │   ├── EngineReset                   the session was reset
    │   ├── StateRejected                 the native side refused a state
    │   └── EngineClosed                  the engine or the model was closed
    └── CacheError
        ├── TierError                     a tier could not read or write
        │   └── TierFull                  its quota or its device is full
        ├── MemoryBudgetExceeded (MemoryError)  the engine's memory budget has no room
        ├── CorruptBlock                  a stored object is not what it claims
        │   └── UnknownFormat             it is of a format version that is not read here
        └── BlockNotFound (LookupError)   the object is not in that tier

What a caller may want to act on is an attribute, not only text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from erllama_core.results import Completion, Stats


class ErllamaError(Exception):
    """Root of the tree."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one most likely meant, or None."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence that every look-up by name ends in when it finds nothing."""
    known = sorted(known)
    guess = nearest(name, known)
    hint = f"; did you mean {guess!r}?" if guess else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known) or 'none'}."


# --------------------------------------------------------------- configuration


@attrs.frozen
class ConfigProblem:
    """One mistake: where it is, what was expected, what was probably meant."""

    path: str
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        hint = f" (did you mean {self.suggestion!r}?)" if self.suggestion else ""
        return f"{self.path}: {self.message}{hint}"


class ConfigError(ErllamaError, ValueError):
    """A configuration cannot be used; ``problems`` holds every mistake found."""

    def __init__(self, problems: Sequence[ConfigProblem], source: str | None = None) -> None:
        self.problems = tuple(problems)
        self.source = source
        head = f"{source}: " if source else ""
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{head}{count} problem{'s' if count != 1 else ''}\n{lines}")


# --------------------------------------------------------------------- plugins


class PluginError(ErllamaError):
    """Something about a plugin or a provider."""


class PluginMissing(PluginError, LookupError):
    """No installed plugin provides that name."""


class PluginFailed(PluginError):
    """A plugin raised, or did not keep to its contract; the cause is chained."""


class PluginUnavailable(PluginError):
    """The plugin is installed, but its probe says that it cannot work here."""


class PluginDuplicate(PluginError):
    """Two plugins claim one provider name; both are named, neither is used."""


# ---------------------------------------------------------------------- models


class ModelError(ErllamaError):
    """Something about a loaded model."""


class ModelNotFound(ModelError, LookupError):
    """No model is loaded under that id."""


class AlreadyLoaded(ModelError):
    """A model is loaded under that id, or an adapter of the model under that name."""


class ModelLoadError(ModelError):
    """The model could not be loaded; ``reason`` is what the native side said."""

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        self.reason = reason
        super().__init__(f"{message}: {reason}" if reason else message)


class AdapterLoadError(ModelLoadError):
    """The adapter could not be loaded: it is damaged, no adapter, or not for this model."""


class AdapterNotFound(ModelError, LookupError):
    """The model has no adapter of that name."""


class AdapterTimeout(ModelError, TimeoutError):
    """Running requests did not end in time for a change of adapters; nothing was changed."""


# -------------------------------------------------------------------- requests


class RequestError(ErllamaError):
    """This request cannot be served as asked; other requests are unaffected."""


class InvalidPrompt(RequestError, ValueError):
    """The prompt has no tokens, or ids that the vocabulary does not have."""


class PromptTooLong(RequestError, ValueError):
    """The prompt leaves no room in the context for one more token."""

    def __init__(self, prompt_tokens: int, limit_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.limit_tokens = limit_tokens
        super().__init__(
            f"the prompt has {prompt_tokens} tokens; a context of {limit_tokens} takes "
            f"{limit_tokens - 1} at most and a reply of one. Shorten the prompt or load the "
            f"model with a larger context_opts.n_ctx."
        )


class TextTooLong(PromptTooLong):
    """The text has more tokens than can be embedded at once."""

    def __init__(self, prompt_tokens: int, limit_tokens: int) -> None:
        super().__init__(prompt_tokens, limit_tokens)
        message = (
            f"the text has {prompt_tokens} tokens; {limit_tokens} at most can be embedded. Embed "
            f"it in parts, or load the model with a larger context_opts.n_ctx, if it was trained "
            f"for that."
        )
        self.args = (message,)


class TemplateError(RequestError, ValueError):
    """The chat template is missing, broken, refused the messages, or would use up too much."""


class InvalidGrammar(RequestError, ValueError):
    """A grammar, or a JSON schema, is wrong or cannot be followed; the attributes say where."""

    def __init__(
        self,
        problem: str,
        *,
        line: int | None = None,
        column: int | None = None,
        excerpt: str | None = None,
        path: str | None = None,
    ) -> None:
        self.problem = problem
        """What is wrong, without the place."""
        self.line = line
        """Of the GBNF, from 1; None where the mistake is at no one place."""
        self.column = column
        """Characters into the line, from 1."""
        self.excerpt = excerpt
        """The GBNF from there on; empty at its end."""
        self.path = path
        """Within a JSON schema: ``#`` is the schema itself, ``#/properties/age`` a part of it."""
        place = ""
        if path is not None:
            place = f"json_schema, {path}: "
        elif line is not None:
            place = f"grammar, line {line}, column {column}: "
        found = f", at {excerpt!r}" if excerpt else ""
        super().__init__(f"{place}{problem}{found}")


class SeqCapacity(RequestError):
    """All sequences of the model are in use, and the request was not to wait for one."""


class TimeoutExceeded(RequestError, TimeoutError):
    """The request took longer than its ``timeout_s``; ``partial`` is what there was until then."""

    def __init__(self, message: str, *, stats: Stats) -> None:
        self.stats = stats
        self.partial: Completion | None = None
        """Set by the stream that raises it."""
        super().__init__(message)


class NotSupported(RequestError):
    """The model's backend does not have this ability."""


# -------------------------------------------------------------------- sessions


class SessionError(ErllamaError):
    """The request does not fit its session; others are unaffected."""


class NoSession(SessionError, LookupError):
    """There is no session of that id to go on with: give the whole prompt with ``infer``."""


class StickyBusy(SessionError):
    """A request of that session is running; one at a time."""


class TranscriptMismatch(SessionError, ValueError):
    """The session holds other tokens than its caller believes."""

    def __init__(self, stored_len: int, expected_len: int, diverge_at: int) -> None:
        self.stored_len = stored_len
        self.expected_len = expected_len
        self.diverge_at = diverge_at
        """Index of the first token that differs, or where the shorter one ends."""
        super().__init__(
            f"the session holds {stored_len} tokens, {expected_len} were expected, and they "
            f"differ from token {diverge_at} on; give the whole prompt with infer"
        )


# ---------------------------------------------------------------------- engine


class EngineError(ErllamaError):
    """The model's worker could not go on with the request."""


class DecodeFailed(EngineError):
    """The native decode failed; ``code`` is its status."""

    def __init__(self, message: str, *, code: int) -> None:
        self.code = code
        super().__init__(f"{message} (status {code})")


class DecodeAborted(DecodeFailed):
    """The native decode was told to end early, and did."""


class NotNumbers(DecodeFailed):
    """A step computed logits that are not numbers: weights or a restored state are damaged.

    ``seqs``: the sequences of the step to which that happened, which are empty now.
    ``reaches_others``: what is left of them makes every other sequence compute the same, until
    all of the context's sequences were empty at one time.
    """

    def __init__(
        self, message: str, *, code: int, seqs: Iterable[int], reaches_others: bool
    ) -> None:
        self.seqs = frozenset(seqs)
        self.reaches_others = reaches_others
        super().__init__(message, code=code)


class DecodeTimeout(EngineError):
    """A step took longer than ``decode_budget_ms`` and was aborted; the model goes on."""


class EngineReset(EngineError):
    """The request's session was reset while it ran."""


class StateRejected(EngineError):
    """The native side refused to export or import a state, or took only a part."""


class EngineClosed(EngineError):
    """The engine was closed, or the model unloaded, before the request ended."""


# ----------------------------------------------------------------------- cache


class CacheError(ErllamaError):
    """Cache trouble; it never fails a request, which is computed instead."""


class TierError(CacheError):
    """A tier could not read or write; the cause is chained."""


class TierFull(TierError):
    """The tier's quota, or the device below it, has no room for the object."""


class MemoryBudgetExceeded(CacheError, MemoryError):
    """The engine's ``memory_budget_bytes`` has no room for it; nothing was allocated."""


class CorruptBlock(CacheError):
    """A stored object is not what it claims to be; ``reason`` says in what."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class UnknownFormat(CorruptBlock):
    """A stored object of another format version: whole perhaps, but not for this erllama."""


class BlockNotFound(CacheError, LookupError):
    """The object is not, or no longer, in that tier."""
