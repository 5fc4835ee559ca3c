"""The system pressure source, on this machine and on written-out cgroup trees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from erllama_core.interfaces.pressure import PressureReading
from erllama_core.providers import Available, NoOptions, PressureProvider
from erllama_pressure_system import plugin
from erllama_pressure_system.cgroup import read_cgroup_memory
from erllama_pressure_system.source import SystemPressure

MIB = 1 << 20


class Machine:
    """A /proc/self and a /sys/fs/cgroup in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.proc.mkdir()
        self.sys = root / "sys fs"  # mountinfo escapes the blank
        self.mounts: list[str] = ["21 1 8:1 / / rw - ext4 /dev/sda1 rw"]

    def mount(self, kind: str, point: str, *, root: str = "/", options: str = "rw") -> Path:
        where = self.sys / point
        where.mkdir(parents=True, exist_ok=True)
        escaped = str(where).replace(" ", "\\040")
        self.mounts.append(f"30 21 0:26 {root} {escaped} rw,nosuid shared:4 - {kind} x {options}")
        (self.proc / "mountinfo").write_text("\n".join(self.mounts) + "\n")
        return where

    def member(self, *lines: str) -> None:
        (self.proc / "cgroup").write_text("\n".join(lines) + "\n")

    def read(self) -> PressureReading | None:
        return read_cgroup_memory(self.proc)


def v2(
    group: Path, limit: int | str, current: int, inactive: int = 0, active: int = 0, mapped: int = 0
) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(
        f"anon 5\ninactive_file {inactive}\nactive_file {active}\nfile_mapped {mapped}\n"
    )


def v1(
    group: Path, limit: int, usage: int, inactive: int = 0, active: int = 0, mapped: int = 0
) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (group / "memory.stat").write_text(
        f"inactive_file 1\nactive_file 2\ntotal_inactive_file {inactive}\n"
        f"total_active_file {active}\ntotal_mapped_file {mapped}\n"
    )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_this_machine() -> None:
    """The host reading is this machine's memory, and its usage is a fraction."""
    source = SystemPressure()
    host, *rest = source.sample()
    source.close()
    source.close()
    assert host.resource == "host"
    assert host.total_bytes == psutil.virtual_memory().total
    assert 0.0 < host.usage < 1.0
    assert {reading.resource for reading in rest} <= {"cgroup", "address_space"}


def test_page_cache_is_no_pressure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is available, reclaimable page cache included, is not used."""

    class Memory:
        total, available, used, free = 1000, 700, 200, 100

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert SystemPressure(proc_self=tmp_path).sample() == (PressureReading("host", 300, 1000),)


def test_psutil_failure_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's own errors arrive as OSError, which the monitor expects."""

    def broken() -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    with pytest.raises(OSError, match="cannot read this machine's memory"):
        SystemPressure().sample()


def test_v2_own_group(machine: Machine) -> None:
    """The limit of the process's own group is read, less what can be reclaimed."""
    root = machine.mount("cgroup2", "cgroup")
    v2(root / "app", 100 * MIB, 70 * MIB, 20 * MIB)
    machine.member("0::/app")
    assert machine.read() == PressureReading("cgroup", 50 * MIB, 100 * MIB)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_page_cache_of_a_group_is_no_pressure(machine: Machine, version: str) -> None:
    """File pages can be reclaimed, however often they were used, but for those that are mapped."""
    if version == "v2":
        v2(machine.mount("cgroup2", "cgroup"), 100, 90, inactive=20, active=30, mapped=10)
        machine.member("0::/")
    else:
        v1(machine.mount("cgroup", "memory", options="rw,memory"), 100, 90, 20, 30, 10)
        machine.member("4:memory:/")
    assert machine.read() == PressureReading("cgroup", 90 - (20 + 30 - 10), 100)


@pytest.mark.parametrize(("high", "limit"), [("60", 60), ("max", 100), ("200", 100), (None, 100)])
def test_v2_throttling_is_a_limit(machine: Machine, high: str | None, limit: int) -> None:
    """A group is held up at memory.high before it comes to memory.max: the lower one counts."""
    root = machine.mount("cgroup2", "cgroup")
    v2(root, 100, 40)
    if high is not None:
        (root / "memory.high").write_text(f"{high}\n")
    machine.member("0::/")
    assert machine.read() == PressureReading("cgroup", 40, limit)


def test_v2_limit_of_an_ancestor(machine: Machine) -> None:
    """A group without a limit is bound by the one around it."""
    root = machine.mount("cgroup2", "cgroup")
    v2(root / "slice", 100 * MIB, 60 * MIB)
    v2(root / "slice" / "app", "max", 10 * MIB)
    machine.member("0::/slice/app")
    assert machine.read() == PressureReading("cgroup", 60 * MIB, 100 * MIB)


@pytest.mark.parametrize(
    ("outer_used", "tightest"), [(20, (10, 50)), (99, (99, 100))], ids=["own", "ancestor"]
)
def test_v2_tightest_limit(machine: Machine, outer_used: int, tightest: tuple[int, int]) -> None:
    """Of several limits, the one with the least room left is reported."""
    root = machine.mount("cgroup2", "cgroup")
    v2(root / "slice", 100 * MIB, outer_used * MIB)
    v2(root / "slice" / "app", 50 * MIB, 10 * MIB)
    machine.member("0::/slice/app")
    used, total = tightest
    assert machine.read() == PressureReading("cgroup", used * MIB, total * MIB)


def test_v2_container_sees_its_group_as_the_root(machine: Machine) -> None:
    """In a cgroup namespace the limit stands in the mounted root itself."""
    root = machine.mount("cgroup2", "cgroup")
    v2(root, 100, 40)
    machine.member("0::/")
    assert machine.read() == PressureReading("cgroup", 40, 100)


def test_v1_container_with_the_hosts_paths(machine: Machine) -> None:
    """A path of the host that is mounted as the root is found there."""
    root = machine.mount("cgroup", "memory", root="/docker/abc", options="rw,memory")
    v1(root, 100, 40, 10)
    v1(root / "inner", 1 << 62, 5)
    machine.member("7:cpu,cpuacct:/docker/abc", "4:memory:/docker/abc/inner", "0::/")
    assert machine.read() == PressureReading("cgroup", 30, 100)


@pytest.mark.parametrize("path", ["/../elsewhere", "/somewhere/else"])
def test_v1_path_outside_of_the_mount(machine: Machine, path: str) -> None:
    """A group outside of what is mounted leaves the mount's own limit."""
    root = machine.mount("cgroup", "memory", root="/docker/abc", options="rw,memory")
    v1(root, 100, 40)
    machine.member(f"4:memory:{path}")
    assert machine.read() == PressureReading("cgroup", 40, 100)


def test_hybrid_hierarchies(machine: Machine) -> None:
    """With both versions mounted, the one that has the memory controller is read."""
    machine.mount("cgroup2", "unified")
    machine.mount("cgroup", "cpu", options="rw,cpu")
    memory = machine.mount("cgroup", "memory", options="rw,memory")
    v1(memory / "app", 100, 40)
    machine.member("4:memory:/app", "1:cpu:/other", "0::/app")
    assert machine.read() == PressureReading("cgroup", 40, 100)


@pytest.mark.parametrize("limit", [0x7FFFFFFFFFFFF000, 0x7FFFFFFFFFFF0000])
def test_v1_unlimited(machine: Machine, limit: int) -> None:
    """The sentinels for "no limit" (4 KiB and 64 KiB pages) give no reading."""
    v1(machine.mount("cgroup", "memory", options="rw,memory"), limit, 40)
    machine.member("4:memory:/")
    assert machine.read() is None


def test_v2_unlimited(machine: Machine) -> None:
    """ "max" all the way up gives no reading."""
    v2(machine.mount("cgroup2", "cgroup") / "app", "max", 40)
    machine.member("0::/app")
    assert machine.read() is None


def test_more_reclaimable_than_used(machine: Machine) -> None:
    """Two files read at different moments never give a negative number."""
    v2(machine.mount("cgroup2", "cgroup"), 100, 40, 60)
    machine.member("0::/")
    assert machine.read() == PressureReading("cgroup", 0, 100)


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
@pytest.mark.parametrize("content", [None, "", "garbage\n", "inactive_file x\n"])
def test_unreadable_files(machine: Machine, name: str, content: str | None) -> None:
    """A group that vanishes or says nonsense gives no reading, and no exception."""
    root = machine.mount("cgroup2", "cgroup")
    v2(root, 100, 40)
    machine.member("0::/")
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    reading = machine.read()
    assert reading is None or (name, reading.used_bytes) == ("memory.stat", 40)


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::\n", ":::\n\n", "4:memory\n"])
def test_strange_membership(machine: Machine, text: str) -> None:
    """A /proc/self/cgroup that makes no sense gives no exception."""
    machine.mount("cgroup2", "cgroup")
    (machine.proc / "cgroup").write_text(text)
    assert machine.read() is None


def test_the_tighter_one_counts(machine: Machine) -> None:
    """Under a limit there is a reading of it beside the host's, for the monitor to compare."""
    v2(machine.mount("cgroup2", "cgroup"), 100, 99)
    machine.member("0::/")
    source = SystemPressure(proc_self=machine.proc)
    readings = {reading.resource: reading for reading in source.sample()}
    assert readings["cgroup"].usage == 0.99
    assert readings["host"].usage < 0.99


def test_limit_of_the_address_space() -> None:
    """Under ``ulimit -v`` the process's mapped memory is read against it, and otherwise not."""
    code = """
import resource
from erllama_pressure_system.address_space import read_address_space
unlimited = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
assert (read_address_space() is None) == unlimited
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY if unlimited else 8 << 30))
reading = read_address_space()
assert (reading.resource, reading.total_bytes) == ("address_space", 8 << 30)
assert 1 << 20 < reading.used_bytes < 8 << 30
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_proc(tmp_path: Path) -> None:
    """A machine without /proc has no cgroup reading."""
    assert read_cgroup_memory(tmp_path / "missing") is None


def test_provider() -> None:
    """The hook returns a provider whose probe passes and whose factory makes a source."""
    provider, _ = plugin.erllama_pressure_sources()
    assert isinstance(provider, PressureProvider)
    assert provider.name == "system"
    assert provider.probe() == Available()
    source = provider.factory(NoOptions())
    assert source.sample()[0].resource == "host"
    source.close()


def test_importing_the_plugin_is_cheap() -> None:
    """Listing plugins does not import psutil."""
    code = "import sys, erllama_pressure_system.plugin; sys.exit('psutil' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
