"""Options of ``[pressure.psi]``."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs import validators


@attrs.frozen
class PsiOptions:
    """When stalls count as pressure."""

    limit: float = attrs.field(default=0.1, validator=(validators.gt(0.0), validators.le(1.0)))
    """The share of time lost to stalls that counts as a memory that is full.

    The default is the threshold of Android's lmkd for medium pressure: ``PSI_SOME``, 100 ms of a
    second (``psi_thresholds`` in its lmkd.cpp)."""
    stalled: Literal["some", "full"] = attrs.field(
        default="some", validator=validators.in_(("some", "full"))
    )
    """``"some"``: time in which at least one task stood still; ``"full"``: all of them."""
