"""The provider ``nvidia``."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_core.errors import PluginUnavailable
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.pressure import PressureSource
from erllama_core.providers import Available, PressureProvider, Unavailable
from erllama_pressure_nvidia.options import NvidiaOptions


def _make(options: NvidiaOptions) -> PressureSource:
    from erllama_pressure_nvidia.source import NvidiaPressure

    return NvidiaPressure(options)


def _probe() -> Available | Unavailable:
    from erllama_pressure_nvidia.nvml import NO_GPU, Nvml

    nvml = Nvml()
    try:
        nvml.open()
        if nvml.device_count() == 0:
            return Unavailable(NO_GPU)
    except PluginUnavailable as error:
        return Unavailable(str(error))
    finally:
        nvml.close()
    return Available()


@hookimpl
def erllama_pressure_sources() -> Sequence[PressureProvider]:
    """``nvidia``."""
    return [
        PressureProvider(
            name="nvidia",
            summary="Memory of NVIDIA GPUs, by NVML.",
            factory=_make,
            config=NvidiaOptions,
            probe=_probe,
        )
    ]
