"""One store for many: loss of the server, expiry, limits, logins, the janitor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from erllama_core import Engine, PluginHost, load_config
from erllama_core.conformance.objects import make_object
from erllama_core.errors import BlockNotFound, ConfigError, TierError, TierFull
from erllama_core.interfaces.tier import Gone, ScanFailure, ScannedObject
from erllama_tier_redis import scripts
from erllama_tier_redis.names import Names
from erllama_tier_redis.options import RedisOptions
from erllama_tier_redis.server import Server
from erllama_tier_redis.store import RedisTier

PROMPT = "One cache for processes on many hosts, so that each of them computes less. " * 4


def put(tier: RedisTier, number: int, size: int = 300) -> Any:
    thing = make_object(number, size)
    tier.put(thing.object_id, [thing.data])
    return thing.object_id


def read(tier: RedisTier, object_id: Any) -> bytes:
    return bytes(tier.read(object_id, lambda size: memoryview(bytearray(size))))


def engine_on(url: str, **options: Any) -> Engine:
    tier = {"name": "shared", "kind": "redis", "url": url, "retry_s": 0.0, **options}
    return Engine(load_config({"tiers": [tier]}, environ={}))


def load(engine: Engine, **options: Any) -> Any:
    return engine.load_model(
        backend="stub",
        tier=["shared"],
        context_opts={"n_ctx": 2048, "resident_cells_max": 0},
        policy={"boundary_align_tokens": 32},
        **options,
    )


# ------------------------------------------------------------------------ engines


def test_what_one_process_computes_another_restores(start_server: Callable[..., Any]) -> None:
    """Two processes with the same server: the second one computes nothing again."""
    server = start_server()
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_tier_redis import PROMPT, engine_on, load\n"
        "with engine_on(sys.argv[1]) as engine:\n"
        "    done = load(engine).complete(PROMPT, response_tokens=5)\n"
        "    print(done.cache_hit_kind, list(done.generated))\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, server.url, str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(" ", 1)
        for _ in range(2)
    ]
    assert [kind for kind, _ in said] == ["cold", "exact"]
    assert said[0][1] == said[1][1]


def test_a_server_that_dies_fails_no_request(start_server: Callable[..., Any]) -> None:
    """Requests are computed while it is gone, and restored again when it is back."""
    server = start_server()
    with engine_on(server.url, rescan_interval_s=0.01) as engine:
        model = load(engine)
        before = model.complete(PROMPT, response_tokens=5)
        engine.flush()
        assert model.complete(PROMPT, response_tokens=5).cache_hit_kind == "exact"
        server.kill()
        during = model.complete(PROMPT, response_tokens=5)
        assert (during.generated, during.cache_hit_kind) == (before.generated, "cold")
        engine.flush()
        assert engine.cache.counters().tier_errors > 0
        server.start()
        # It came back empty, which the next look at it tells.
        for _ in range(1000):
            done = model.complete(PROMPT, response_tokens=5)
            assert done.generated == before.generated
            engine.flush()
            if done.cache_hit_kind == "exact":
                break
        assert done.cache_hit_kind == "exact"


def test_a_server_that_is_not_there_yet_is_used_when_it_comes(
    start_server: Callable[..., Any],
) -> None:
    """An engine starts without the server, and stores there as soon as it runs."""
    server = start_server()
    server.kill()
    with engine_on(server.url) as engine:
        model = load(engine)
        assert model.complete(PROMPT, response_tokens=5).cache_hit_kind == "cold"
        engine.flush()
        server.start()
        model.complete(PROMPT + "now", response_tokens=5)
        engine.flush()
        client = redis.Redis.from_url(server.url)
        assert client.hlen(Names("erllama:").sizes) > 0
        client.close()


def test_a_server_that_hangs_is_given_up_in_time(start_server: Callable[..., Any]) -> None:
    """A command that gets no answer is an error after timeout_s, and the next one at once."""
    server = start_server()
    tier = RedisTier(Server(RedisOptions(url=server.url, timeout_s=0.2, retry_s=60.0)))
    thing = put(tier, 1)
    server._process.send_signal(subprocess.signal.SIGSTOP)  # type: ignore[attr-defined]
    try:
        with pytest.raises(TierError, match="cannot be reached"):
            read(tier, thing)
        with pytest.raises(TierError, match="is asked again in"):
            read(tier, thing)
        (failure,) = tier.scan()
        assert isinstance(failure, ScanFailure)
    finally:
        server._process.send_signal(subprocess.signal.SIGCONT)  # type: ignore[attr-defined]
        tier.close()


# ------------------------------------------------------------------------- limits


def test_objects_expire_after_their_last_use(open_tier: Any, client: Any, prefix: str) -> None:
    """The server drops what was not used for expire_s; a read begins the time anew."""
    tier = open_tier(expire_s=1000)
    thing, other = put(tier, 1), put(tier, 2)
    key = Names(prefix).object(thing)
    assert 990_000 < client.pttl(key) <= 1_000_000
    client.pexpire(key, 5000)
    read(tier, thing)
    assert client.pttl(key) > 990_000
    client.pexpire(key, 0)
    assert not tier.contains(thing)
    with pytest.raises(BlockNotFound):
        read(tier, thing)
    found = [item.object_id for item in tier.scan() if isinstance(item, ScannedObject)]
    assert found == [other]
    assert tier.usage().used_bytes == make_object(2).size, "what has expired is not counted"
    put(tier, 1)
    assert tier.usage().used_bytes == 2 * make_object(2).size
    client.pexpire(key, 0)
    put(tier, 1)  # before anybody noticed
    assert tier.usage().used_bytes == 2 * make_object(2).size


def test_a_quota_holds_for_all_who_share_the_store(open_tier: Any) -> None:
    """What another process stored counts, and the refused object is not there."""
    size = make_object(1).size
    mine, theirs = open_tier(quota_bytes=3 * size), open_tier(quota_bytes=3 * size)
    for number in range(3):
        put(theirs, number)
    with pytest.raises(TierFull, match="do not fit"):
        put(mine, 3)
    assert mine.usage().used_bytes == 3 * size
    mine.delete(make_object(0).object_id)
    put(mine, 3)
    with pytest.raises(TierFull):
        put(theirs, 4)


def test_a_server_without_memory_is_full(start_server: Callable[..., Any]) -> None:
    """``maxmemory`` is as good as a quota: TierFull, and the books are right."""
    server = start_server("--maxmemory", "4mb")
    tier = RedisTier(Server(RedisOptions(url=server.url)))
    stored = 0

    def fill() -> None:
        nonlocal stored
        for number in range(100):
            put(tier, number, 200_000)
            stored += 1

    with pytest.raises(TierFull, match="maxmemory"):
        fill()
    assert 0 < stored < 100
    assert len(list(tier.scan())) == stored
    assert tier.usage().used_bytes == stored * make_object(0, 200_000).size
    tier.close()


def test_long_headers_are_scanned_whole(open_tier: Any) -> None:
    """A header beyond what a scan reads at first is read again, whole."""
    from erllama_core.interfaces.block import ObjectId, ObjectKind, encode_header

    head = encode_header(
        kind=ObjectKind.KV,
        start=0,
        end=4000,
        namespace=bytes(32),
        key=b"k" * 32,
        segment_key=bytes(32),
        lead_tokens=b"",
        tokens=bytes(16_000),
        align_tokens=4096,
        payload=b"payload",
        info={},
    )
    tier = open_tier()
    tier.put(ObjectId(ObjectKind.KV, 0, b"k" * 32), [head, b"payload"])
    (item,) = tier.scan()
    assert item.head[: len(head)] == head


# ------------------------------------------------------------------------ sharing


def test_one_process_is_the_janitor(open_tier: Any) -> None:
    """The first that asks leads, until it is closed or its lease is over."""
    first, second = open_tier(), open_tier()
    assert first.lead()
    assert first.lead()
    assert not second.lead()
    first.close()
    third = open_tier()
    assert third.lead()


def test_a_server_that_lost_everything_is_told_of(start_server: Callable[..., Any]) -> None:
    """After it came back empty, a rescan says of each object that it is gone."""
    server = start_server()
    tier = RedisTier(Server(RedisOptions(url=server.url, retry_s=0.0)))
    stored = {put(tier, number) for number in range(5)}
    assert {i.object_id for i in tier.scan() if isinstance(i, ScannedObject)} == stored
    server.kill()
    (failure,) = tier.rescan()
    assert isinstance(failure, ScanFailure)
    server.start()
    assert {item.object_id for item in tier.rescan() if isinstance(item, Gone)} == stored
    assert tier.usage().used_bytes == 0
    assert list(tier.rescan()) == []
    tier.close()


def test_who_is_far_behind_scans_everything(open_tier: Any, client: Any, prefix: str) -> None:
    """When the log no longer reaches back to what was seen, nothing is missed."""
    mine, theirs = open_tier(), open_tier()
    put(mine, 0)
    assert len(list(mine.scan())) == 1
    for number in range(1, 5):
        put(theirs, number)
    theirs.delete(make_object(1).object_id)
    client.xtrim(Names(prefix).log, maxlen=1, approximate=False)
    told = {item.object_id for item in mine.rescan() if isinstance(item, ScannedObject)}
    assert told == {make_object(number).object_id for number in (0, 2, 3, 4)}
    put(theirs, 5)
    theirs.delete(make_object(2).object_id)
    news = list(mine.rescan())
    assert [type(item) for item in news] == [Gone, ScannedObject]
    assert list(mine.rescan()) == []


def test_the_log_is_bounded(open_tier: Any) -> None:
    """Its length is limited by every script that writes to it."""
    for script in (scripts.PUT, scripts.DELETE):
        assert f"'MAXLEN', '~', {scripts.LOG_LENGTH}" in script


# ------------------------------------------------------------------ configuration


def test_what_others_wrote_into_the_books(open_tier: Any, client: Any, prefix: str) -> None:
    """Scores, names, pins and sums that are none are passed over or told; objects stay readable."""
    tier, names = open_tier(), Names(prefix)
    object_id = put(tier, 1)
    client.zadd(names.used, {str(object_id): float("inf")})
    client.hset(names.sizes, b"\xff no name", 3)
    client.sadd(names.pins, b"short", b"p" * 32)
    client.set(names.bytes, b"many")
    found = list(open_tier().scan())
    (scanned,) = [one for one in found if isinstance(one, ScannedObject)]
    assert scanned.object_id == object_id
    assert scanned.last_used_ns < 1 << 63
    reasons = " ".join(one.reason for one in found if isinstance(one, ScanFailure))
    assert "b'many', which is no number of bytes" in reasons
    assert "not an object name" in reasons
    assert tier.find(object_id).last_used_ns == 0
    assert list(tier.pins()) == [b"p" * 32]
    assert read(tier, object_id)


def test_logins_and_what_is_shown_of_them(start_server: Callable[..., Any], tmp_path: Path) -> None:
    """The password comes from a file; a wrong one is told, and none is ever shown."""
    server = start_server("--requirepass", "open sesame")
    secret = tmp_path / "secret"
    secret.write_text("open sesame\n")
    tier = RedisTier(Server(RedisOptions(url=server.url, password_file=secret)))
    thing = put(tier, 1)
    assert "sesame" not in tier.location(thing)
    tier.close()
    secret.write_text("wrong word\n")
    for password_file in (secret, None):
        tier = RedisTier(Server(RedisOptions(url=server.url, password_file=password_file)))
        with pytest.raises(TierError, match=r"password_file|NOAUTH") as caught:
            put(tier, 2)
        assert "wrong word" not in str(caught.value)
        tier.close()
    with pytest.raises(TierError, match="cannot read the password_file"):
        Server(RedisOptions(password_file=tmp_path / "missing"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "http://localhost"}, "redis://host:6379/0"),
        ({"url": "redis://:secret@localhost"}, "password_file"),
        ({"prefix": ""}, "prefix"),
        ({"expire_s": 0.5}, "expire_s"),
        ({"quota_bytes": 0}, "quota_bytes"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    """Each is a ConfigError that says what is needed, before any server is asked."""
    table = {"name": "shared", "kind": "redis", **options}
    with pytest.raises(ConfigError, match=words) as caught:
        Engine(load_config({"tiers": [table]}, environ={}))
    assert "secret@" not in str(caught.value)


def test_the_plugin_is_listed() -> None:
    """It is found by its entry point, and works without a server."""
    (row,) = (row for row in PluginHost().listing() if row.name == "redis")
    assert (row.kind, row.distribution, row.state) == ("tier", "erllama-tier-redis", "ok")
