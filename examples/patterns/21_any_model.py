"""Six checks on any GGUF model

Cold, warm after a restart, resumed by parent key, longest prefix, evicted, two models at once: the
suite runs with the model that ``ERLLAMA_TEST_MODEL`` names, or the demo model. Here is the second
of them; ``pytest -m real_model tests/test_any_model.py`` runs all.
"""

from erllama_core import Engine

config = {"tiers": [{"name": "disk", "kind": "disk", "root": "kvc"}]}
PROMPT = "The keeper of the lamp climbed the stairs each evening, and counted them. " * 6

replies = []
for _ in range(2):
    with Engine.from_config(config) as engine:
        model = engine.load_model(model_path="model.gguf", tier=["disk"])
        engine.cache.wait_scanned()
        replies.append(model.complete(PROMPT, response_tokens=8))
print([reply.cache_hit_kind for reply in replies])
print("the same reply:", replies[0].generated == replies[1].generated)
