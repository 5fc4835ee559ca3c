"""The stub keeps the contract of contexts, in both modes and to the last bit."""

from __future__ import annotations

from context_contract import N_CTX, N_SEQ, ContextContract
from erllama_backend_stub import StubOptions, open_model
from erllama_core.interfaces.backend import BackendRequest, Context, ContextOptions, KVClass


class TestStubContext(ContextContract):
    def open(self, *, unified: bool, kv_class: KVClass) -> Context:
        return open_model(
            BackendRequest(
                model_path=None,
                options=StubOptions(kv_class=kv_class.value),
                context=ContextOptions(n_ctx=N_CTX, n_seq_max=N_SEQ, kv_unified=unified),
            )
        ).open_context()


class TestStubCheckpoint(TestStubContext):
    """A recurrent state is shared like a whole one."""

    def open(self, *, unified: bool, kv_class: KVClass) -> Context:
        plays = KVClass.CHECKPOINT if kv_class is KVClass.WHOLE else kv_class
        return super().open(unified=unified, kv_class=plays)
