"""What a reply has to look like: GBNF and JSON schemas are read and checked here.

On the caller's thread, before a request is handed to a worker. What comes out is a
:class:`~erllama_core.interfaces.grammar.Grammar`.
"""
