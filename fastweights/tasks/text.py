"""Bytes of real text, from a file, a folder, standard input, or the standard library's own source."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..language.errors import FastWeightError

_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
_HELD_OUT = 0.05


def standard_library() -> bytes:
    """The Python standard library's own source, without its tests: real text that is on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not _NOT_SOURCE & set(p.relative_to(root).parts))
    return b"\n".join(p.read_bytes() for p in files)


def read_text(path: str) -> bytes:
    """A file, all files of a folder in order of name, ``-`` for standard input, or "" for the standard library."""
    if not path:
        return standard_library()
    if path == "-":
        return sys.stdin.buffer.read()
    place = Path(path).expanduser()
    if place.is_file():
        return place.read_bytes()
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(place).parts))
        data = b"\n".join(d for p in files if b"\0" not in (d := p.read_bytes()))
        if not data:
            raise FastWeightError(f"the folder {path} holds no text files")
        return data
    raise FastWeightError(f"there is no text at {path!r}; give a file, a folder, or - for standard input")


class Text:
    """Random windows of a text; the last twentieth is held out for validation.

    >>> text = Text(b"to be or not to be, " * 20)
    >>> inputs, targets = text.batch(seed=0, step=0, size=2, length=8)
    >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
    (torch.Size([2, 8]), True)
    """

    vocabulary = 256

    def __init__(self, data: bytes) -> None:
        self.identity = f"text of {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"
        self.data = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
        self.split = len(data) - max(int(len(data) * _HELD_OUT), 1)

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[Tensor, Tensor]:
        if self.split <= length + 1:
            raise FastWeightError(
                f"the text has {max(self.split, 0)} bytes to train on, too few for windows of {length}; give more, or a smaller --length"
            )
        draw = torch.Generator().manual_seed(hash_numbers(seed, step))
        starts = torch.randint(0, self.split - length - 1, (size,), generator=draw)
        windows = self.data[starts[:, None] + torch.arange(length + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def validation(self, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows of the held-out text from its beginning, one after the other, ``size`` at a time, eight times at most."""
        held_out = self.data[self.split :].long()
        length = min(length, len(held_out) - 1)
        if length < 1:
            return
        windows = held_out[: (len(held_out) - 1) // length * length + 1]
        inputs, targets = windows[:-1].view(-1, length), windows[1:].view(-1, length)
        yield from list(zip(inputs.split(size), targets.split(size), strict=True))[:8]


def hash_numbers(*numbers: int) -> int:
    """A seed made of several numbers, the same on every machine."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
