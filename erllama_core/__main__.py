"""``python -m erllama_core``: the ``erllama`` command."""

import sys

from erllama_core.cli import main

sys.exit(main())
