"""The stub keeps what every backend promises, in every KV class and to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from erllama_core.conformance import BackendConformance, BackendSubject
from erllama_core.host import PluginHost
from erllama_core.interfaces.backend import BackendModel, BackendRequest, ContextOptions

HOST = PluginHost()


class OfTheStub(BackendConformance):
    """Models without weights; each class other options."""

    __test__ = False
    model_opts: ClassVar[Mapping[str, Any]]

    @pytest.fixture
    def subject(self) -> BackendSubject:
        provider = HOST.get("backend", "stub")
        options = provider.config(**self.model_opts)

        def load(context: ContextOptions) -> BackendModel:
            return provider.factory(
                BackendRequest(model_path=None, options=options, context=context)
            )

        return BackendSubject(
            load=load, write_adapter=lambda path: path.write_bytes(b"stub adapter\n")
        )


class TestStub(OfTheStub):
    __test__ = True
    model_opts: ClassVar = {"add_bos": True}


class TestStubCheckpoint(OfTheStub):
    __test__ = True
    model_opts: ClassVar = {"kv_class": "checkpoint"}


class TestStubWhole(OfTheStub):
    __test__ = True
    model_opts: ClassVar = {"kv_class": "whole"}


class TestStubWindow(OfTheStub):
    """As with a sliding window: long blocks are refused."""

    __test__ = True
    model_opts: ClassVar = {"max_block_tokens": 64}
