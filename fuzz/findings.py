"""What was found, kept once: an input, and what came of it."""

from __future__ import annotations

import hashlib
import traceback
from pathlib import Path
from typing import Final

FINDINGS: Final = Path(__file__).resolve().parent / "findings"
_HERE: Final = str(Path(__file__).resolve().parent)


class Findings:
    """The findings of one target."""

    def __init__(self, name: str) -> None:
        self._folder: Final = FINDINGS / name

    def add_error(self, error: BaseException, data: bytes) -> Path | None:
        """Keep an input that raised; None when one that raised the same is there already."""
        text = "".join(traceback.format_exception(error, limit=-40))
        return self._add(signature(error), data, text)

    def add_death(self, how: str, data: bytes) -> Path | None:
        """Keep an input that ended the process."""
        digest = hashlib.sha256(data).hexdigest()[:8]
        return self._add(f"{how.replace(' ', '-')}-{digest}", data, how)

    def _add(self, name: str, data: bytes, text: str) -> Path | None:
        path = self._folder / name
        if path.exists() and path.stat().st_size <= len(data):
            return None
        is_new = not path.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)  # the smallest is the easiest to read
        path.with_suffix(".txt").write_text(text, "utf-8", "backslashreplace")
        return path if is_new else None


def signature(error: BaseException) -> str:
    """A name for a kind of failure: the error, and the place in the project it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "erllama" in frame.filename] or list(frames)
    place = ours[-1] if ours else None
    if place is None or place.filename.startswith(_HERE):
        place = frames[-1] if frames else None
    where = f"{Path(place.filename).stem}-{place.name}-{place.lineno}" if place else "nowhere"
    kept = "".join(c if c.isalnum() or c in "-_" else "" for c in where)
    return f"{type(error).__name__}-{kept}"
