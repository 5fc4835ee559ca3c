"""Which tiers a ``cache`` command is about, and how it opens them.

Everything is opened read-only first: what only looks must change nothing, and what changes
something must not make a cache where there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import click

from erllama_core.cache.tiers import NamedTier
from erllama_core.config import TierConfig, load_config, structure_options
from erllama_core.engine import open_tier
from erllama_core.errors import CacheError, TierError, unknown_name
from erllama_core.host import PluginHost
from erllama_core.interfaces.tier import KeepsPages

_Command = TypeVar("_Command", bound=Callable[..., Any])

_ROOT_KIND: Final = "disk"


@attrs.frozen
class _Place:
    """A tier that can be opened, and where its table is in the configuration."""

    config: TierConfig
    path: str


@attrs.frozen
class Source:
    """The tiers that were asked for."""

    plugins: PluginHost
    places: Mapping[str, _Place]
    """By the tier's name."""
    named: bool
    """Whether ``--tier`` or ``--root`` asked for just this tier."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[list[NamedTier]]:
        """Those tiers that outlive a process, open for reading.

        Raises TierError when there is none, or one cannot be opened.
        """
        with contextlib.ExitStack() as stack:
            tiers = []
            for place in self.places.values():
                named = self._open(place, read_only=True)
                stack.callback(named.tier.close)
                if not isinstance(named.tier, KeepsPages):
                    tiers.append(named)
                elif self.named:
                    raise TierError(
                        f"tier {named.name!r} is memory of the process that uses it; another "
                        f"process cannot look into it"
                    )
            if not tiers:
                raise TierError(
                    f"no tier outlives its process ({', '.join(self.places) or 'none'}); name a "
                    f"configuration with a tier of kind 'disk', or a root with --root"
                )
            yield tiers

    @contextlib.contextmanager
    def opened_to_change(self, names: list[str]) -> Iterator[list[NamedTier]]:
        """The tiers of these names, open for writing. They must have been opened before.

        Raises TierError.
        """
        with contextlib.ExitStack() as stack:
            tiers = []
            for name in names:
                named = self._open(self.places[name], read_only=False)
                stack.callback(named.tier.close)
                tiers.append(named)
            yield tiers

    def require_writable(self) -> None:
        """Raise TierError if the configuration lets nobody change one of the tiers."""
        for place in self.places.values():
            provider = self.plugins.get("tier", place.config.kind)
            options = structure_options(provider.config, place.config.options, place.path)
            if getattr(options, "read_only", False):
                raise TierError(
                    f"tier {place.config.name!r} has read_only = true, so nothing is removed "
                    f"from it; leave it out with --tier, or name its root with --root"
                )

    def _open(self, place: _Place, *, read_only: bool) -> NamedTier:
        config = place.config
        fields = attrs.fields_dict(self.plugins.get("tier", config.kind).config)
        if read_only and "read_only" in fields:
            config = attrs.evolve(config, options={**config.options, "read_only": True})
        try:
            return open_tier(self.plugins, config, path=place.path)
        except (CacheError, OSError) as error:
            raise TierError(f"tier {config.name!r} cannot be opened: {error}") from error


def source_options(command: _Command) -> _Command:
    """The options that every ``cache`` command has: ``--config``, ``--root``, ``--tier``."""
    for option in (
        click.option("--tier", metavar="NAME", help="Only this tier of the configuration."),
        click.option(
            "--root",
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="The root of a disk tier.",
        ),
        click.option(
            "--config",
            "config_file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="All tiers of this configuration that outlive a process.",
        ),
    ):
        command = option(command)
    return command


def find_source(config_file: Path | None, root: Path | None, tier: str | None) -> Source:
    """What the options name. Raises UsageError, ConfigError, TierError."""
    if (config_file is None) == (root is None):
        raise click.UsageError("Say which cache: --config FILE or --root DIR, and not both.")
    if config_file is None:
        if tier is not None:
            raise click.UsageError("--tier chooses among the tiers of a configuration.")
        assert root is not None
        return Source(PluginHost(), {_ROOT_KIND: _Place(_disk(root), "")}, named=True)
    config = load_config(config_file)
    plugins = PluginHost(allow=config.plugins.allow, block=config.plugins.block)
    places = {
        entry.name: _Place(entry, f"tiers[{number}]") for number, entry in enumerate(config.tiers)
    }
    if tier is None:
        return Source(plugins, places, named=False)
    if tier not in places:
        raise click.BadParameter(unknown_name("tier", tier, places), param_hint="'--tier'")
    return Source(plugins, {tier: places[tier]}, named=True)


def _disk(root: Path) -> TierConfig:
    if not root.expanduser().is_dir():
        raise TierError(f"there is no cache at {root}: it is not a folder")
    return TierConfig(_ROOT_KIND, _ROOT_KIND, {"root": str(root)})
