"""The tier: objects as strings on the server, their sizes and last uses beside them."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from erllama_core.errors import BlockNotFound, CacheError, TierError, TierFull
from erllama_core.interfaces.block import KEY_BYTES, Bytes, ObjectId, header_length
from erllama_core.interfaces.tier import (
    Allocate,
    FoundObject,
    Gone,
    ScanFailure,
    ScannedObject,
    TierUsage,
)
from erllama_tier_redis import scripts
from erllama_tier_redis.names import Names
from erllama_tier_redis.server import Server

_HEAD_BYTES: Final = 4096
"""Read of each object in a scan; most headers are shorter."""
_BATCH: Final = 200
"""Objects asked for at once in a scan."""
_MOST_MS: Final = (1 << 63) / 1_000_000
"""As nanoseconds, the first time that no clock has."""
_LEASE_MS: Final = 30_000
_LEASE_ASKED_S: Final = 5.0
"""The janitor is asked for again after so long."""


class RedisTier:
    """Objects on a server that other processes and hosts use too; a Tier, shared, with pins.

    What the server says of its usage comes with every change, and is kept; other processes'
    changes are learned of with the next one, or with a rescan.
    """

    def __init__(
        self,
        server: Server,
        *,
        prefix: str = "erllama:",
        quota_bytes: int | None = None,
        expire_s: float | None = None,
        rescan_interval_s: float = 30.0,
    ) -> None:
        self._server: Final = server
        self._names: Final = Names(prefix)
        self._quota = quota_bytes
        self._expire_ms: Final = 0 if expire_s is None else int(expire_s * 1000)
        self._rescan_interval_s: Final = rescan_interval_s
        self._who: Final = uuid.uuid4().hex
        self._lock: Final = threading.Lock()
        self._used = 0
        self._seen = "0-0"
        """Of the log, by this process."""
        self._lead = (False, 0.0)
        self._known: Final[set[str]] = set()
        """Names of objects that the core believes to be here: those that it stored, and those
        that it was told of. A server that comes back empty has no log of what was in it."""
        self._put: Final = server.script(scripts.PUT)
        self._delete: Final = server.script(scripts.DELETE)
        self._forget: Final = server.script(scripts.FORGET)
        self._leads: Final = server.script(scripts.LEAD)
        self._resign: Final = server.script(scripts.RESIGN)

    # ------------------------------------------------------------------ objects

    def put(self, object_id: ObjectId, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        del durable  # whether the server writes to a disk is the server's to know
        data = b"".join(parts)
        args = [str(object_id), data, _now_ms(), self._quota or 0, self._expire_ms]
        stored, used = self._server.run(
            "store an object", lambda _: self._put(keys=self._keys(object_id), args=args)
        )
        self._note(used)
        if stored:
            self._known.add(str(object_id))
        else:
            raise TierFull(
                f"{len(data)} bytes do not fit: {used} of {self._quota} bytes are used in "
                f"{self._server.place}"
            )

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        name = self._names.object(object_id)

        def get(client: Any) -> bytes | None:
            pipe = client.pipeline(transaction=False)
            pipe.get(name)
            pipe.zadd(self._names.used, {str(object_id): _now_ms()}, xx=True)
            if self._expire_ms:
                pipe.pexpire(name, self._expire_ms)
            data: bytes | None = pipe.execute()[0]
            return data

        data = self._server.run("read an object", get)
        if data is None:
            raise BlockNotFound(f"{object_id} is not in {self._server.place}")
        buffer = allocate(len(data))
        buffer[:] = data
        return buffer

    def delete(self, object_id: ObjectId) -> int:
        freed, used = self._server.run(
            "delete an object",
            lambda _: self._delete(keys=self._keys(object_id), args=[str(object_id)]),
        )
        self._note(used)
        self._known.discard(str(object_id))
        return int(freed)

    def contains(self, object_id: ObjectId) -> bool:
        name = self._names.object(object_id)
        return bool(self._server.run("look for an object", lambda client: client.exists(name)))

    def location(self, object_id: ObjectId) -> str:
        return f"{self._server.place} {self._names.object(object_id)}"

    def usage(self) -> TierUsage:
        with self._lock:
            return TierUsage(self._used, self._quota)

    def set_quota(self, quota_bytes: int | None) -> None:
        self._quota = quota_bytes

    def close(self) -> None:
        with self._lock:
            leads, self._lead = self._lead[0], (False, float("inf"))
        if leads:
            with contextlib.suppress(CacheError):
                self._server.run(
                    "resign as janitor",
                    lambda _: self._resign(keys=[self._names.janitor], args=[self._who]),
                )
        self._server.close()

    # ----------------------------------------------------------------- scanning

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        try:
            self._seen = self._newest()
            try:
                self._ask_usage()
            except TierError as error:
                yield ScanFailure(f"{self._server.place} {self._names.bytes}", str(error))
            batch: list[str] = []
            for name in self._all_names():
                batch.append(name)
                if len(batch) == _BATCH:
                    yield from self._described(batch)
                    batch = []
            yield from self._described(batch)
        except TierError as error:
            yield ScanFailure(self._server.place, str(error))

    def _all_names(self) -> Iterator[str]:
        cursor, seen = 0, set[str]()
        while True:
            cursor, found = self._server.run(
                "list objects",
                functools.partial(_hscan, name=self._names.sizes, cursor=cursor),
            )
            for name in found:
                text = name.decode("ascii", "replace")
                if text not in seen:  # HSCAN may tell of a field twice
                    seen.add(text)
                    yield text
            if not cursor:
                return

    def _described(self, names: Sequence[str]) -> Iterator[ScannedObject | ScanFailure]:
        """What a scan says of objects; those that are gone are taken out of the books."""
        if not names:
            return

        def ask(client: Any) -> list[Any]:
            pipe = client.pipeline(transaction=False)
            for name in names:
                key = self._names.object(name)
                pipe.strlen(key)
                pipe.getrange(key, 0, _HEAD_BYTES - 1)
                pipe.zscore(self._names.used, name)
            answers: list[Any] = pipe.execute()
            return answers

        answers = self._server.run("read headers", ask)
        for place, name in enumerate(names):
            size, head, used_ms = answers[3 * place : 3 * place + 3]
            try:
                object_id = ObjectId.parse(name)
            except ValueError as error:
                yield ScanFailure(f"{self._server.place} {self._names.sizes} {name}", str(error))
                continue
            if not size:
                self._take_out(name)
                continue
            self._known.add(name)
            yield ScannedObject(
                object_id,
                self._whole_head(name, head),
                int(size),
                _used_ns(used_ms) or time.time_ns(),
            )

    def _whole_head(self, name: str, head: bytes) -> bytes:
        try:
            length = header_length(head)
        except CacheError:
            return head  # no object: for the core to find out
        if length <= len(head):
            return head
        whole: bytes = self._server.run(
            "read a header",
            lambda client: client.getrange(self._names.object(name), 0, length - 1),
        )
        return whole

    def _take_out(self, name: str) -> None:
        keys = [self._names.object(name), *self._books()[:3]]
        self._note(
            self._server.run("forget an object", lambda _: self._forget(keys=keys, args=[name]))
        )

    # ------------------------------------------------------------------- shared

    @property
    def rescan_interval_s(self) -> float:
        return self._rescan_interval_s

    def lead(self) -> bool:
        with self._lock:
            leads, asked_at = self._lead
        if time.monotonic() - asked_at < _LEASE_ASKED_S:
            return leads
        leads = bool(
            self._server.run(
                "become the janitor",
                lambda _: self._leads(keys=[self._names.janitor], args=[self._who, _LEASE_MS]),
            )
        )
        with self._lock:
            self._lead = (leads, time.monotonic())
        return leads

    def find(self, object_id: ObjectId) -> FoundObject | None:
        def ask(client: Any) -> list[Any]:
            pipe = client.pipeline(transaction=False)
            pipe.strlen(self._names.object(object_id))
            pipe.zscore(self._names.used, str(object_id))
            answers: list[Any] = pipe.execute()
            return answers

        size, used_ms = self._server.run("look for an object", ask)
        if not size:
            return None
        return FoundObject(int(size), _used_ns(used_ms))

    def rescan(self) -> Iterator[ScannedObject | ScanFailure | Gone]:
        try:
            if not self._log_reaches_back():
                yield from self._scan_anew()
                return
            stored: dict[str, None] = {}
            removed: dict[str, None] = {}
            for what, name in self._news():
                if what == b"put":
                    removed.pop(name, None)
                    stored[name] = None
                else:
                    stored.pop(name, None)
                    removed[name] = None
            for name in removed:
                yield from self._gone(name)
            names = list(stored)
            for at in range(0, len(names), _BATCH):
                yield from self._described(names[at : at + _BATCH])
            self._ask_usage()
        except TierError as error:
            yield ScanFailure(self._server.place, str(error))

    def _scan_anew(self) -> Iterator[ScannedObject | ScanFailure | Gone]:
        left = set(self._known)
        for item in self.scan():
            if isinstance(item, ScanFailure):
                yield item
                return  # what was not told of may be there
            left.discard(str(item.object_id))
            yield item
        for name in left:
            yield from self._gone(name)

    def _gone(self, name: str) -> Iterator[Gone]:
        self._known.discard(name)
        with contextlib.suppress(ValueError):
            yield Gone(ObjectId.parse(name))

    def _newest(self) -> str:
        last = self._server.run(
            "read the log", lambda client: client.xrevrange(self._names.log, count=1)
        )
        return last[0][0].decode() if last else "0-0"

    def _log_reaches_back(self) -> bool:
        """Whether what was seen last is in the log still, or nothing was lost before it."""
        first = self._server.run(
            "read the log", lambda client: client.xrange(self._names.log, count=1)
        )
        if not first:
            return self._seen == "0-0"  # else the server has lost it, with everything else
        return self._seen == "0-0" or _order(first[0][0].decode()) <= _order(self._seen)

    def _news(self) -> Iterator[tuple[bytes, str]]:
        while True:
            entries = self._server.run(
                "read the log",
                lambda client: client.xrange(self._names.log, min=f"({self._seen}", count=1000),
            )
            for entry_id, fields in entries:
                self._seen = entry_id.decode()
                for what, name in fields.items():
                    yield what, name.decode("ascii", "replace")
            if len(entries) < 1000:
                return

    # --------------------------------------------------------------------- pins

    def record_pin(self, key: bytes) -> None:
        self._server.run("record a pin", lambda client: client.sadd(self._names.pins, key))

    def erase_pin(self, key: bytes) -> None:
        self._server.run("erase a pin", lambda client: client.srem(self._names.pins, key))

    def pins(self) -> Iterable[bytes]:
        found: Iterable[bytes] = self._server.run(
            "list pins", lambda client: client.smembers(self._names.pins)
        )
        # A set of everybody's: what is of another length is no key of anything.
        return [key for key in found if len(key) == KEY_BYTES]

    # ------------------------------------------------------------------- inside

    def _keys(self, object_id: ObjectId) -> list[str]:
        return [self._names.object(object_id), *self._books()]

    def _books(self) -> list[str]:
        names = self._names
        return [names.sizes, names.used, names.bytes, names.log]

    def _ask_usage(self) -> None:
        self._note(self._server.run("read the usage", lambda c: c.get(self._names.bytes)) or 0)

    def _note(self, used: int | bytes) -> None:
        try:
            number = int(used)
        except ValueError as error:
            raise TierError(
                f"{self._server.place}: {self._names.bytes} holds {used!r:.60}, which is no "
                "number of bytes; something else than erllama has written it. Delete all keys that "
                "begin with the tier's prefix, or choose another prefix"
            ) from error
        with self._lock:
            self._used = number


def _hscan(client: Any, *, name: str, cursor: int) -> tuple[int, dict[bytes, bytes]]:
    found: tuple[int, dict[bytes, bytes]] = client.hscan(name, cursor, count=1000)
    return found


def _used_ns(score: float | None) -> int:
    """When an object was last used; 0 for a score that is no time."""
    if score is None or not 0 < score < _MOST_MS:
        return 0
    return int(score * 1_000_000)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _order(entry_id: str) -> tuple[int, int]:
    """Entries of a stream in their order: milliseconds, then a number within them."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
