"""Lets the folder be run; see :mod:`compare.main` for what it takes."""

import sys
from pathlib import Path

# Run as a folder, its own modules are found, but not the package that they are.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from compare.main import main  # noqa: E402 - found only now

if __name__ == "__main__":
    sys.exit(main())
