"""Looking at what a tier holds, for tests of the kit."""

from __future__ import annotations

import attrs

from erllama_core.errors import BlockNotFound
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.tier import ScannedObject, Tier


@attrs.frozen
class _Given:
    """Buffers that the tier has asked for."""

    sizes: list[int] = attrs.field(factory=list)

    def allocate(self, size: int) -> memoryview:
        self.sizes.append(size)
        return memoryview(bytearray(size))


def read(tier: Tier, object_id: ObjectId) -> bytes:
    """All bytes of an object; checks how the tier asks for a buffer."""
    given_out = _Given()
    buffer = tier.read(object_id, given_out.allocate)
    assert given_out.sizes == [len(buffer)], "allocate is called once, with the object's size"
    return bytes(buffer)


def absent(tier: Tier, object_id: ObjectId) -> bool:
    """Whether the tier says in every way that it has no such object."""
    given_out = _Given()
    try:
        tier.read(object_id, given_out.allocate)
    except BlockNotFound:
        missing = True
    else:
        missing = False
    assert not (missing and given_out.sizes), "allocate is for objects that exist"
    scanned = {item.object_id for item in tier.scan() if isinstance(item, ScannedObject)}
    answers = {missing, not tier.contains(object_id), object_id not in scanned}
    assert len(answers) == 1, "read, contains and scan agree"
    return missing
