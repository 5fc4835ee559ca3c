"""The ``erllama`` command."""

from erllama_core.cli.entry import main

__all__ = ["main"]
