"""The names of keys on the server."""

from __future__ import annotations

from typing import Final

from erllama_core.interfaces.block import ObjectId


class Names:
    """All keys of one store; they begin with its prefix."""

    def __init__(self, prefix: str) -> None:
        self._objects: Final = f"{prefix}object:"
        self.sizes: Final = f"{prefix}sizes"
        """Hash: the bytes of every object, by its name."""
        self.used: Final = f"{prefix}used"
        """Sorted set: when each object was last used, in milliseconds since the epoch."""
        self.bytes: Final = f"{prefix}bytes"
        """String: the bytes of all objects."""
        self.log: Final = f"{prefix}log"
        """Stream: what was stored and removed, newest last."""
        self.pins: Final = f"{prefix}pins"
        """Set: pinned keys of 32 bytes."""
        self.janitor: Final = f"{prefix}janitor"
        """String: who keeps the store to its quota, until it expires."""

    def object(self, object_id: ObjectId | str) -> str:
        """String: an object, as it is."""
        return f"{self._objects}{object_id}"
