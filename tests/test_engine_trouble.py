"""Bad input and broken storage: one clear error or one warning, and everything else goes on."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from structlog.testing import capture_logs

from erllama_core import Cache, Engine, NamedTier, load_config
from erllama_core.cache.ram import RamTier
from erllama_core.errors import (
    AlreadyLoaded,
    BlockNotFound,
    ConfigError,
    EngineClosed,
    ModelLoadError,
    PluginFailed,
    PluginMissing,
    TierError,
)
from erllama_core.hookspecs import hookimpl
from erllama_core.host import PluginHost
from erllama_core.interfaces.block import Bytes, ObjectId, decode_header, encode_header
from erllama_core.interfaces.stream import Channel, ProcessorRequest
from erllama_core.interfaces.tier import Allocate, ScanFailure, ScannedObject, TierUsage
from erllama_core.providers import (
    BackendProvider,
    PressureProvider,
    StreamProcessorProvider,
    TierProvider,
)
from stub_engine import KV_CLASSES, load_stub, make_engine

PROMPT = "A block on the disk may be damaged at any place, and the reply must stay the same."


def damage(path: Path, how: str, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        place = chance.randrange(len(data))
        data[place] ^= 1 << chance.randrange(8)
    elif how == "truncate":
        del data[chance.randrange(len(data)) :]
    elif how == "extend":
        data += b"\0" * 7
    elif how == "garbage":
        data = bytearray(chance.randbytes(len(data)))
    path.write_bytes(data)


@pytest.mark.parametrize("kv_class", KV_CLASSES)
@pytest.mark.parametrize("how", ["flip", "truncate", "extend", "garbage", "delete", "swap"])
def test_damaged_files_are_dropped_and_counted(tmp_path: Path, how: str, kv_class: str) -> None:
    """Whatever happens to files, before or after they were indexed, output is the cold one."""
    chance = random.Random(f"{how} {kv_class}")
    with make_engine(tmp_path) as engine:
        expected = load_stub(engine, tier=["disk"], kv_class=kv_class).complete(
            PROMPT, response_tokens=8
        )
    files = sorted(tmp_path.rglob("*.kvc"))
    assert files

    def spoil() -> None:
        if how == "swap":
            contents = [path.read_bytes() for path in files]
            for path, content in zip(files, contents[1:] + contents[:1], strict=True):
                path.write_bytes(content)
        for path in files:
            if how == "delete":
                path.unlink(missing_ok=True)
            elif how != "swap":
                damage(path, how, chance)

    pristine = {path: path.read_bytes() for path in files}
    for after_scan in (False, True):
        for path, content in pristine.items():
            path.write_bytes(content)
        if not after_scan:
            spoil()
        with capture_logs() as logs, make_engine(tmp_path) as engine:
            model = load_stub(engine, tier=["disk"], kv_class=kv_class)
            assert engine.cache.wait_scanned(10)
            if after_scan:
                spoil()
            done = model.complete(PROMPT, response_tokens=8)
            assert done.generated == expected.generated
            # A flipped bit may lie in padding, where it changes nothing.
            if how not in {"flip", "delete"}:
                assert engine.cache.counters().corrupt > 0
            assert done.cache_hit_kind != "exact" or how == "flip"
            # Damage in an object that was not asked for yet is found when it is.
            for _ in range(3):
                engine.flush()
                again = model.complete(PROMPT, response_tokens=8)
                assert again.generated == expected.generated
            assert again.cache_hit_kind == "exact"
        assert not [entry for entry in logs if entry["log_level"] == "error"]


def forge(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change an object's payload, with the checksums that belong to it."""
    data = path.read_bytes()
    header = decode_header(data)
    payload = change(data[header.header_bytes :])
    assert len(payload) == header.payload_bytes
    head = encode_header(
        kind=header.kind,
        start=header.start,
        end=header.end,
        namespace=header.namespace,
        key=header.key,
        segment_key=header.segment_key,
        lead_tokens=header.lead_tokens,
        tokens=header.tokens,
        align_tokens=header.align_tokens,
        payload=payload,
        info=header.info,
    )
    path.write_bytes(head + payload)


FORGERIES: dict[str, Callable[[bytes], bytes]] = {
    "tokens outside the vocabulary": lambda p: (
        p[:16] + b"\xff\xff\xff\x7f" * (len(p) // 8 - 2) + p[16 + (len(p) - 16) // 2 :]
    ),
    "another vocabulary": lambda p: p[:4] + (1 << 20).to_bytes(4, "little") + p[8:],
    "no numbers": lambda p: p[: 16 + (len(p) - 16) // 2] + b"\0\0\xc0\x7f" * (len(p) // 8 - 2),
}
"""Payloads of marks that are structurally right."""


@pytest.mark.parametrize("kv_class", KV_CLASSES)
@pytest.mark.parametrize("how", FORGERIES)
def test_forged_logits_are_computed_anew(tmp_path: Path, how: str, kv_class: str) -> None:
    """Logits with right checksums that cannot be this model's fail no request; met twice, they
    are removed.
    """
    prompt = "The lamp was lit for the first time in the autumn, and all of them came to see it."
    with make_engine(tmp_path) as engine:
        model = load_stub(engine, tier=["disk"], kv_class=kv_class)
        cold = model.complete(prompt, response_tokens=4)
    marks = list(tmp_path.rglob("*.logits.kvc"))
    assert marks
    for path in marks:
        forge(path, FORGERIES[how])
    with make_engine(tmp_path) as engine:
        model = load_stub(engine, tier=["disk"], kv_class=kv_class)
        assert engine.cache.wait_scanned(10)
        for rejected in (1, 2, 2):
            assert model.complete(prompt, response_tokens=4).generated == cold.generated
            assert engine.cache.counters().state_rejected == rejected
            engine.cache.flush()


def test_an_unwritable_root_is_one_warning(tmp_path: Path) -> None:
    """A tier that cannot be opened is left out; the model runs with the others."""
    (tmp_path / "file").write_text("in the way")
    with capture_logs() as logs, make_engine(tmp_path / "file" / "root") as engine:
        model = load_stub(engine, tier=["ram", "disk"])
        model.complete(PROMPT, response_tokens=4)
        assert model.complete(PROMPT, response_tokens=4).cache_hit_kind == "exact"
        assert model.info().tiers == ("ram",)
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [entry["event"] for entry in warnings] == ["tier.not_opened"]
    assert str(tmp_path / "file" / "root") in warnings[0]["error"]


def _breaks(_request: object) -> Any:
    raise KeyError("nothing there")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (_breaks, "nothing there"),
        (lambda _request: 5, "its factory returned a int, which is no "),
    ],
    ids=["raises", "returns something else"],
)
def test_a_factory_that_is_wrong(factory: Any, words: str) -> None:
    """It takes out what it was to make, in words that name the provider; all else works."""

    class Broken:
        @hookimpl
        def erllama_backends(self) -> list[BackendProvider]:
            return [BackendProvider("broken", "s", factory)]

        @hookimpl
        def erllama_tiers(self) -> list[TierProvider]:
            return [TierProvider("broken", "s", factory)]

        @hookimpl
        def erllama_stream_processors(self) -> list[StreamProcessorProvider]:
            return [StreamProcessorProvider("broken", "s", factory)]

        @hookimpl
        def erllama_pressure_sources(self) -> list[PressureProvider]:
            return [PressureProvider("broken", "s", factory)]

    host = PluginHost()
    host.register(Broken())
    config = load_config(
        {
            "tiers": [{"name": "lost", "kind": "broken"}],
            "pressure": {"source": ["broken", "noop"]},
        }
    )
    with capture_logs() as logs, Engine(config, plugins=host) as engine:
        assert engine.cache.tier_names() == ("ram",)
        (told,) = (entry for entry in logs if entry["event"] == "tier.not_opened")
        assert told["tier"] == "lost"
        assert "the tier kind 'broken'" in told["error"]
        assert words in told["error"]
        with pytest.raises(ModelLoadError, match="the backend 'broken' failed") as caught:
            engine.load_model(backend="broken")
        assert words in str(caught.value)
        with_processor = engine.load_model(backend="stub", processors=["broken"])
        with pytest.raises(PluginFailed, match="the stream processor 'broken'") as failed:
            with_processor.complete(PROMPT, response_tokens=2)
        assert words in str(failed.value)
        sources = {source.name: source for source in engine.pressure.force_check().sources}
        assert sources["noop"].state == "ok"
        assert words in (sources["broken"].error or "")
        model = load_stub(engine)
        model.complete(PROMPT, response_tokens=4)
        assert model.complete(PROMPT, response_tokens=4).cache_hit_kind == "exact"


class DictTier:
    """The plainest tier that a third party may write; its operations can be made to raise."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error
        self.failing = False
        self.objects: dict[ObjectId, bytes] = {}

    def put(self, object_id: ObjectId, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        self._maybe_fail()
        self.objects[object_id] = b"".join(parts)

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        self._maybe_fail()
        data = self.objects.get(object_id)
        if data is None:
            raise BlockNotFound(str(object_id))
        buffer = allocate(len(data))
        buffer[:] = data
        return buffer

    def delete(self, object_id: ObjectId) -> int:
        return len(self.objects.pop(object_id, b""))

    def contains(self, object_id: ObjectId) -> bool:
        return object_id in self.objects

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        return iter(())

    def usage(self) -> TierUsage:
        return TierUsage(sum(map(len, self.objects.values())), None)

    def location(self, object_id: ObjectId) -> str:
        return str(object_id)

    def close(self) -> None:
        pass

    def _maybe_fail(self) -> None:
        if self.failing:
            raise self.error()


@pytest.mark.parametrize(
    "error", [lambda: TierError("broken"), lambda: OSError(5, "I/O error"), lambda: ValueError("?")]
)
def test_a_tier_that_raises_is_logged_once(
    error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trouble is counted each time, logged when it starts and when it ends; requests go on."""
    monkeypatch.setattr("erllama_core.cache.tiers.CALM_S", 0.0)
    tier = DictTier(error)
    host = PluginHost()

    class Plugin:
        @hookimpl
        def erllama_tiers(self) -> list[TierProvider]:
            return [TierProvider("failing", "", lambda _: tier)]

    host.register(Plugin())

    config = load_config({"tiers": [{"name": "bad", "kind": "failing"}]}, environ={})
    with capture_logs() as logs, Engine(config, plugins=host) as engine:
        model = load_stub(engine, tier=["bad"])
        tier.failing = True
        first = model.complete(PROMPT, response_tokens=4)
        engine.flush()
        assert model.complete(PROMPT, response_tokens=4).generated == first.generated
        engine.flush()
        assert engine.cache.counters().tier_errors >= 2
        assert engine.cache.counters().saves_dropped > 2
        tier.failing = False
        model.complete(PROMPT, response_tokens=4)
        engine.flush()
        assert model.complete(PROMPT, response_tokens=4).cache_hit_kind == "exact"
        tier.failing = True
        assert model.complete(PROMPT, response_tokens=4).generated == first.generated
    events = [entry["event"] for entry in logs if entry["event"].startswith("tier.")]
    assert events[:2] == ["tier.failed", "tier.recovered"]
    assert events.count("tier.failed") == 2


def test_what_is_not_there_is_named() -> None:
    """Backends, tiers, files and models that do not exist: each error says what to do."""
    with make_engine() as engine:
        with pytest.raises(PluginMissing, match="did you mean 'stub'"):
            engine.load_model(backend="stubb")
        with pytest.raises(ConfigError, match="unknown tier 'rma'; did you mean 'ram'"):
            engine.load_model(backend="stub", tier=["rma"])
        with pytest.raises(ModelLoadError, match="does not exist"):
            engine.load_model(backend="stub", model_path="/nowhere/model.gguf")
        with pytest.raises(ConfigError, match=r"model_opts\.kv_clas"):
            engine.load_model(backend="stub", model_opts={"kv_clas": "span"})
        with pytest.raises(ModelLoadError):
            engine.load_model("x", backend="stub", model_opts={"faults": {"fail_load": True}})
        load_stub(engine, "x")  # a failed load leaves the id free
        with pytest.raises(AlreadyLoaded, match="'x'"):
            load_stub(engine, "x")


def test_a_wrong_description_of_the_weights_is_refused(tmp_path: Path) -> None:
    """A fingerprint or a quantisation that contradicts the file is an error, not an identity."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"some weights")
    with make_engine() as engine:
        with pytest.raises(ConfigError, match="fingerprint"):
            engine.load_model(backend="stub", model_path=str(weights), fingerprint="ab" * 32)
        with pytest.raises(ConfigError, match="quant_bits"):
            engine.load_model(backend="stub", quant_bits=4)
        with pytest.raises(ConfigError, match="quant_type"):
            engine.load_model(backend="stub", quant_type="q4_k_m")
        trusted = engine.load_model(
            backend="stub",
            model_path=str(weights),
            fingerprint="ab" * 32,
            fingerprint_mode="fast_unsafe",
        )
        assert trusted.info().fingerprint == "ab" * 32


def test_a_processor_that_raises_ends_its_request_only() -> None:
    """A plugin's exception is that request's PluginFailed, with its cause."""

    class Careless:
        def __init__(self, request: ProcessorRequest) -> None:
            self._outlet = request.outlet

        def feed(self, token: int, data: bytes, channel: Channel) -> None:
            if token == ord("!"):
                raise ZeroDivisionError("careless")
            self._outlet.send(token, data, channel)

        def flush(self) -> None:
            return

        def finish(self) -> None:
            return

    class Plugin:
        @hookimpl
        def erllama_stream_processors(self) -> Sequence[StreamProcessorProvider]:
            return [StreamProcessorProvider("careless", "", Careless)]

    host = PluginHost()
    host.register(Plugin())
    with capture_logs(), Engine(plugins=host) as engine:
        model = engine.load_model(
            backend="stub",
            context_opts={"n_seq_max": 2},
            processors=["careless"],
            model_opts={"script": ["ab!c"]},
        )
        prompt = model.apply_chat_template([{"role": "user", "content": "x"}])
        with pytest.raises(PluginFailed) as caught:
            model.complete(prompt)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert len(model.complete(prompt, response_tokens=2).generated) == 2
        engine.flush()
        assert model.info().available_seqs == 2


def test_too_many_bytes_on_their_way_are_dropped() -> None:
    """What finds no room in the save buffers is counted and not waited for."""
    with make_engine(cache={"max_inflight_bytes": 2000}) as engine:
        model = load_stub(engine)
        first = model.complete(PROMPT * 4, response_tokens=4)
        engine.flush()
        again = model.complete(PROMPT * 4, response_tokens=4)
        assert again.generated == first.generated


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_does_not_use_the_parents_engine() -> None:
    """In a forked child the engine and its cache refuse; the parent's go on."""
    with make_engine() as engine:
        model = load_stub(engine)
        child = os.fork()
        if not child:
            refused = 0
            for use in (lambda: engine.complete("stub", PROMPT), engine.cache.dump, engine.close):
                try:
                    use()
                except EngineClosed:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert model.complete(PROMPT, response_tokens=2).finish_reason == "length"


# ---------------------------------------------------------------- explicit saves


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    from erllama_core import TierConfig, open_tier

    tier = open_tier(PluginHost(), TierConfig("d", "disk", {"root": str(tmp_path)}))
    with Cache([tier, NamedTier("ram", "ram", RamTier(1 << 20))]) as opened:
        yield opened


def test_the_smoke_sequence(cache: Cache) -> None:
    """Save, miss, hit: the cache works without any model, and counts what happened."""
    from erllama_core import BlockMeta, CacheKey

    meta = BlockMeta(
        save_reason="cold",
        fingerprint=b"\xaa" * 32,
        quant_type="f16",
        quant_bits=16,
        ctx_params_hash=b"\xbb" * 32,
        tokens=[1, 2, 3],
        context_size=4096,
        prompt_text="abc",
    )
    with pytest.raises(BlockNotFound):
        cache.load("d", CacheKey(bytes(32)))
    key, header, size = cache.save("d", meta, b"hi")
    assert (header.end, header.payload_bytes) == (3, 2)
    info, payload = cache.load("d", key)
    assert (payload, info["prompt_text"], info["quant_type"]) == (b"hi", "abc", "f16")
    counters = cache.counters()
    assert (counters.saves_cold, counters.misses, counters.hits_exact) == (1, 1, 1)
    [row] = cache.dump()
    assert (row.tier, row.key, row.size_bytes, row.status) == ("d", key, size, "stored")
    assert Path(row.location).stat().st_size == size
    other, _, _ = cache.save("ram", attrs.evolve(meta, context_size=8192), memoryview(b"other"))
    assert other != key
    assert cache.load("ram", other)[1] == b"other"
    with pytest.raises(BlockNotFound):
        cache.load("ram", key)
    with pytest.raises(ValueError, match="unknown tier"):
        cache.load("dd", key)
    assert cache.gc().rows == 2
    assert cache.dump() == []
    assert not list(Path(row.location).parent.parent.rglob("*.kvc"))


def test_an_explicit_save_is_never_a_models(tmp_path: Path) -> None:
    """What a caller stored under the tokens of a prompt does not make that prompt hit."""
    from erllama_core import BlockMeta

    with make_engine(tmp_path) as engine:
        model = load_stub(engine, tier=["disk"])
        meta = BlockMeta(
            save_reason="cold",
            fingerprint=bytes(32),
            quant_type="f32",
            quant_bits=32,
            ctx_params_hash=bytes(32),
            tokens=list(PROMPT.encode()),
            context_size=1024,
        )
        engine.cache.save("disk", meta, b"nonsense")
        assert model.complete(PROMPT, response_tokens=2).cache_hit_kind == "cold"
