"""Give memory back before it is taken

A monitor reads its sources; at the high watermark, confirmed by a second reading, it evicts from
the tiers in memory down to the low one. Any object with ``sample`` and ``close`` is a source.
"""

from erllama_core import Engine, PluginHost
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.pressure import PressureReading
from erllama_core.providers import PressureProvider


class Gauge:
    used = 50

    def sample(self) -> tuple[PressureReading, ...]:
        return (PressureReading("a memory of mine", Gauge.used, 100),)

    def close(self) -> None:
        pass


class Plugin:
    @hookimpl
    def erllama_pressure_sources(self) -> list[PressureProvider]:
        return [PressureProvider("gauge", "a number", lambda _: Gauge())]


host = PluginHost()
host.register(Plugin())
config = {
    "pressure": {
        "enabled": True,
        "source": "gauge",
        "high_watermark": 0.85,
        "low_watermark": 0.75,
        "evict_tiers": ["ram", "ram_file"],  # disk fills to its own quota
    }
}
with Engine.from_config(config, plugins=host) as engine:
    engine.load_model("chat", backend="stub", context_opts={"n_ctx": 4096})
    engine.complete("chat", "Some context that is kept in RAM. " * 20, response_tokens=8)
    engine.flush()
    before = len(engine.cache.dump())
    engine.pressure.force_check()
    print("half full:", len(engine.cache.dump()) == before)
    Gauge.used = 95
    engine.pressure.force_check()
    print("nearly full, something went:", len(engine.cache.dump()) < before)
