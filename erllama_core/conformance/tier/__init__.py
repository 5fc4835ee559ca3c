"""Whether a tier keeps its promises: see :mod:`erllama_core.interfaces.tier`."""

from erllama_core.conformance.tier.conformance import TierConformance
from erllama_core.conformance.tier.subject import RawStore, TierSubject

__all__ = ["RawStore", "TierConformance", "TierSubject"]
