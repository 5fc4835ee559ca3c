"""The cache alone, without a model

The cache works by itself: it stores payloads of your own under the tokens that they stand for, on
any tier, and reads them back checked. llama.cpp is not even imported.
"""

from erllama_core import BlockMeta, Cache, TierConfig, open_tier
from erllama_core.host import PluginHost

disk = TierConfig(name="demo", kind="disk", options={"root": "kvc"})
with Cache([open_tier(PluginHost(), disk)]) as cache:
    meta = BlockMeta(
        save_reason="cold",
        fingerprint=bytes([0xAA]) * 32,
        fingerprint_mode="safe",
        quant_type="f16",
        quant_bits=16,
        ctx_params_hash=bytes([0xBB]) * 32,
        tokens=[1, 2, 3],
        context_size=4096,
    )
    key, header, size_bytes = cache.save("demo", meta, b"hi")
    info, payload = cache.load("demo", key)
    print(payload, info["save_reason"], header.payload_bytes, "bytes of payload")
    counters = cache.counters()
    print("saved:", counters.saves_cold, "hits:", counters.hits_exact)
