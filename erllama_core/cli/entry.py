"""Where the ``erllama`` command starts, with or without the packages that it needs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit.

    As the application, it configures logging: warnings, on standard error, so that standard
    output holds nothing but what was asked for.
    """
    try:
        import click  # noqa: F401 - whether it is there
        import rich  # noqa: F401 - whether it is there
    except ModuleNotFoundError as error:
        print(
            f"The erllama command needs {error.name}: pip install 'erllama-core[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
    from erllama_core.cli.app import app
    from erllama_core.cli.logs import configure_logs

    configure_logs()
    app(prog_name="erllama")
