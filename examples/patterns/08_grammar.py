"""Replies of a form: grammars and JSON schemas

A grammar (GBNF) governs every token of one request; a JSON schema is made into one. Mistakes are
told at the call, with their place.
"""

import json

from erllama_core import Engine
from erllama_core.errors import InvalidGrammar

GRAMMAR = r"""
root  ::= "{" ws "\"n\":" ws digit "}"
digit ::= [0-9]
ws    ::= [ \t\n]*
"""

with Engine() as engine:
    engine.load_model("chat", backend="stub")
    done = engine.complete("chat", "Reply with JSON:", grammar=GRAMMAR, response_tokens=200)
    print("a digit:", json.loads(done.reply)["n"] in range(10), done.finish_reason)

    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "big": {"type": "boolean"}},
        "required": ["colour", "big"],
        "additionalProperties": False,
    }
    done = engine.complete("chat", "Describe it:", json_schema=schema, response_tokens=400)
    found = json.loads(done.reply)
    print(sorted(found), found["colour"] in ("red", "green"), type(found["big"]).__name__)

    try:
        engine.complete("chat", "Reply:", grammar="root ::= missing")
    except InvalidGrammar as error:
        print(type(error).__name__, "names the rule:", "missing" in str(error))
