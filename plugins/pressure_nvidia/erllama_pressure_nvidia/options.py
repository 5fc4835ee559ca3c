"""Options of ``[pressure.nvidia]``."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs import validators

_Devices = tuple[int | str, ...]


def _named(_instance: object, attribute: attrs.Attribute[_Devices], devices: _Devices) -> None:
    for device in devices:
        if isinstance(device, int) and device < 0:
            raise ValueError(f"'{attribute.name}' has the index {device}; indices start at 0")
        if isinstance(device, str) and not device.startswith(("GPU-", "MIG-")):
            raise ValueError(
                f"'{attribute.name}' has {device!r}; a UUID begins with 'GPU-' or 'MIG-' "
                f"(`nvidia-smi -L` lists them)"
            )


@attrs.frozen
class NvidiaOptions:
    """Which GPUs are watched."""

    devices: tuple[int | str, ...] = attrs.field(default=(), validator=_named)
    """Indices or UUIDs, as ``nvidia-smi -L`` lists them. Empty: all."""
    readings: tuple[Literal["device", "sum"], ...] = attrs.field(
        default=("device", "sum"), validator=validators.min_len(1)
    )
    """``"device"``: one of each GPU; ``"sum"``: one of all of them together, if there are several.
    With ``"sum"`` alone a GPU that is full does no harm while another one has room."""
