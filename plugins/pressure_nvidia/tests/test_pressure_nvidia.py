"""The NVIDIA pressure source: the real pynvml on a stand-in for the driver's library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from erllama_core.providers import PressureProvider, Unavailable

# Two GPUs of 16 GiB. FAKE_INIT and FAKE_MEMORY_<index> make a call return that status.
STAND_IN = r"""
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

typedef struct { unsigned index; } device_t;
typedef struct { unsigned long long total, free, used; } memory_t;
static device_t devices[2] = {{0}, {1}};
static int users = 0;

static int status(const char *name) { const char *v = getenv(name); return v ? atoi(v) : 0; }

int fake_users(void) { return users; }
int nvmlInitWithFlags(unsigned flags) {
    int s = status("FAKE_INIT");
    if (s == 0) users++;
    return s;
}
int nvmlShutdown(void) { if (users == 0) return 1; users--; return 0; }
const char *nvmlErrorString(int s) { return s == 15 ? "GPU is lost" : "some NVML error"; }
int nvmlDeviceGetCount_v2(unsigned *count) {
    if (users == 0) return 1;
    *count = getenv("FAKE_COUNT") ? status("FAKE_COUNT") : 2;
    return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t **out) {
    if (users == 0) return 1;
    if (index >= 2) return 2;
    *out = &devices[index];
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **out) {
    if (users == 0) return 1;
    if (strcmp(uuid, "GPU-one") == 0) { *out = &devices[1]; return 0; }
    return 6;
}
int nvmlDeviceGetIndex(device_t *device, unsigned *index) { *index = device->index; return 0; }
int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *out) {
    char name[32];
    if (users == 0) return 1;
    snprintf(name, sizeof name, "FAKE_MEMORY_%u", device->index);
    if (status(name)) return status(name);
    out->total = 16ull << 30;
    out->used = (1ull + device->index) << 30;
    out->free = out->total - out->used;
    return 0;
}
"""

PRELUDE = """
import ctypes, json, os
from erllama_core.errors import ErllamaError
from erllama_pressure_nvidia import plugin
from erllama_pressure_nvidia.options import NvidiaOptions
from erllama_pressure_nvidia.source import NvidiaPressure

def users():
    return ctypes.CDLL("libnvidia-ml.so.1").fake_users()

def shown(source):
    try:
        return [[r.resource, r.used_bytes >> 30, r.total_bytes >> 30] for r in source.sample()]
    except ErllamaError as error:
        return str(error)

(provider,) = plugin.erllama_pressure_sources()
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in for libnvidia-ml.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for the driver's library with")
    if sys.platform != "linux":
        pytest.skip("the driver's library is found by name on Linux only")
    folder = tmp_path_factory.mktemp("driver")
    source = folder / "nvml.c"
    source.write_text(STAND_IN)
    library = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def run(code: str, driver: Path | None = None, **variables: str) -> Any:
    """The last line that ``code`` prints, as JSON; in a process of its own.

    An application that does not configure structlog gets its log on standard output.
    """
    environ = {**os.environ, **variables}
    environ["LD_LIBRARY_PATH"] = "" if driver is None else str(driver)
    script = PRELUDE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_every_device(driver: Path) -> None:
    """Without a choice every GPU gives a reading, called by its index."""
    code = "print(json.dumps(shown(provider.factory(NvidiaOptions()))))"
    assert run(code, driver) == [["gpu:0", 1, 16], ["gpu:1", 2, 16]]


@pytest.mark.parametrize("device", ["1", "'GPU-one'"])
def test_chosen_device(driver: Path, device: str) -> None:
    """A GPU is chosen by index or UUID, and has the same name either way."""
    code = f"print(json.dumps(shown(NvidiaPressure(({device},)))))"
    assert run(code, driver) == [["gpu:1", 2, 16]]


@pytest.mark.parametrize("device", ["7", "'GPU-none'"])
def test_unknown_device(driver: Path, device: str) -> None:
    """A device that is not there is named, with what there is; NVML is given back."""
    code = f"print(json.dumps([shown(NvidiaPressure(({device},))), users()]))"
    message, users = run(code, driver)
    assert f"there is no GPU {device}; NVML sees 2" in message
    assert users == 0


def test_nvml_is_started_late_and_given_back(driver: Path) -> None:
    """NVML runs from the first sample to close, which may be called twice."""
    code = """
    source = provider.factory(NvidiaOptions())
    counts = [users()]
    source.sample(); source.sample(); counts.append(users())
    source.close(); source.close(); counts.append(users())
    print(json.dumps([counts, shown(source)]))
    """
    assert run(code, driver) == [[0, 1, 0], "this pressure source is closed"]


def test_two_sources_do_not_disturb_each_other(driver: Path) -> None:
    """Closing one source leaves another one working."""
    code = """
    one, two = NvidiaPressure(), NvidiaPressure((0,))
    one.sample(); two.sample(); one.close()
    print(json.dumps(shown(two)))
    """
    assert run(code, driver) == [["gpu:0", 1, 16]]


def test_one_lost_device(driver: Path) -> None:
    """A GPU that is lost does not hide the others."""
    code = "print(json.dumps(shown(NvidiaPressure())))"
    assert run(code, driver, FAKE_MEMORY_0="15") == [["gpu:1", 2, 16]]


def test_all_devices_lost_and_back(driver: Path) -> None:
    """When no GPU can be read the sample says why, and a later one starts anew."""
    code = """
    source = NvidiaPressure((0,))
    first, users_after = shown(source), users()
    libc = ctypes.CDLL(None)
    libc.unsetenv(b"FAKE_MEMORY_0")
    print(json.dumps([first, users_after, shown(source)]))
    """
    message, users, later = run(code, driver, FAKE_MEMORY_0="15")
    assert message == "NVML cannot read the memory of gpu:0: GPU is lost"
    assert users == 0
    assert later == [["gpu:0", 1, 16]]


PROBE = "answer = provider.probe(); print(json.dumps(getattr(answer, 'reason', 'available')))"


def test_probe_available(driver: Path) -> None:
    """With a driver and a GPU the probe passes, and leaves NVML closed."""
    assert run(PROBE, driver) == "available"
    assert run("provider.probe(); print(users())", driver) == 0


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"FAKE_INIT": "9"}, "kernel module is not loaded"),
        ({"FAKE_INIT": "999"}, "NVML cannot be started"),
        ({"FAKE_COUNT": "0"}, "no GPU"),
    ],
    ids=["driver-not-loaded", "unknown", "no-device"],
)
def test_probe_unavailable(driver: Path, variables: dict[str, str], reason: str) -> None:
    """The probe says what is missing."""
    assert reason in run(PROBE, driver, **variables)


def test_no_driver(tmp_path: Path) -> None:
    """Without the driver's library the probe and the source name it, and nothing crashes."""
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has an NVIDIA driver")
    code = "print(json.dumps([provider.probe().reason, shown(NvidiaPressure())]))"
    probed, sampled = run(code, tmp_path)
    assert "libnvidia-ml.so.1" in probed
    assert sampled == probed


def test_provider_is_listed_without_nvml() -> None:
    """The hook imports no pynvml."""
    code = "print(json.dumps('pynvml' in __import__('sys').modules))"
    script = "import json, erllama_pressure_nvidia.plugin\n" + code
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert json.loads(done.stdout) is False


def test_options() -> None:
    """Indices and UUIDs are accepted, anything else is refused by name."""
    from erllama_pressure_nvidia.options import NvidiaOptions

    assert NvidiaOptions((0, "GPU-one")).devices == (0, "GPU-one")
    with pytest.raises(ValueError, match="'devices' has the index -1"):
        NvidiaOptions((-1,))
    with pytest.raises(ValueError, match="'devices' has 'gpu0'"):
        NvidiaOptions(("gpu0",))


def test_provider_record() -> None:
    """The record has the options class, and a probe that answers on any machine."""
    from erllama_pressure_nvidia import plugin

    (provider,) = plugin.erllama_pressure_sources()
    assert isinstance(provider, PressureProvider)
    assert provider.name == "nvidia"
    answer = provider.probe()
    assert not isinstance(answer, Unavailable) or answer.reason
