"""Every experiment says what it is, and comes out in its quick version: those without training here, the trained ones are slow."""

import pytest

from fastweights.experiments import Setting, experiments
from fastweights.plots import save_figure

SECTIONS = ("memory", "expressivity", "learning to learn", "sequences", "neuroscience")
FAST = ("capacity", "painter")
FIGURES_OF_NEURO = {e.name for e in experiments().values() if e.section == "neuroscience"}  # whose tests run them


@pytest.mark.parametrize("name", experiments())
def test_says_what_it_is(name):
    e = experiments()[name]
    assert e.section in SECTIONS
    assert len(e.claim) > 30
    assert e.cite
    assert len(e.page) > 300
    assert 0 < e.seconds["quick"] <= 60
    assert e.seconds["quick"] <= e.seconds["default"] <= 600
    assert e.seconds["default"] <= e.seconds["full"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in experiments() if n not in FIGURES_OF_NEURO]
)
def test_quick(name, tmp_path):
    result = experiments()[name].run(Setting("quick", 1))
    save_figure(result.figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert result.table
    assert result.findings
    assert not [(f.what, f.mean, f.expected) for f in result.findings if not f.passed]
