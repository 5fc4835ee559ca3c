"""A plain dict as the model of the store, with hands on its files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from erllama_core.errors import BlockNotFound, TierFull
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.interfaces.tier import ScannedObject
from erllama_tier_disk.store import FileTier

QUOTA = 600

object_ids = st.builds(
    ObjectId,
    kind=st.sampled_from(ObjectKind),
    start=st.integers(0, 2),
    key=st.sampled_from([bytes([byte]) * 32 for byte in (0, 1)]),
)


class DiskTierMachine(RuleBasedStateMachine):
    """What the tier answers is what a dict would, or what was done to its files."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="erllama-stateful-"))
        self.model: dict[ObjectId, bytes] = {}
        self.touched = False
        """Files were changed behind the tier's back since its last scan."""

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize()
    def open(self) -> None:
        self.tier = FileTier(self.root, quota_bytes=QUOTA)
        self.touched = bool(self.model)

    @rule(object_id=object_ids, data=st.binary(min_size=1, max_size=200), durable=st.booleans())
    def put(self, object_id: ObjectId, data: bytes, durable: bool) -> None:
        used = self.tier.usage().used_bytes
        try:
            self.tier.put(object_id, [data[:10], data[10:]], durable=durable)
        except TierFull:
            if not self.touched:
                assert used - len(self.model.get(object_id, b"")) + len(data) > QUOTA
        else:
            self.model[object_id] = data

    @rule(object_id=object_ids)
    def read(self, object_id: ObjectId) -> None:
        def allocate(size: int) -> memoryview:
            assert size == len(self.model[object_id])
            return memoryview(bytearray(size))

        if object_id in self.model:
            assert bytes(self.tier.read(object_id, allocate)) == self.model[object_id]
        else:
            with pytest.raises(BlockNotFound):
                self.tier.read(object_id, allocate)

    @rule(object_id=object_ids)
    def delete(self, object_id: ObjectId) -> None:
        assert self.tier.delete(object_id) == len(self.model.pop(object_id, b""))

    @rule(object_id=object_ids)
    def contains(self, object_id: ObjectId) -> None:
        assert self.tier.contains(object_id) is (object_id in self.model)

    @rule()
    def scan(self) -> None:
        found = list(self.tier.scan())
        assert all(isinstance(item, ScannedObject) for item in found)
        sizes = {
            item.object_id: (item.size_bytes, item.head)
            for item in found
            if isinstance(item, ScannedObject)
        }
        assert len(found) == len(sizes)
        assert sizes == {object_id: (len(data), data) for object_id, data in self.model.items()}
        self.touched = False

    @rule()
    def reopen(self) -> None:
        self.tier.close()
        self.open()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_a_file(self, data: st.DataObject) -> None:
        object_id = data.draw(st.sampled_from(sorted(self.model, key=str)))
        Path(self.tier.location(object_id)).unlink()
        del self.model[object_id]
        self.touched = True

    @rule(object_id=object_ids, content=st.binary(max_size=200))
    def write_a_file(self, object_id: ObjectId, content: bytes) -> None:
        path = Path(self.tier.location(object_id))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.model[object_id] = content
        self.touched = True

    @rule(object_id=object_ids, data=st.binary(min_size=1, max_size=200))
    def put_by_another_tier(self, object_id: ObjectId, data: bytes) -> None:
        FileTier(self.root).put(object_id, [data])
        self.model[object_id] = data
        self.touched = True

    @invariant()
    def usage_is_exact(self) -> None:
        if not self.touched:
            usage = self.tier.usage()
            assert usage.used_bytes == sum(map(len, self.model.values()))
            assert usage.quota_bytes == QUOTA


DiskTierMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestDiskTier = DiskTierMachine.TestCase
