"""Replies by a grammar, or a JSON schema

A grammar in llama.cpp's notation, or a JSON schema, says what the reply looks like: whatever the
model would rather say, it says that. A mistake in either is told at once, with its place.
"""

import json

from erllama_core import Engine
from erllama_core.errors import InvalidGrammar

GRAMMAR = r"""
root  ::= "{" ws "\"n\":" ws digit "}"
digit ::= [0-9]
ws    ::= [ \t\n]*
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Oslo", "Rome"]},
        "sunny": {"type": "boolean"},
    },
    "required": ["city", "sunny"],
}

with Engine() as engine:
    engine.load_model("chat", backend="stub")
    done = engine.complete("chat", "Reply with JSON:", grammar=GRAMMAR, response_tokens=32)
    print("keys:", list(json.loads(done.reply)), done.finish_reason)

    done = engine.complete("chat", "Where is it sunny?", json_schema=SCHEMA)
    print("keys:", list(json.loads(done.reply)), done.finish_reason)

    for options in ({"grammar": 'root ::= "a" | b'}, {"json_schema": {"type": "objekt"}}):
        try:
            engine.complete("chat", "?", **options)
        except InvalidGrammar as error:
            print(error)
