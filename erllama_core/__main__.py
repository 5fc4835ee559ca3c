"""``python -m erllama_core``: the ``erllama`` command."""

from erllama_core.cli import main

main()
