"""The pressure source: used and total memory of each watched GPU."""

from __future__ import annotations

import threading
from typing import Final

from erllama_core.errors import PluginUnavailable
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.pressure import PressureReading
from erllama_pressure_nvidia.nvml import Device, Nvml

log = get_logger(__name__)


class NvidiaPressure:
    """One reading ``"gpu:<index>"`` per device. Thread-safe.

    ``devices``: indices or UUIDs; all when empty. NVML is started by the first sample. After a
    failure it is started again by the next one, so a driver that was reloaded, or a GPU that
    was reset, is found.
    """

    def __init__(self, devices: tuple[int | str, ...] = ()) -> None:
        self._wanted: Final = devices
        self._lock = threading.Lock()
        self._nvml = Nvml()
        self._devices: tuple[Device, ...] = ()
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
        names = self._wanted or tuple(range(self._nvml.device_count()))
        self._devices = tuple(self._nvml.device(name) for name in names)

    def _stop(self) -> None:
        self._devices = ()
        self._nvml.close()

    def _read(self) -> tuple[PressureReading, ...]:
        readings = []
        failure: PluginUnavailable | None = None
        for device in self._devices:
            try:
                used, total = self._nvml.memory(device)
            except PluginUnavailable as error:
                failure = error
                log.debug("nvidia.device_failed", resource=device.resource, error=str(error))
            else:
                readings.append(PressureReading(device.resource, used, total))
        if failure is not None and not readings:
            raise failure
        return tuple(readings)
