"""How a stub model behaves: its options."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from erllama_core.interfaces.backend import KVClass

CELL_HEAD_BYTES = 8
"""What every cell starts with: token and position."""


def _at_least(minimum: int) -> Any:
    def check(_owner: Any, attribute: attrs.Attribute[Any], value: float | None) -> None:
        if value is not None and value < minimum:
            raise ValueError(f"{attribute.name} is {value}; {minimum} is the least")

    return check


def _cell_bytes(_owner: Any, _attribute: attrs.Attribute[int], value: int) -> None:
    if value < 2 * CELL_HEAD_BYTES or value % 8:
        raise ValueError(f"cell_bytes is {value}; it must be a multiple of 8, 16 at least")


def _rate(_owner: Any, attribute: attrs.Attribute[float], value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{attribute.name} is {value}; it is a probability, 0.0 to 1.0")


def _replies(_owner: Any, attribute: attrs.Attribute[Any], value: object) -> None:
    # A string is a sequence of strings too, and would be played letter by letter.
    if not isinstance(value, tuple):
        raise TypeError(f"{attribute.name} is a tuple of replies, not {value!r}")


def _byte(_owner: Any, attribute: attrs.Attribute[str], value: str) -> None:
    if len(value) > 1 or not value.isascii():
        raise ValueError(f"{attribute.name} is {value!r}; one ASCII character, or none")


@attrs.frozen(kw_only=True)
class StubFaults:
    """What goes wrong, and when.

    Calls are counted from 1 over all contexts of one model, so that each fault fires once.
    """

    fail_load: bool = False
    """The factory raises ModelLoadError."""
    fail_step: int | None = attrs.field(default=None, validator=_at_least(1))
    """This step raises DecodeFailed with ``Status.COMPUTE_FAILED``."""
    hang_step: int | None = attrs.field(default=None, validator=_at_least(1))
    """This step waits at the model's :class:`~erllama_backend_stub.faults.HangGate`."""
    hang_gate: str = ""
    """The gate's name for :func:`~erllama_backend_stub.faults.gate`; empty: a gate of its own."""
    hang_deaf: bool = False
    """The step that hangs does not hear ``abort`` before its gate is opened."""
    fail_export: int | None = attrs.field(default=None, validator=_at_least(1))
    """This export, of a range or a snapshot, raises StateRejected."""
    short_export: int | None = attrs.field(default=None, validator=_at_least(1))
    """This export lacks its last cell: it needs the usual bytes, but says and holds fewer."""
    fail_import: int | None = attrs.field(default=None, validator=_at_least(1))
    """This import, of ranges or a snapshot, raises StateRejected."""


@attrs.frozen(kw_only=True)
class StubOptions:
    """``model_opts`` of a stub model."""

    weights: str = "stub"
    """Stands for the weights: models with different ones compute different state and output."""
    kv_class: Literal["span", "checkpoint", "whole"] = "span"
    """Which :class:`~erllama_core.interfaces.backend.KVClass` the contexts play."""
    cell_bytes: int = attrs.field(default=32, validator=_cell_bytes)
    """State of one token; a multiple of 8, 16 at least."""
    max_block_tokens: int | None = attrs.field(default=None, validator=_at_least(1))
    """The longest range that is exported and imported, as with a sliding window; None: any."""
    add_bos: bool = False
    """Whether the vocabulary asks for ``<|bos|>`` at the start of a text."""
    digraphs: bool = False
    """Whether pairs of letters such as "th" are one token where a text is tokenised; replies are
    said letter by letter all the same, as a model may say in other tokens what is read as few."""
    eog_rate: float = attrs.field(default=0.0, validator=_rate)
    """How probably a reply ends after each token; 0.0: never by itself."""
    script: tuple[str, ...] = attrs.field(default=(), validator=_replies)
    """What is replied: the first entry in the first assistant turn of a context, the second in
    the second, the last one in all later turns. Control tokens' text becomes control tokens."""
    script_free: str = attrs.field(default="", validator=_byte)
    """A character of the script that leaves a token to the sampler; none when empty."""
    reply_marker: str = attrs.field(
        default="<|im_start|>assistant\n", validator=attrs.validators.min_len(1)
    )
    """The text that opens a turn of the script wherever it stands in a context."""
    prefill_us_per_token: float = attrs.field(default=0.0, validator=_at_least(0))
    """Microseconds that a step sleeps for each token of rows with several tokens."""
    decode_us: float = attrs.field(default=0.0, validator=_at_least(0))
    """Microseconds that a step sleeps when it has a row of one token."""
    declared_us_per_token: float | None = attrs.field(default=None, validator=_at_least(0))
    """Microseconds that the context says a token takes to compute, which switches the cost gate
    on; None: it says nothing, and whatever is stored is restored."""
    faults: StubFaults = StubFaults()

    @property
    def state_class(self) -> KVClass:
        """``kv_class`` as the interfaces name it."""
        return KVClass(self.kv_class)
