"""Readers of real data, on small files in the form of the packages, and on the packages where they are installed."""

import gzip
import re

import numpy as np
import pytest

import fastweights as fw
from fastweights.tasks import TimeSeries, data, images
from fastweights.tasks.images import render
from fastweights.tasks.source import IGNORED

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 109 109"><g id="kvg:StrokePaths_{0}">
	<path id="kvg:{0}-s1" kvg:type="x" d="M54.5,10c0,10,0,80,0,90"/>
	<path id="kvg:{0}-s2" d="M10,54.5C20,54.5 90,54.5,100,54.5"/>
</g><text transform="matrix(1 0 0 1 45 18)">1</text></svg>
"""
TS = """# made up
@problemName Two
@classLabel true left right

@data
1,2,3:4,5,6:left
-1e-3,2:0.5,0:right
"""


def installed(package, path):
    """Skips a test of real data where they are not."""
    try:
        data.find(package, path)
    except fw.FastWeightError as error:
        return pytest.mark.skipif(True, reason=str(error))
    return pytest.mark.skipif(False, reason="")


# ---- time series -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"Two_{part}.ts").write_text(TS)
    return str(tmp_path)


def test_series_are_read_as_they_are_written(two):
    found = data.series("Two", "TRAIN", two)
    assert found.classes == ("left", "right")
    assert found.labels.tolist() == [0, 1]
    assert [v.tolist() for v in found.values] == [[[1, 4], [2, 5], [3, 6]], np.float32([[-1e-3, 0.5], [2, 0]]).tolist()]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("left\n-", "middle\n-", "line 6, is not channels of one length"),
        ("1,2,3:", "1,2:", "line 6, is not channels of one length"),
        ("1,2,3", "1,?,3", "line 6, is not channels of one length"),
        ("1,2,3", "1,nan,3", "line 6, has values that are not finite"),
        ("@data", "@date", "holds no series"),
    ],
)
def test_series_that_are_none_are_refused(tmp_path, old, new, message):
    (tmp_path / "x.ts").write_text(TS.replace(old, new))
    with pytest.raises(fw.FastWeightError, match=message):
        data.read_ts(tmp_path / "x.ts")


def test_series_are_standardised_and_padded_and_told_apart_at_their_end(two):
    source = TimeSeries(series="Two", folder=two)
    assert (source.d_in, source.d_out) == (3, 2)
    ((x, y),) = source.validation(32)
    assert x.shape == (2, 3, 3)
    assert y.tolist() == [[IGNORED, IGNORED, 0], [IGNORED, 1, IGNORED]]
    seen = x[..., 2] == 1
    assert seen.tolist() == [[True] * 3, [True, True, False]]
    assert abs(x[seen][:, :2].mean(0)).max() < 1e-6
    assert abs(x[seen][:, :2].std(0, unbiased=False) - 1).max() < 1e-6
    assert not x[~seen].any()
    rows = {tuple(r.flatten().tolist()) for r in source.batch(0, 0, 20)[0]}
    assert len(rows) == 2


def test_dropped_steps_are_not_seen(tmp_path):
    row = ",".join(map(str, range(1, 41)))
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"Long_{part}.ts").write_text(TS.partition("1,2,3")[0] + f"{row}:left\n{row}:right\n")
    for share in (0.0, 0.3, 0.7):
        source = TimeSeries(series="Long", dropped=share, folder=str(tmp_path))
        x, y = source.batch(0, 0, 30)
        assert (x[..., -1].sum(1) == 40 - round(share * 40)).all()
        assert not x[x[..., -1] == 0].any()
        assert (y[:, :-1] == IGNORED).all()
        assert len({tuple(r) for r in x[..., -1].tolist()}) == (1 if share == 0 else 30)


@installed("aeon", "aeon/datasets/data")
@pytest.mark.parametrize(
    ("name", "channels", "classes", "train", "test"), [("JapaneseVowels", 12, 9, 270, 370), ("BasicMotions", 6, 4, 40, 40)]
)
def test_the_real_series(name, channels, classes, train, test):
    for part, n in (("TRAIN", train), ("TEST", test)):
        found = data.series(name, part)
        assert (len(found.values), found.values[0].shape[1], len(found.classes)) == (n, channels, classes)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_strokes_are_the_curves_of_their_path():
    there = data.stroke("M1,2 C 3,4 5,6 7,8 s1-1,2.5.5c-1e0,0,0,1,1,1")
    ends = [(1, 2), (7, 8), (9.5, 8.5), (10.5, 9.5)]
    handles = [((3, 4), (5, 6)), ((9, 10), (8, 7)), ((8.5, 8.5), (9.5, 9.5))]  # s mirrors the handle before
    expected = [ends[0]]
    for a, (b, c), d in zip(ends, handles, ends[1:], strict=False):
        for i in range(1, 33):
            t = i / 32
            expected.append(tuple((1 - t) ** 3 * p + 3 * t * (1 - t) ** 2 * q + 3 * t * t * (1 - t) * r + t**3 * s
                                  for p, q, r, s in zip(a, b, c, d, strict=True)))  # fmt: skip
    assert np.allclose(there, expected, atol=1e-12)


@pytest.mark.parametrize("path", ["", "C1,2,3,4,5,6", "M1,2L3,4", "M1,2c1,2", "M1", "M1,2M3,4"])
def test_paths_of_other_commands_are_refused(path):
    with pytest.raises(fw.FastWeightError, match=r"is not made of one M|has no points"):
        data.stroke(path)


def test_characters_are_found_without_their_variants_and_drawn(tmp_path):
    place = tmp_path / "kanji"
    place.mkdir()
    for name in ("04e00", "04e01", "04e02", "04e03", "04e04", "04e00-Kaisho"):
        (place / f"{name}.svg").write_text(SVG.format(name))
    for folder in (tmp_path, place):
        found = data.characters(str(folder))
        assert [len(strokes) for strokes in found] == [2] * 5
    (cross,) = render(found[:1]).numpy()
    assert cross.shape == (28, 28)
    assert cross.max() <= 1
    assert cross[13:15, 3:25].min() > 0.5
    assert cross[3:25, 13:15].min() > 0.5
    assert cross[:10, :10].max() == cross[17:, 17:].max() == 0
    images.cache_clear()
    found = images("kanji", str(tmp_path))
    assert (found.classes, found.training, found.varied) == (5, 4, True)


def test_digits_are_read_and_sorted_by_class(tmp_path):
    draw = np.random.default_rng(0)
    table = np.concatenate([draw.integers(0, 17, (40, 64)), draw.permutation(40)[:, None] % 10], 1)
    with gzip.open(tmp_path / "digits.csv.gz", "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    pictures, labels = data.digits(str(tmp_path))
    assert (pictures.reshape(40, 64) * 16 == table[:, :64]).all()
    assert (labels == table[:, 64]).all()
    images.cache_clear()
    found = images("digits", str(tmp_path))
    assert found.count.tolist() == [4] * 10
    for c in range(10):
        mine = found.bank[found.first[c] : found.first[c] + 4].numpy()
        assert sorted(mine.reshape(4, -1).tolist()) == sorted(pictures[labels == c].reshape(4, -1).tolist())
    x = found.draw(np.full(50, 3), 8, draw)
    assert {tuple(row) for row in x.round(4).tolist()} == {tuple(row) for row in pictures[labels == 3].reshape(4, 64).round(4).tolist()}


@installed("scikit-learn", "sklearn/datasets/data/digits.csv.gz")
def test_the_real_digits():
    pictures, labels = data.digits()
    assert pictures.shape == (1797, 8, 8)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@installed("kanjivg", "kanji")
def test_the_real_characters():
    files = list(data.find("kanjivg", "kanji").glob("?????.svg"))
    assert len(files) > 6000
    for file in files[::100]:
        for path in re.findall(r'<path[^>]* d="([^"]+)"', file.read_text()):
            points = data.stroke(path)
            assert len(points) > 1
            assert (points > 0).all()
            assert (points < 109).all()


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_with_the_way_to_it(tmp_path):
    with pytest.raises(fw.FastWeightError, match="pip install no-such-package, or name a folder"):
        data.find("no-such-package", "data.txt")
    with pytest.raises(fw.FastWeightError, match=r"the installed package numpy has no numpy/data\.txt"):
        data.find("numpy", "numpy/data.txt")
    with pytest.raises(fw.FastWeightError, match="pip install numpy"):
        data.find("numpy", "numpy/data.txt", str(tmp_path))
    (tmp_path / "numpy").mkdir()
    for place in (tmp_path / "data.txt", tmp_path / "numpy" / "data.txt"):  # the package's own place comes first
        place.write_text("x")
        assert data.find("numpy", "numpy/data.txt", str(tmp_path)) == place
    (tmp_path / "kanji").mkdir()
    with pytest.raises(fw.FastWeightError, match="holds no characters"):
        data.characters(str(tmp_path))
