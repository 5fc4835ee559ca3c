"""Reading an object back from a tier, and making sure that it is what the index says it is."""

from __future__ import annotations

from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Entry
from erllama_core.cache.pages import PooledPages
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import BlockNotFound, CorruptBlock
from erllama_core.interfaces.block import verify_object


class PayloadPages:
    """The payload part of pages that hold a whole object; implements Pages."""

    def __init__(self, pages: PooledPages, header_bytes: int) -> None:
        self._pages: Final = pages
        self._header_bytes: Final = header_bytes

    @property
    def view(self) -> memoryview:
        return self._pages.view[self._header_bytes :]

    def retain(self) -> None:
        self._pages.retain()

    def release(self) -> None:
        self._pages.release()


def read_object(catalog: Catalog, store: TierStore, entry: Entry) -> tuple[bytes, PayloadPages]:
    """Header and payload of a tier's copy, verified; the caller releases the pages.

    Blocks. Raises CacheError.
    """
    taken: list[PooledPages] = []

    def allocate(size: int) -> memoryview:
        taken.append(catalog.pool.acquire(size))
        return taken[-1].view

    try:
        data = store.attempt(lambda: store.tier.read(entry.object_id, allocate), "read")
        header = verify_object(data, entry.object_id)
        if (header.namespace, header.tokens) != (entry.namespace, entry.tokens):
            raise CorruptBlock("tokens differ from those that were indexed")
        if header.lead_tokens != entry.lead:
            # The same content under the same name: of no use here, and no damage either.
            raise BlockNotFound(f"{entry.object_id} was cut at other aligned positions")
        if len(taken) != 1 or taken[0].size != len(data):
            raise CorruptBlock("the tier did not return the buffer that it was given")
    except BaseException:
        for pages in taken:
            pages.release()
        raise
    catalog.counters.add("bytes_read", len(data))
    return bytes(data[: header.header_bytes]), PayloadPages(taken[0], header.header_bytes)
