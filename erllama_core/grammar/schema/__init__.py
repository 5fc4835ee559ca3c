"""JSON schemas as grammars: the GBNF of the JSON texts that a schema describes.

Every text of the grammar is valid by the schema. Not every valid one is a text of it: an object's
properties come in the schema's order, ``properties`` without ``additionalProperties`` are all that
there are, white space is what JSON is usually written with, and numbers have a bounded number of
digits. What a grammar cannot say is refused, with its path within the schema.
"""

from erllama_core.grammar.schema.convert import gbnf_of_schema

__all__ = ["gbnf_of_schema"]
