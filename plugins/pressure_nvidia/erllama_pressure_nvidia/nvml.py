"""The calls into NVML that a pressure source needs, with errors in words.

NVML counts its users, so that two sources in one process each open and close it by themselves.
"""

from __future__ import annotations

from typing import Any, Final

import attrs
import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py ships no types

from erllama_core.errors import PluginUnavailable

NO_GPU: Final = "the NVIDIA driver is there, but no GPU"


class NoSuchDevice(PluginUnavailable):
    """There is no GPU of that index or UUID."""


@attrs.frozen
class Device:
    """A GPU, or a MIG slice of one."""

    handle: Any
    resource: str
    """``"gpu:<index>"``; a slice that was found in its GPU ``"gpu:<index>/mig:<number>"``, one that
    was asked for by its UUID, which tells neither, by that."""


class Nvml:
    """NVML between :meth:`open` and :meth:`close`. For one thread at a time.

    Every method but ``close`` raises PluginUnavailable with what NVML says.
    """

    def __init__(self) -> None:
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether calls may be made."""
        return self._is_open

    def open(self) -> None:
        """Load the driver's library and start it. Idempotent."""
        if self._is_open:
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound as error:
            raise PluginUnavailable(
                "the library of the NVIDIA driver (libnvidia-ml.so.1) cannot be loaded; install "
                "the driver, or run the container with its GPUs"
            ) from error
        except pynvml.NVMLError_DriverNotLoaded as error:
            raise PluginUnavailable(
                "the NVIDIA driver is installed but its kernel module is not loaded"
            ) from error
        except pynvml.NVMLError as error:
            raise PluginUnavailable(f"NVML cannot be started: {error}") from error
        self._is_open = True

    def device_count(self) -> int:
        """GPUs that NVML sees."""
        try:
            return int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as error:
            raise PluginUnavailable(f"NVML cannot count the GPUs: {error}") from error

    def device(self, name: int | str) -> Device:
        """The GPU with this index or UUID. Raises NoSuchDevice."""
        try:
            if isinstance(name, int):
                return Device(pynvml.nvmlDeviceGetHandleByIndex(name), f"gpu:{name}")
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        except (pynvml.NVMLError_InvalidArgument, pynvml.NVMLError_NotFound) as error:
            raise NoSuchDevice(
                f"there is no GPU {name!r}; NVML sees {self.device_count()} (`nvidia-smi -L` "
                f"lists them)"
            ) from error
        except pynvml.NVMLError as error:
            raise PluginUnavailable(f"NVML cannot open GPU {name!r}: {error}") from error
        try:
            return Device(handle, f"gpu:{pynvml.nvmlDeviceGetIndex(handle)}")
        except pynvml.NVMLError:
            return Device(handle, f"gpu:{name}")

    def slices(self, device: Device) -> tuple[Device, ...]:
        """The MIG slices of a GPU; none when it is not cut up, or the driver knows no such thing.

        Never raises.
        """
        try:
            current, _pending = pynvml.nvmlDeviceGetMigMode(device.handle)
            if current != pynvml.NVML_DEVICE_MIG_ENABLE:
                return ()
            places = int(pynvml.nvmlDeviceGetMaxMigDeviceCount(device.handle))
        except pynvml.NVMLError:
            return ()
        found = []
        for number in range(places):
            try:
                handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device.handle, number)
            except pynvml.NVMLError:
                continue  # nothing at this place, or not for this process
            found.append(Device(handle, f"{device.resource}/mig:{number}"))
        return tuple(found)

    def memory(self, device: Device) -> tuple[int, int]:
        """Used and total bytes of a GPU's memory."""
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(device.handle)
        except pynvml.NVMLError as error:
            raise PluginUnavailable(
                f"NVML cannot read the memory of {device.resource}: {error}"
            ) from error
        return int(memory.used), int(memory.total)

    def close(self) -> None:
        """Give NVML back. Idempotent; never raises."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            # The driver went away, and its state with it.
            return
