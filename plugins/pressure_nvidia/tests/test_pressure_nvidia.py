"""The NVIDIA pressure source: the real pynvml on a stand-in for the driver's library."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erllama_core.providers import PressureProvider, Unavailable

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
        readings = source.sample()
        assert all(reading.is_device for reading in readings)
        return [[r.resource, r.used_bytes >> 30, r.total_bytes >> 30] for r in readings]
    except ErllamaError as error:
        return str(error)

libc = ctypes.CDLL(None)
(provider,) = plugin.erllama_pressure_sources()
"""


FORKING = """
import sys
for line in sys.stdin:
    code, variables = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(variables)
        try:
            exec(code)
        except BaseException:
            import traceback
            print(traceback.format_exc())
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("END", flush=True)
"""

_forking: dict[Path | None, subprocess.Popen[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def _processes_end() -> Iterator[None]:
    yield
    while _forking:
        _, process = _forking.popitem()
        with process:
            assert process.stdin is not None
            process.stdin.close()


def run(code: str, driver: Path | None = None, **variables: str) -> Any:
    """The last line that ``code`` prints, as JSON; in a process of its own.

    It is the fork of one that has imported everything and called nothing of it: the driver's
    library is found by a variable that is read when a process starts. An application that does
    not configure structlog gets its log on standard output.
    """
    if driver not in _forking:
        environ = {**os.environ, "LD_LIBRARY_PATH": "" if driver is None else str(driver)}
        _forking[driver] = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + FORKING],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    process = _forking[driver]
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([textwrap.dedent(code), variables]) + "\n")
    process.stdin.flush()
    lines = list(itertools.takewhile("END\n".__ne__, process.stdout))
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        pytest.fail("".join(lines))


def test_every_device(driver: Path) -> None:
    """Without a choice every GPU gives a reading, called by its index, and all of them one more."""
    code = "print(json.dumps(shown(provider.factory(NvidiaOptions()))))"
    assert run(code, driver) == [["gpu:0", 1, 16], ["gpu:1", 2, 16], ["gpu", 3, 32]]


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ("('device',)", [["gpu:0", 1, 16], ["gpu:1", 2, 16]]),
        ("('sum',)", [["gpu", 3, 32]]),
    ],
)
def test_chosen_readings(driver: Path, readings: str, expected: list[Any]) -> None:
    """Each device, or all of them as one memory, can be had alone."""
    code = f"print(json.dumps(shown(NvidiaPressure(NvidiaOptions(readings={readings})))))"
    assert run(code, driver) == expected


def test_readings_change(driver: Path) -> None:
    """Every sample reads the driver anew."""
    code = """
    source = NvidiaPressure()
    before = shown(source)
    libc.setenv(b"FAKE_USED_1", b"15", 1)
    print(json.dumps([before[1], shown(source)[1:]]))
    """
    assert run(code, driver) == [["gpu:1", 2, 16], [["gpu:1", 15, 16], ["gpu", 16, 32]]]


def test_slices_stand_for_their_gpu(driver: Path) -> None:
    """Of a GPU that MIG cuts up each slice is read, and not the GPU, which tells nobody."""
    code = "print(json.dumps(shown(NvidiaPressure())))"
    slices = [["gpu:1/mig:0", 1, 4], ["gpu:1/mig:2", 3, 4]]
    assert run(code, driver, FAKE_MIG="1") == [["gpu:0", 1, 16], *slices, ["gpu", 5, 24]]


def test_chosen_slice(driver: Path) -> None:
    """A slice is chosen by its UUID, and called by it; its GPU's UUID chooses all its slices."""
    code = "print(json.dumps(shown(NvidiaPressure(NvidiaOptions(devices=({},))))))"
    assert run(code.format("'MIG-two'"), driver, FAKE_MIG="1") == [["gpu:MIG-two", 3, 4]]
    assert run(code.format("'GPU-one'"), driver, FAKE_MIG="1")[:2] == [
        ["gpu:1/mig:0", 1, 4],
        ["gpu:1/mig:2", 3, 4],
    ]


def test_slices_that_are_hidden(driver: Path) -> None:
    """A GPU that is cut up and shows no slice is read itself, or left out if it tells nothing."""
    code = "print(json.dumps(shown(NvidiaPressure())))"
    variables = {"FAKE_MIG": "hidden"}
    assert run(code, driver, **variables) == [["gpu:0", 1, 16]]
    variables["FAKE_MEMORY_1"] = "0"
    assert run(code, driver, **variables)[1] == ["gpu:1", 2, 16]


def test_a_driver_from_before_mig(old_driver: Path) -> None:
    """A driver's library that lacks the functions for slices is no failure."""
    code = "print(json.dumps(shown(NvidiaPressure())))"
    assert run(code, old_driver)[:2] == [["gpu:0", 1, 16], ["gpu:1", 2, 16]]


@pytest.mark.parametrize("device", ["1", "'GPU-one'"])
def test_chosen_device(driver: Path, device: str) -> None:
    """A GPU is chosen by index or UUID, and has the same name either way."""
    code = f"print(json.dumps(shown(NvidiaPressure(NvidiaOptions(({device},))))))"
    assert run(code, driver) == [["gpu:1", 2, 16]]


@pytest.mark.parametrize("device", ["7", "'GPU-none'"])
def test_unknown_device(driver: Path, device: str) -> None:
    """A device that is not there is named, with what there is; NVML is given back."""
    code = f"print(json.dumps([shown(NvidiaPressure(NvidiaOptions(({device},)))), users()]))"
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
    one, two = NvidiaPressure(), NvidiaPressure(NvidiaOptions((0,)))
    one.sample(); two.sample(); one.close()
    print(json.dumps(shown(two)))
    """
    assert run(code, driver) == [["gpu:0", 1, 16]]


def test_one_lost_device(driver: Path) -> None:
    """A GPU that is lost does not hide the others."""
    code = "print(json.dumps(shown(NvidiaPressure())))"
    assert run(code, driver, FAKE_MEMORY_0="15") == [["gpu:1", 2, 16]]
    assert run(code, driver, FAKE_OPEN_0="15") == [["gpu:1", 2, 16]]


def test_a_lost_device_comes_back(driver: Path) -> None:
    """While a GPU is lost NVML is started anew each time, and so finds it when it was reset."""
    code = """
    source = NvidiaPressure()
    lost, users_after = shown(source), users()
    libc.unsetenv(b"FAKE_MEMORY_0")
    print(json.dumps([lost, users_after, shown(source)[0], users()]))
    """
    assert run(code, driver, FAKE_MEMORY_0="15") == [[["gpu:1", 2, 16]], 0, ["gpu:0", 1, 16], 1]


def test_all_devices_lost_and_back(driver: Path) -> None:
    """When no GPU can be read the sample says why, and a later one starts anew."""
    code = """
    source = NvidiaPressure(NvidiaOptions((0,)))
    first, users_after = shown(source), users()
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
    """The probe says what is missing, and so does a sample."""
    assert reason in run(PROBE, driver, **variables)
    sampled = run("print(json.dumps(shown(NvidiaPressure())))", driver, **variables)
    assert reason in sampled


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
    with pytest.raises(ValueError, match="readings"):
        NvidiaOptions(readings=())


def test_provider_record() -> None:
    """The record has the options class, and a probe that answers on any machine."""
    from erllama_pressure_nvidia import plugin

    (provider,) = plugin.erllama_pressure_sources()
    assert isinstance(provider, PressureProvider)
    assert provider.name == "nvidia"
    answer = provider.probe()
    assert not isinstance(answer, Unavailable) or answer.reason


def test_driver_lost_while_it_runs(driver: Path) -> None:
    """A driver that is unloaded is an error that says so, and is found when it is back."""
    code = """
    source = NvidiaPressure()
    before = shown(source)
    for name in (b"FAKE_MEMORY_0", b"FAKE_MEMORY_1"):
        libc.setenv(name, b"1", 1)
    libc.setenv(b"FAKE_INIT", b"9", 1)
    gone = [shown(source), shown(source)]
    for name in (b"FAKE_MEMORY_0", b"FAKE_MEMORY_1", b"FAKE_INIT"):
        libc.unsetenv(name)
    print(json.dumps([gone, shown(source) == before]))
    """
    gone, back = run(code, driver)
    assert "NVML cannot read the memory" in gone[0]
    assert "kernel module is not loaded" in gone[1]
    assert back
