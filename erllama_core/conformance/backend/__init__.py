"""Whether a backend keeps its promises: see :mod:`erllama_core.interfaces.backend`."""

from erllama_core.conformance.backend.conformance import BackendConformance
from erllama_core.conformance.backend.subject import BackendSubject

__all__ = ["BackendConformance", "BackendSubject"]
