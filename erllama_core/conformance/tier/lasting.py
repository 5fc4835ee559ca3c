"""What a tier promises of what is there later: tests of the kit."""

from __future__ import annotations

import os
import signal
import warnings
from typing import NoReturn

import pytest

from erllama_core.conformance.kit import no_leaks
from erllama_core.conformance.objects import StoredObject, make_object
from erllama_core.conformance.tier.looking import absent, read
from erllama_core.conformance.tier.subject import TierKit, TierSubject
from erllama_core.interfaces.block import verify_object
from erllama_core.interfaces.tier import MakesDurable, ScannedObject, Tier


class LastingPromises(TierKit):
    """What a tier promises of what is there later."""

    def test_closing_twice_is_harmless(self, subject: TierSubject) -> None:
        """``close`` is idempotent, and gives back threads and descriptors.

        If this fails: an engine that is closed twice, or opened again and again, breaks.
        """
        thing = make_object(1)
        with no_leaks():
            for _ in range(3):
                tier = subject.open(None)
                tier.put(thing.object_id, [thing.data])
                tier.close()
                tier.close()

    def test_what_survives_closing(self, subject: TierSubject) -> None:
        """A store that outlives its tier has everything, with the same usage; another nothing.

        If this fails: a restart is cold where the subject promises otherwise, or it says less
        than it does.
        """
        things = [make_object(number, 10 * number) for number in range(8)]
        tier = subject.open(None)
        for thing in things:
            tier.put(thing.object_id, [thing.data])
        tier.delete(things[0].object_id)
        used = tier.usage().used_bytes
        tier.close()
        again = subject.open(None)
        try:
            found = {item.object_id for item in again.scan() if isinstance(item, ScannedObject)}
            if not subject.survives_close:
                assert not found
                return
            assert found == {thing.object_id for thing in things[1:]}
            assert again.usage().used_bytes == used
            assert all(read(again, thing.object_id) == thing.data for thing in things[1:])
        finally:
            again.close()

    def test_a_killed_writer_leaves_whole_objects(self, subject: TierSubject) -> None:
        """A process that is killed while it stores leaves whole objects and nothing else.

        If this fails: after a crash the store holds torn objects, lacks what ``put`` had returned
        for, or cannot be opened.
        """
        if not subject.survives_close:
            pytest.skip("the store ends with its process")
        for attempt in range(4):
            stored = _store_until_killed(subject, attempt)
            tier = subject.open(None)
            try:
                assert all(tier.contains(thing.object_id) for thing in stored)
                for item in list(tier.scan()):
                    assert isinstance(item, ScannedObject), f"left behind: {item}"
                    verify_object(read(tier, item.object_id), item.object_id)
                fresh = make_object(attempt)
                tier.put(fresh.object_id, [fresh.data])
                assert read(tier, fresh.object_id) == fresh.data
            finally:
                tier.close()

    def test_objects_are_made_durable(self, tier: Tier) -> None:
        """MakesDurable: it returns for what is there, and skips what is gone.

        If this fails: finishing a context fails because one of its blocks was evicted.
        """
        if not isinstance(tier, MakesDurable):
            return
        thing, gone = make_object(1), make_object(2)
        tier.put(thing.object_id, [thing.data])
        assert isinstance(tier.outlives_power, bool)
        tier.make_durable([thing.object_id, gone.object_id, thing.object_id])
        tier.make_durable([])
        assert read(tier, thing.object_id) == thing.data
        assert absent(tier, gone.object_id)


def _store_until_killed(subject: TierSubject, attempt: int) -> list[StoredObject]:
    """Have a child process store objects, and kill it while it does; what it had stored."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The child opens a store of its own and uses nothing that threads of the parent hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _store_and_tell(subject, attempt, writer)
    try:
        with os.fdopen(reader, "rb", buffering=0) as progress:
            os.close(writer)
            for _ in range(3 + attempt):
                assert progress.read(1), "the child could not store"
            os.kill(child, signal.SIGKILL)
    finally:
        os.waitpid(child, 0)
    return [_large_object(attempt, number) for number in range(3 + attempt)]


def _store_and_tell(subject: TierSubject, attempt: int, writer: int) -> NoReturn:
    """In the child: store one object after another, and say so."""
    try:
        tier = subject.open(None)
        for number in range(500):
            thing = _large_object(attempt, number)
            tier.put(thing.object_id, [thing.head, thing.payload], durable=number % 2 == 0)
            os.write(writer, b".")
    finally:
        os._exit(1)


def _large_object(attempt: int, number: int) -> StoredObject:
    return make_object(1000 * (attempt + 1) + number, 200_000)
