"""Options of ``[pressure.nvidia]``."""

from __future__ import annotations

import attrs

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
