"""What is known of a run of the torture: a folder that the next call goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import attrs

from torture.tally import Tally

_LATEST: Final = "latest"


@attrs.frozen
class Round:
    """A round that is over."""

    number: int
    seconds: float
    tally: Tally


class Record:
    """Rounds by fault, one file of JSON lines for each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed: Final = seed
        self.folder: Final = folder / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (folder / _LATEST).write_text(f"{seed}\n", "utf-8")

    def rounds(self, fault: str) -> list[Round]:
        """What is over of a fault. A last line that was cut short by a kill does not count."""
        try:
            lines = self._file(fault).read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            found.append(Round(values["round"], values["seconds"], Tally.from_json(values)))
        return found

    def add(self, fault: str, values: dict[str, Any]) -> None:
        """A round is over; ``values`` is what the worker said of it."""
        with self._file(fault).open("a", encoding="utf-8") as file:
            # A line of its own, also behind one that a kill cut short.
            file.write("\n" * (file.tell() > 0) + json.dumps(values))

    def work_folder(self, fault: str) -> Path:
        """Where a fault's rounds have their folders."""
        return self.folder / "work" / fault

    def words_file(self, fault: str) -> Path:
        """Where the log of a fault's processes goes."""
        return self.folder / f"{fault}.log"

    def _file(self, fault: str) -> Path:
        return self.folder / f"{fault}.jsonl"


def latest_seed(folder: Path) -> int | None:
    """The seed of the run that was last worked on, if there was one."""
    try:
        return int((folder / _LATEST).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
