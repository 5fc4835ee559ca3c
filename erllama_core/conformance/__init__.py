"""Whether a plugin keeps the promises that the core relies on: test classes to derive from.

Installed with ``erllama-core[conformance]``. Each class asks for one fixture, ``subject``, and
brings everything else; every test's docstring ends with what it means when it fails.
"""

import erllama_core.conformance.rewriting  # noqa: F401 - before the modules that it is for
from erllama_core.conformance.backend import BackendConformance, BackendSubject
from erllama_core.conformance.kit import no_leaks
from erllama_core.conformance.pressure import PressureConformance, PressureSubject
from erllama_core.conformance.stream import ProcessorConformance, ProcessorSubject
from erllama_core.conformance.tier import RawStore, TierConformance, TierSubject

__all__ = [
    "BackendConformance",
    "BackendSubject",
    "PressureConformance",
    "PressureSubject",
    "ProcessorConformance",
    "ProcessorSubject",
    "RawStore",
    "TierConformance",
    "TierSubject",
    "no_leaks",
]
