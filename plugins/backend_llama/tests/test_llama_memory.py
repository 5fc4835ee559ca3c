"""The estimate of a model's memory, against what llama.cpp then allocates."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from erllama_backend_llama import memory, plugin
from erllama_backend_llama.memory import estimate_memory
from erllama_backend_llama.model import load_model
from erllama_backend_llama.options import LlamaOptions
from erllama_core.errors import ModelLoadError
from erllama_core.interfaces.backend import BackendRequest, ContextOptions
from tiny_gguf import ARCHS, write_tiny_gguf

MIB = 1 << 20


def request(path: Path, **context: object) -> BackendRequest:
    return BackendRequest(
        model_path=path,
        options=LlamaOptions(),
        context=ContextOptions(**{"n_ctx": 4096, "n_seq_max": 3} | context),  # type: ignore[arg-type]
    )


def allocated(wanted: BackendRequest) -> tuple[float, float]:
    """MiB that opening a context allocates, by llama.cpp's log: state, and buffers of a step."""
    model = load_model(wanted)
    try:
        with capture_logs() as logs:
            model.open_context().close()
    finally:
        model.close()
    state = step = 0.0
    for entry in logs:
        found = re.search(
            r"(KV|RS|compute|output) buffer size = +([0-9.]+) MiB", entry.get("line", "")
        )
        if found is not None and found[1] in {"KV", "RS"}:
            state += float(found[2])
        elif found is not None:
            step += float(found[2])
    return state, step


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
@pytest.mark.parametrize("arch", ARCHS)
def test_estimate_is_what_is_allocated(tmp_path: Path, arch: str, unified: bool) -> None:
    """Of every kind of memory the estimate is what is allocated afterwards, to a few percent."""
    path = write_tiny_gguf(tmp_path / "m.gguf", arch)  # type: ignore[arg-type]
    wanted = request(path, kv_unified=unified)
    estimate = estimate_memory(wanted)
    assert estimate is not None
    state, step = allocated(wanted)
    assert state > 0
    # Sizes are told in hundredths of a MiB.
    assert estimate.kv_bytes / MIB == pytest.approx(state, abs=0.05)
    assert estimate.compute_bytes / MIB == pytest.approx(step, rel=0.1, abs=0.1)
    tensors = path.stat().st_size - estimate.weights_bytes
    assert 0 < tensors < 100_000, "all but the metadata"


def test_estimate_follows_the_options(tmp_path: Path) -> None:
    """Longer contexts and wider elements take more, in proportion."""
    path = write_tiny_gguf(tmp_path / "m.gguf")

    def kv(**context: object) -> int:
        estimate = estimate_memory(request(path, **context))
        assert estimate is not None
        return estimate.kv_bytes

    assert kv(n_ctx=8192) == 2 * kv(n_ctx=4096)
    assert kv(type_k="f32", type_v="f32") == 2 * kv()
    assert kv(n_seq_max=6, kv_unified=False) == 2 * kv(n_seq_max=3, kv_unified=False)


def test_the_sequence_for_moving_ranges_is_estimated_too(tmp_path: Path) -> None:
    """Of a hybrid model each sequence has a recurrent state, and so has the one beyond callers'."""
    path = write_tiny_gguf(tmp_path / "m.gguf", "qwen35")

    wanted = request(path, n_ctx=256, n_seq_max=1)
    estimate = estimate_memory(wanted)
    assert estimate is not None
    # Of some 0.04 MiB each.
    assert estimate.kv_bytes / MIB == pytest.approx(allocated(wanted)[0], abs=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_estimating_allocates_next_to_nothing(tmp_path: Path) -> None:
    """A context of gigabytes is estimated without taking them."""
    path = write_tiny_gguf(tmp_path / "m.gguf")
    peak = re.compile(r"VmHWM:\s+(\d+) kB")

    def peak_bytes() -> int:
        found = peak.search(Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_bytes()
    estimate = estimate_memory(request(path, n_ctx=1 << 20))
    assert estimate is not None
    assert estimate.kv_bytes == 2 << 30
    assert peak_bytes() - before < 64 * MIB


def test_what_cannot_be_loaded_cannot_be_estimated(tmp_path: Path) -> None:
    """A file that is no model, and a context that cannot be, are refused as by loading."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelLoadError):
        estimate_memory(request(broken))
    path = write_tiny_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelLoadError, match="type_k"):
        estimate_memory(request(path, type_k="f17"))


def test_a_log_without_sizes_is_no_estimate() -> None:
    """Where llama.cpp's log has no word of a memory, nothing is made up."""
    assert (
        memory._sizes(["llama_new: KV buffers are 5 MiB large"], sequences=1, unified=True) is None
    )
    told = [
        "llama_kv_cache: size =    8.00 MiB (  8192 cells,   2 layers)",
        "llama_memory_recurrent: size =    0.50 MiB (     1 cells)",
        "sched_reserve:        CPU compute buffer size =     9.64 MiB",
        "sched_reserve:      CUDA0 compute buffer size =   100.00 MiB",
        "llama_context:  CUDA_Host  output buffer size =     0.25 MiB",
    ]
    compute = int((10.64 if sys.platform != "darwin" else 110.64) * MIB)
    assert memory._sizes(told, sequences=4, unified=True) == (10 * MIB, compute)
    assert memory._sizes(told, sequences=4, unified=False) == (34 * MIB, compute)


def test_the_provider_estimates(tmp_path: Path) -> None:
    """The record that erllama finds offers the estimate; None where loading will refuse."""
    (provider,) = plugin.erllama_backends()
    assert provider.estimate is not None
    estimate = provider.estimate(request(write_tiny_gguf(tmp_path / "m.gguf")))
    assert estimate is not None
    assert estimate.total_bytes > 8 * MIB
    nameless = BackendRequest(model_path=None, options=LlamaOptions(), context=ContextOptions())
    assert provider.estimate(nameless) is None
