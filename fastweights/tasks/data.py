"""Real data that ships inside PyPI packages, read from their files: nothing is imported from them, and nothing is downloaded.

Handwritten digits are in ``scikit-learn``, JapaneseVowels and BasicMotions in ``aeon``, strokes of characters in ``kanjivg``. They are
found where pip has put them, or in a folder of one's own: ``pip download --no-deps kanjivg`` and ``unzip`` make one.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..language.errors import FastWeightError


class Series(NamedTuple):
    """Time series with labels: ``values`` one (T, channels) a series, ``labels`` (N,) indices into ``classes``."""

    values: list[np.ndarray]
    labels: np.ndarray
    classes: tuple[str, ...]


def find(package: str, path: str, folder: str = "") -> Path:
    """A file or folder of a package, or one of its name in ``folder``, at the package's path or at the top.

    >>> find("numpy", "numpy/__init__.py").name
    '__init__.py'
    """
    if folder:
        root = Path(folder).expanduser()
        for place in (root / path, root / Path(path).name):
            if place.exists():
                return place
        if root.name == Path(path).name and root.is_dir():
            return root
        raise FastWeightError(f"there is no {path} in the folder {folder!r}; it is part of the package {package}: pip install {package}")
    try:
        place = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError as error:
        raise FastWeightError(
            f"this needs {path} of the package {package}: pip install {package}, or name a folder that holds it"
        ) from error
    if not place.exists():
        raise FastWeightError(f"the installed package {package} has no {path}; install another version, or name a folder that holds it")
    return place


def digits(folder: str = "") -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits, (N, 8, 8) float32 in [0, 1], and what they are, (N,).

    Source: Alpaydin and Kaynak 1998 (UCI), in scikit-learn.
    """
    table = np.loadtxt(find("scikit-learn", "sklearn/datasets/data/digits.csv.gz", folder), delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 8, 8) / 16, table[:, -1].astype(np.int64)


def series(name: str, part: str, folder: str = "") -> Series:
    """The part ``TRAIN`` or ``TEST`` of a data set of the UEA archive, from its .ts file.

    JapaneseVowels: 12 channels, 9 speakers, 7 to 29 steps, 270 and 370 series (Kudo et al. 1999). BasicMotions: 6 channels, 4 motions,
    100 steps, 40 and 40. Both are in aeon.
    """
    return read_ts(find("aeon", f"aeon/datasets/data/{name}/{name}_{part}.ts", folder))


def read_ts(path: Path) -> Series:
    """A .ts file: a header with ``@classLabel true A B ...``, then a line a series, channels between colons, the label last."""
    classes: tuple[str, ...] = ()
    values, labels, body = [], [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not body:
            words = line.split()
            if words[0].lower() == "@classlabel":
                classes = tuple(words[2:])
            body = words[0].lower() == "@data"
            continue
        *channels, label = line.split(":")
        try:
            values.append(np.array([[float(x) for x in c.split(",")] for c in channels], np.float32).T)
            labels.append(classes.index(label.strip()))
        except ValueError as error:
            raise FastWeightError(f"{path}, line {number}, is not channels of one length and one of {classes}: {error}") from error
        if not np.isfinite(values[-1]).all():
            raise FastWeightError(f"{path}, line {number}, has values that are not finite")
    if not values:
        raise FastWeightError(f"{path} holds no series")
    return Series(values, np.array(labels), classes)


def characters(folder: str = "") -> list[list[np.ndarray]]:
    """Strokes of 6,703 characters, in the order of their code points: a stroke is (points, 2), in [0, 1], y downwards.

    Source: KanjiVG, copyright Ulrich Apel, Creative Commons Attribution-Share Alike 3.0, https://kanjivg.tagaini.net.
    """
    place = find("kanjivg", "kanji", folder)
    files = sorted(p for p in place.glob("*.svg") if re.fullmatch(r"[0-9a-f]{5}", p.stem))  # other names are variants
    if not files:
        raise FastWeightError(f"{place} holds no characters: files such as 04e00.svg of the package kanjivg")
    return [[stroke(d) / 109 for d in re.findall(r'<path[^>]* d="([^"]+)"', p.read_text(encoding="utf-8"))] for p in files]


_WORD = re.compile(r"[A-Za-z]|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_ALONG = np.linspace(0, 1, 33)[1:, None]
_BERNSTEIN = np.concatenate([(1 - _ALONG) ** 3, 3 * _ALONG * (1 - _ALONG) ** 2, 3 * _ALONG**2 * (1 - _ALONG), _ALONG**3], 1)


def stroke(path: str) -> np.ndarray:
    """Points along an SVG path of M, C and S, absolute or relative, 32 a curve: (points, 2).

    >>> stroke("M1,2c0,0,3,0,3,0").shape, stroke("M1,2c0,0,3,0,3,0")[-1].tolist()
    ((33, 2), [4.0, 2.0])
    """
    words = _WORD.findall(path)
    corners: list[complex] = []  # the beginning, then two handles and an end a curve
    here = handle = 0j
    command, i = "", 0
    while i < len(words):
        if words[i].isalpha():
            command, i = words[i], i + 1
        count = {"M": 1, "C": 3, "S": 2}.get(command.upper(), 0)
        if not count or len(words) < i + 2 * count or (count == 1) != (not corners):
            raise FastWeightError(f"the path {path!r} is not made of one M, then C and S with their points")
        numbers = [float(w) for w in words[i : i + 2 * count]]
        shift = here if command.islower() else 0j
        given = [complex(x, y) + shift for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
        if count == 2:
            given.insert(0, 2 * here - handle)
        i, here, handle = i + 2 * count, given[-1], given[-2] if count > 1 else given[-1]
        corners += given
    if not corners:
        raise FastWeightError(f"the path {path!r} has no points")
    ends = np.array(corners)
    curves = ends[3 * np.arange(len(ends) // 3)[:, None] + np.arange(4)]
    points = np.concatenate([ends[:1], (curves @ _BERNSTEIN.T).ravel()])
    return np.stack([np.real(points), np.imag(points)], 1)
