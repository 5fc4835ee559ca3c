"""The source of memory stalls, on this machine and on written-out files."""

from __future__ import annotations

from pathlib import Path

import pytest

from erllama_core.errors import PluginUnavailable
from erllama_core.interfaces.pressure import StallReading
from erllama_core.providers import Available, Unavailable
from erllama_pressure_system import plugin, stalls
from erllama_pressure_system.options import PsiOptions
from erllama_pressure_system.stalls import PROC_PRESSURE, PsiPressure, read_psi

FILE = """some avg10={some:.2f} avg60=1.00 avg300=0.50 total={some_us}
full avg10={full:.2f} avg60=0.50 avg300=0.25 total={full_us}
"""


class Kernel:
    """A host's and a group's file, and a clock."""

    def __init__(self, root: Path) -> None:
        self.now_s = 100.0
        self.host = root / "memory"
        self.group = root / "cgroup" / "app"
        self.proc = root / "proc"
        self.proc.mkdir()
        self.group.mkdir(parents=True)

    def tell(
        self, file: Path, some: float, some_us: int, full: float = 0, full_us: int = 0
    ) -> None:
        file.write_text(FILE.format(some=some, some_us=some_us, full=full, full_us=full_us))

    def in_group(self) -> None:
        """Put the process into the group."""
        mount = self.group.parent
        (self.proc / "mountinfo").write_text(f"30 21 0:26 / {mount} rw - cgroup2 x rw\n")
        (self.proc / "cgroup").write_text("0::/app\n")

    def source(self, options: PsiOptions | None = None) -> PsiPressure:
        return PsiPressure(
            options or PsiOptions(),
            host=self.host,
            proc_self=self.proc,
            clock=lambda: self.now_s,
        )


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_first_reading_is_the_kernels_average(kernel: Kernel) -> None:
    """At first the average of ten seconds is all there is, as a share of the limit."""
    kernel.tell(kernel.host, some=5.0, some_us=9_000_000)
    (reading,) = kernel.source().sample()
    assert reading == StallReading("psi:host", 0.05, 0.1)
    assert reading.usage == pytest.approx(0.5)


def test_later_readings_are_of_the_time_between(kernel: Kernel) -> None:
    """Then what was lost since the reading before counts, whatever the average still says."""
    kernel.tell(kernel.host, some=5.0, some_us=1_000_000)
    source = kernel.source()
    source.sample()
    kernel.now_s += 5
    kernel.tell(kernel.host, some=60.0, some_us=1_400_000)
    assert source.sample()[0].stalled == pytest.approx(0.08)
    kernel.now_s += 5
    kernel.tell(kernel.host, some=60.0, some_us=1_400_000)
    assert source.sample()[0].stalled == 0.0


def test_a_moment_is_no_time(kernel: Kernel) -> None:
    """A reading soon after another covers the time since one before that."""
    kernel.tell(kernel.host, some=0.0, some_us=0)
    source = kernel.source()
    source.sample()
    kernel.now_s += 5
    kernel.tell(kernel.host, some=0.0, some_us=500_000)
    assert source.sample()[0].stalled == pytest.approx(0.1)
    kernel.now_s += 0.2
    assert source.sample()[0].stalled == pytest.approx(0.5 / 5.2)
    kernel.now_s += 5
    assert source.sample()[0].stalled == 0.0


@pytest.mark.parametrize(("kind", "share"), [("some", 0.3), ("full", 0.1)])
def test_which_line_counts(kernel: Kernel, kind: str, share: float) -> None:
    """``stalled`` chooses the line, ``limit`` what counts as full; usage stays below 1.0."""
    kernel.tell(kernel.host, some=30.0, some_us=5, full=10.0, full_us=5)
    options = PsiOptions(limit=0.2, stalled=kind)  # type: ignore[arg-type]
    (reading,) = kernel.source(options).sample()
    assert (reading.stalled, reading.limit) == (share, 0.2)
    assert reading.usage == pytest.approx(min(1.0, share / 0.2))


def test_the_groups_own_stalls(kernel: Kernel) -> None:
    """In a group of version 2 there is a reading of its own stalls as well."""
    kernel.tell(kernel.host, some=1.0, some_us=5)
    kernel.tell(kernel.group / "memory.pressure", some=50.0, some_us=5)
    kernel.in_group()
    readings = kernel.source().sample()
    assert [(r.resource, r.stalled) for r in readings] == [("psi:host", 0.01), ("psi:cgroup", 0.5)]


def test_one_file_is_enough(kernel: Kernel) -> None:
    """A group's stalls are read where the host's are hidden, and the other way round."""
    kernel.tell(kernel.group / "memory.pressure", some=50.0, some_us=5)
    kernel.in_group()
    assert [r.resource for r in kernel.source().sample()] == ["psi:cgroup"]
    kernel.tell(kernel.host, some=1.0, some_us=5)
    (kernel.group / "memory.pressure").unlink()
    assert [r.resource for r in kernel.source().sample()] == ["psi:host"]


@pytest.mark.parametrize(
    "text", [None, "", "garbage\n", "some avg10=x total=1\n", "some avg10=1\n"]
)
def test_no_stalls_to_be_had(kernel: Kernel, text: str | None) -> None:
    """Where the kernel tells nothing, or nonsense, the sample says what is needed."""
    if text is not None:
        kernel.host.write_text(text)
    with pytest.raises(PluginUnavailable, match=r"Linux 4\.20 or later.*CONFIG_PSI"):
        kernel.source().sample()


def test_probe(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """The probe passes where there is a file, and says what is missing where there is not."""
    _, provider = plugin.erllama_pressure_sources()
    assert provider.name == "psi"
    monkeypatch.setattr(stalls, "PROC_PRESSURE", kernel.host)
    answer = provider.probe()
    assert isinstance(answer, Unavailable)
    assert "CONFIG_PSI" in answer.reason
    kernel.tell(kernel.host, some=1.0, some_us=5)
    assert provider.probe() == Available()


@pytest.mark.skipif(not PROC_PRESSURE.exists(), reason="this kernel tells no stalls")
def test_this_machine() -> None:
    """What this kernel writes is understood."""
    share, total_us = read_psi(PROC_PRESSURE, "some")
    assert 0.0 <= share <= 1.0
    assert total_us >= 0
    _, provider = plugin.erllama_pressure_sources()
    source = provider.factory(PsiOptions())
    resources = {reading.resource for reading in source.sample()}
    assert "psi:host" in resources
    source.close()


@pytest.mark.parametrize("options", [{"limit": 0.0}, {"limit": 1.5}, {"stalled": "most"}])
def test_options_are_checked(options: dict[str, object]) -> None:
    """Values that mean nothing are refused."""
    with pytest.raises(ValueError, match=next(iter(options))):
        PsiOptions(**options)  # type: ignore[arg-type]
