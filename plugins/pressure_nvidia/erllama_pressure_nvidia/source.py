"""The pressure source: used and total memory of each watched GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

from erllama_core.errors import PluginUnavailable
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.pressure import PressureReading
from erllama_pressure_nvidia.nvml import NO_GPU, Device, NoSuchDevice, Nvml
from erllama_pressure_nvidia.options import NvidiaOptions

log = get_logger(__name__)


class NvidiaPressure:
    """One reading ``"gpu:<index>"`` per device, and ``"gpu"`` of all together. Thread-safe.

    Of a GPU that is cut up by MIG its slices are read, each of which is a memory of its own; the
    GPU itself where it shows none. NVML is started by the first sample. After a failure it is
    started again by the next one, so a driver that was reloaded, or a GPU that was reset, is
    found.
    """

    def __init__(self, options: NvidiaOptions | None = None) -> None:
        self._options: Final = NvidiaOptions() if options is None else options
        self._lock = threading.Lock()
        self._nvml = Nvml()
        self._devices: tuple[Device, ...] = ()
        self._failure: PluginUnavailable | None = None
        """Of a device, in the sample that is being taken."""
        self._closed = False

    def sample(self) -> tuple[PressureReading, ...]:
        """Current readings. A GPU that fails is left out while another one gives a reading.

        Raises PluginUnavailable when there is no driver, no such device, or no reading at all.
        """
        with self._lock:
            if self._closed:
                raise PluginUnavailable("this pressure source is closed")
            try:
                self._start()
                return self._read()
            except PluginUnavailable:
                self._stop()
                raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stop()

    def _start(self) -> None:
        if self._nvml.is_open:
            return
        self._nvml.open()
        names = self._options.devices or tuple(range(self._nvml.device_count()))
        devices: list[Device] = []
        for name in names:
            try:
                device = self._nvml.device(name)
            except NoSuchDevice:
                raise
            except PluginUnavailable as error:
                self._failure = error
                log.debug("nvidia.device_failed", resource=f"gpu:{name}", error=str(error))
            else:
                devices.extend(self._nvml.slices(device) or (device,))
        self._devices = tuple(devices)

    def _stop(self) -> None:
        self._devices = ()
        self._nvml.close()

    def _read(self) -> tuple[PressureReading, ...]:
        readings = []
        for device in self._devices:
            try:
                used, total = self._nvml.memory(device)
            except PluginUnavailable as error:
                self._failure = error
                log.debug("nvidia.device_failed", resource=device.resource, error=str(error))
            else:
                readings.append(PressureReading(device.resource, used, total, is_device=True))
        failure, self._failure = self._failure, None
        if not readings:
            raise failure or PluginUnavailable(NO_GPU)
        if failure is not None:
            # A GPU that was reset has another handle, which only a new start gives.
            self._stop()
        return tuple(self._wanted(readings))

    def _wanted(self, readings: list[PressureReading]) -> Iterator[PressureReading]:
        wanted = self._options.readings
        # What cannot be read is in no sum: its memory is neither free nor in use.
        alone = len(readings) == 1
        if "device" in wanted or alone:
            yield from readings
        if "sum" in wanted and not alone:
            used = sum(reading.used_bytes for reading in readings)
            total = sum(reading.total_bytes for reading in readings)
            yield PressureReading("gpu", used, total, is_device=True)
