"""Tokens on their way out: the pipeline, its built-in processors, and the stream."""
