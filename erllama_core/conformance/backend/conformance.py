"""All that a backend promises, ability by ability.

::

    from erllama_core.conformance import BackendConformance, BackendSubject

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def subject(self):
            return BackendSubject(load=lambda context: open_my_model(context))

A subject's contexts are of one KV class; derive once for each that the backend has.
"""

from __future__ import annotations

from erllama_core.conformance.backend.adapters import AdapterPromises
from erllama_core.conformance.backend.computing import ComputingPromises
from erllama_core.conformance.backend.constrained import ConstrainedPromises
from erllama_core.conformance.backend.model import ModelPromises
from erllama_core.conformance.backend.ranges import RangePromises
from erllama_core.conformance.backend.restoring import RestoringPromises
from erllama_core.conformance.backend.sampling import SamplingPromises
from erllama_core.conformance.backend.sharing import SharingPromises
from erllama_core.conformance.backend.vocabulary import VocabularyPromises


class BackendConformance(
    VocabularyPromises,
    ModelPromises,
    AdapterPromises,
    SamplingPromises,
    ConstrainedPromises,
    ComputingPromises,
    RestoringPromises,
    RangePromises,
    SharingPromises,
):
    """Derive, and say with a fixture ``subject`` what is tested."""
