"""The pressure sources that a configuration names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from erllama_core.config import PressureConfig, structure_options
from erllama_core.config.structuring import dotted
from erllama_core.errors import PluginUnavailable
from erllama_core.host import PluginHost
from erllama_core.interfaces.pressure import PressureSource
from erllama_core.providers import PressureProvider, Unavailable, check_made


def pressure_sources(
    config: PressureConfig, plugins: PluginHost
) -> Mapping[str, Callable[[], PressureSource]]:
    """By their names, what opens the sources.

    Raises PluginMissing, with what to install, PluginDuplicate, PluginFailed, ConfigError. That
    a source cannot work on this machine shows when it is opened.
    """
    openers = {}
    for name in config.source:
        provider = plugins.registry.find("pressure", name)
        assert isinstance(provider, PressureProvider)
        given = config.source_options.get(name, {})
        options = structure_options(provider.config, given, dotted("pressure", [name]))
        openers[name] = functools.partial(_open, provider, options)
    return openers


def _open(provider: PressureProvider, options: Any) -> PressureSource:
    """Asked anew each time: what is missing, such as a driver, may have come meanwhile."""
    answer = provider.probe()
    if isinstance(answer, Unavailable):
        raise PluginUnavailable(answer.reason)
    return check_made(provider.factory(options), PressureSource)
