"""``metrics.jsonl``: one JSON line a step, and what can be read back from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..models.files import write_atomically


class Metrics:
    """Appends lines to a file; after a resume, lines later than the checkpoint are dropped first. None keeps no lines."""

    def __init__(self, path: Path | None, upto: int) -> None:
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= upto]
        write_atomically(path, lambda p: _write(p, kept))
        self._file = path.open("a", encoding="utf-8")

    def add(self, **line: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; the last may have been cut off by a kill."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
