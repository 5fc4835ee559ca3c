"""A model served under a memory limit: with memory pressure watched it lives, without it does not.

    python bench/memory_limit.py [--model FILE] [--limit cgroup|address-space] [--json]

The same child runs twice. It loads the model, then lets itself have 28 MiB more than it has by
then: by a control group of its own where this process may make one, and otherwise by
``RLIMIT_AS``. Then it serves prompts that differ, each of which leaves some 6 MiB of state in a
RAM tier whose quota is far beyond the limit. In a control group the kernel kills what exceeds it;
under ``RLIMIT_AS`` memory is refused, so state is not saved any more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from erllama_core import Engine, load_config
from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.interfaces.pressure import PressureReading

MARGIN_BYTES = 28 << 20
HIGH, LOW = 0.5, 0.2
"""Watermarks, as parts of the margin."""
PROMPT_TOKENS = 128
REQUESTS = 10
"""Their state takes twice the margin."""


@attrs.frozen
class Group:
    """A memory control group below this process's own, of version 1 or 2."""

    path: Path

    @property
    def limit_file(self) -> Path:
        v2 = self.path / "memory.max"
        return v2 if v2.exists() else self.path / "memory.limit_in_bytes"

    def oom_kills(self) -> int:
        """How many processes the kernel has killed in it."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(FileNotFoundError):
                for line in (self.path / name).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return 0


@contextlib.contextmanager
def own_group() -> Iterator[Group | None]:
    """A group that a child can join and limit; None where this process may not make one."""
    group = None
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, controllers, inside = line.split(":", 2)
        if "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
        elif number == "0" and not controllers:
            root = Path("/sys/fs/cgroup")
        else:
            continue
        path = root / inside.lstrip("/") / f"erllama-limit-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        made = Group(path)
        if made.limit_file.exists() and os.access(made.limit_file, os.W_OK):
            group = made
            break
        path.rmdir()  # the memory controller is not to be had here
    try:
        yield group
    finally:
        if group is not None:
            group.path.rmdir()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# ---------------------------------------------------------------------- the child


def serve(model_path: Path, group: Path | None, *, watched: bool) -> None:
    """Serve under a limit; a line of JSON for the limit, for each request, and for the end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    config: dict[str, Any] = {
        "tiers": [{"name": "ram", "kind": "ram", "quota_bytes": "8GiB"}],
        # The watermarks are known once the limit is.
        "pressure": {
            "enabled": watched,
            "source": "system",
            "interval_ms": 20,
            "high_watermark": 1.0,
            "low_watermark": 0.99,
        },
    }
    with Engine(load_config(config, environ={})) as engine:
        # One thread, as others may be at work on the machine; wide elements make more state.
        context = {"n_ctx": 512, "n_threads": 1, "type_k": "f32", "type_v": "f32"}
        model = engine.load_model("demo", model_path=model_path, context_opts=context)
        text = model.tokenize("The keeper of the lamp wrote down what the day had brought. " * 40)
        prompts = [
            [*model.tokenize(f"Day {number}. "), *text][:PROMPT_TOKENS]
            for number in range(REQUESTS + 1)
        ]
        # Memory that is taken once, with the first prompt, is not what this is about.
        model.complete(prompts.pop(), response_tokens=4)
        engine.flush()
        engine.cache.gc()
        limited = limit(engine, group)
        tell(limit_bytes=limited.total_bytes, used_bytes=limited.used_bytes)
        if watched:
            engine.pressure.set_thresholds(
                high_watermark=1 - (1 - HIGH) * MARGIN_BYTES / limited.total_bytes,
                low_watermark=1 - (1 - LOW) * MARGIN_BYTES / limited.total_bytes,
            )
        for prompt in prompts:
            done = model.complete(prompt, response_tokens=4)
            engine.flush()
            stored = sum(usage.used_bytes for usage in engine.cache.usage())
            tell(answered=len(done.generated), stored_bytes=stored)
        status = engine.pressure.status()
        tell(
            releases=status.releases,
            freed_bytes=status.freed_bytes,
            saves_dropped=engine.cache.counters().saves_dropped,
        )


def limit(engine: Engine, group: Path | None) -> PressureReading:
    """Allow this process the margin on top of what it has; the reading of that limit."""
    what = "address_space" if group is None else "cgroup"
    if group is None:
        used = int(_read(Path("/proc/self/statm")).split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MARGIN_BYTES, resource.RLIM_INFINITY))
    else:
        # What can be reclaimed is no pressure, so a limit on everything allows it besides.
        file = Group(group).limit_file
        file.write_text(str(1 << 40))
        file.write_text(str(reading_of(engine, what).used_bytes + MARGIN_BYTES))
    return reading_of(engine, what)


def reading_of(engine: Engine, resource_name: str) -> PressureReading:
    """What the source says of one memory now."""
    status = engine.pressure.force_check()
    for source in status.sources:
        for reading in source.readings:
            if reading.resource == resource_name and isinstance(reading, PressureReading):
                return reading
    raise RuntimeError(f"the source has no reading of {resource_name}: {status.sources}")


def tell(**values: int) -> None:
    """A line for the parent."""
    print(json.dumps(values), flush=True)


# --------------------------------------------------------------------- the parent


@attrs.frozen
class Outcome:
    """How a child fared."""

    limit: str
    """What limited it: ``cgroup`` or ``address-space``."""
    watched: bool
    limit_bytes: int
    answered: int
    """Requests."""
    returncode: int
    oom_kills: int
    most_stored_bytes: int
    releases: int
    saves_dropped: int

    @property
    def survived(self) -> bool:
        return self.returncode == 0

    @property
    def words(self) -> str:
        """The end of it, for a person."""
        if self.survived:
            return f"lived; {self.releases} releases, {self.saves_dropped} objects not saved"
        if self.oom_kills:
            return f"killed by the kernel ({signal.Signals(-self.returncode).name})"
        return f"ended with {self.returncode}"


def run(model_path: Path, *, watched: bool, address_space: bool = False) -> Outcome:
    """Run a child to its end."""
    with own_group() if not address_space else contextlib.nullcontext() as group:
        command = [sys.executable, __file__, "--model", str(model_path), "--child"]
        command += ["--watched"] * watched
        if group is not None:
            command += ["--group", str(group.path)]
        # Every thread's arena would reserve address space of its own.
        environ = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, check=False, timeout=300
        )
        kills = 0 if group is None else group.oom_kills()
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"the child said nothing: {done.stderr[-2000:]}")
    return Outcome(
        limit="address-space" if group is None else "cgroup",
        watched=watched,
        limit_bytes=lines[0]["limit_bytes"],
        answered=sum("answered" in line for line in lines),
        returncode=done.returncode,
        oom_kills=kills,
        most_stored_bytes=max((line.get("stored_bytes", 0) for line in lines), default=0),
        releases=lines[-1].get("releases", 0),
        saves_dropped=lines[-1].get("saves_dropped", 0),
    )


def main() -> None:
    """Run both, and print how they fared; or be one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; the demo's without it")
    parser.add_argument("--limit", choices=("cgroup", "address-space"), default="cgroup")
    parser.add_argument("--json", action="store_true", help="one JSON object for each run")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    model_path = given.model or fetch_demo_model()
    if given.child:
        serve(model_path, given.group, watched=given.watched)
        return
    for watched in (True, False):
        outcome = run(model_path, watched=watched, address_space=given.limit != "cgroup")
        if given.json:
            sizes = {"requests": REQUESTS, "margin_bytes": MARGIN_BYTES}
            print(json.dumps(attrs.asdict(outcome) | sizes))
            continue
        print(
            f"pressure {'on ' if watched else 'off'}  limit {outcome.limit} "
            f"{outcome.limit_bytes / 2**20:.0f} MiB  answered {outcome.answered} of {REQUESTS}  "
            f"at most {outcome.most_stored_bytes / 2**20:.0f} MiB of state  {outcome.words}"
        )


if __name__ == "__main__":
    main()
