"""Whether an installed plugin was built for this core, by what its distribution requires.

pip refuses such a pair when both are installed together, and lets it come about later, when the
core alone is upgraded. A plugin that was written against other interfaces would then fail
somewhere, in words that do not say why; so its range is read before it is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from erllama_core.errors import PluginFailed


def refuse_other_core(
    core: str, running: str | None, distribution: str, version: str | None, requires: Iterable[str]
) -> None:
    """Raise PluginFailed when ``requires``, of a plugin's distribution, excludes the running core.

    ``requires`` has lines of the metadata field Requires-Dist. A distribution that says nothing
    of ``core`` excludes none, and where the running version is not known (a core that is not
    installed), nothing can be told. A line about the core that cannot be read is refused too.
    """
    if running is None:
        return
    try:
        here = Version(running)
    except InvalidVersion:
        return
    for need in _about(core, requires):
        if need.specifier.contains(here, prereleases=True):
            continue
        plugin = " ".join(part for part in (distribution, version) if part)
        wanted = f"{core}{need.specifier}"
        raise PluginFailed(
            f"{plugin} is built for {wanted}, and this is {core} {here}, so it was not imported. "
            f"Install a release of it for this core: "
            f"pip install --upgrade {distribution} {core}=={here}; "
            f"or the core that it is for: pip install '{wanted}'"
        )


def _about(core: str, requires: Iterable[str]) -> Iterator[Requirement]:
    """What applies to the core here, whichever extras are installed."""
    for line in requires:
        try:
            need = Requirement(line)
        except InvalidRequirement as error:
            name = re.split(r"[^\w.-]", line.strip(), maxsplit=1)[0]
            if canonicalize_name(name) == core:
                raise PluginFailed(
                    f"its metadata has the line 'Requires-Dist: {line}', which cannot be read: "
                    f"{error}"
                ) from error
            continue  # about something else, and that distribution's own matter
        if canonicalize_name(need.name) != core:
            continue
        try:
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
        except (UndefinedComparison, UndefinedEnvironmentName):
            continue
        if applies:
            yield need
