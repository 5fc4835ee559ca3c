"""A deterministic model without weights, for tests of erllama and of applications."""

from erllama_backend_stub.context import StubContext
from erllama_backend_stub.faults import HangGate, gate
from erllama_backend_stub.model import StubModel, open_model
from erllama_backend_stub.options import StubFaults, StubOptions
from erllama_backend_stub.sampler import StubSampler
from erllama_backend_stub.status import Status
from erllama_backend_stub.vocabulary import VOCABULARY, StubVocabulary

__all__ = [
    "VOCABULARY",
    "HangGate",
    "Status",
    "StubContext",
    "StubFaults",
    "StubModel",
    "StubOptions",
    "StubSampler",
    "StubVocabulary",
    "gate",
    "open_model",
]
