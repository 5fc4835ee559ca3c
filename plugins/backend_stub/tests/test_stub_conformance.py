"""The stub keeps what every backend promises, in every KV class and to the last bit."""

from __future__ import annotations

from typing import Any

import pytest

from erllama_backend_stub import StubModel, StubOptions, open_model
from erllama_core.conformance import BackendConformance, BackendSubject
from erllama_core.interfaces.backend import BackendRequest, ContextOptions


def subject(**options: Any) -> BackendSubject:
    def load(context: ContextOptions) -> StubModel:
        return open_model(
            BackendRequest(model_path=None, options=StubOptions(**options), context=context)
        )

    return BackendSubject(load=load, write_adapter=lambda path: path.write_bytes(b"stub adapter\n"))


class TestStub(BackendConformance):
    @pytest.fixture
    def subject(self) -> BackendSubject:
        return subject(add_bos=True)


class TestStubCheckpoint(BackendConformance):
    @pytest.fixture
    def subject(self) -> BackendSubject:
        return subject(kv_class="checkpoint")


class TestStubWhole(BackendConformance):
    @pytest.fixture
    def subject(self) -> BackendSubject:
        return subject(kv_class="whole")


class TestStubWindow(BackendConformance):
    """As with a sliding window: long blocks are refused."""

    @pytest.fixture
    def subject(self) -> BackendSubject:
        return subject(max_block_tokens=64)
