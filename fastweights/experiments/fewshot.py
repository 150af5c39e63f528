"""Few-shot learning: what a label means is new in every sequence, and is learned by what is written while the sequence is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..language.errors import FastWeightError
from ..plots import COLOURS, figure, smoothed
from ..tasks.fewshot import FewShot
from ..tasks.images import images
from ..tasks.source import VectorSource
from .entrants import CHANCE, Entrant, present, scaled
from .experiment import Finding, Result, Setting, experiment
from .training import fit, parameters

_LEARNS = 2 * CHANCE  # scaled accuracy of a model that learns within a sequence
_TIE = 0.02
NEAREST = "nearest image"
_WAYS = 5
_TESTED = 512  # sequences a batch of the test, of which there are four


class _Case(NamedTuple):
    name: str
    shots: int
    delayed: bool


class _Row(NamedTuple):
    entrant: Entrant
    learns: bool | None  # None: shown without a claim
    default: int  # of the cases, at the default size
    quick: int


CASES = (_Case("1-shot", 1, False), _Case("1-shot, delayed labels", 1, True), _Case("5-shot", 5, False))
ROWS = (
    _Row(Entrant("DeltaNet", ("delta",)), True, 3, 2),
    _Row(Entrant("linear attention", ("hebb",)), True, 3, 0),
    _Row(Entrant("SRWM", ("srwm",)), True, 1, 0),
    _Row(Entrant("SRWM, fixed weights", ("srwm_fixed",)), False, 2, 1),
    _Row(Entrant("LSTM", ("lstm",)), None, 1, 0),
)


@experiment(
    section="learning to learn",
    claim="Memories that are written while a sequence is read learn five new classes from one image each; fixed weights do not",
    cite="Irie, Schlag, Csordas and Schmidhuber 2022, ICML (A modern self-referential weight matrix), sections 4.2 and 4.3",
    quick=22, default=500, full=40_000,
)  # fmt: skip
def fewshot(setting: Setting) -> Result:
    """Five classes get the labels 0 to 4 at random, one image of each is shown with its label (five at 5-shot), and then one more image,
    whose label is to be told. Synchronous labels stand beside their image; delayed ones beside the next image, and every label is a target
    before it is shown, but only the last one is measured. Classes of the test are none of those trained on. Images are 8 by 8, of made-up
    characters of three to five curves (at the full size of kanji, where the package kanjivg is installed: they have more strokes than so
    few dots show, and in 600 steps linear attention and SRWM are still where they began); each is turned, sheared and moved at random.

    Two layers with MLPs; equal images, batches of 128 (64 at 5-shot) and steps for all, and nearly equal parameters. Without a memory the
    last label can only be guessed: the control of SRWM, the same layer of which nothing is ever rewritten, has a scaled accuracy (0 at
    chance, 1 where all is right) of at most 0.1, and a model that learns one of 0.2 or more. Beside them, without training, the label of
    the nearest image, by the distance of pixels; the delta rule must not do worse than that from one image, nor than linear attention,
    but for 0.02.

    Where training begins is what decides how soon it gets anywhere (``begin``), and is the same for all but in this: what SRWM makes its
    softmax of is twice as large. With delayed labels, DeltaNet and linear attention have a convolution of two tokens, whose keys begin at
    the token before. LSTM and, with delayed labels, SRWM are still at chance after hundreds of steps where the others are done in 300;
    LSTM is shown without a claim, and SRWM is trained on delayed labels and on 5 shots at the full size alone. The quick size trains
    delta and the control, for 300 steps, fewer than linear attention needs. Where kanjivg and scikit-learn are installed, the same
    models, of made-up characters alone, also read kanji and digits from one image each, without a claim.
    """
    (kanji, absent), (digits, no_digits) = available("kanji"), available("digits")
    trained = kanji if kanji and setting.size == "full" else "glyphs"
    others = [source for source in (kanji, digits) if source and source != trained]
    rows = [r for r in ROWS if _cases(r, setting)]
    known, note = present([r.entrant for r in rows])
    right: dict[tuple[str, str], list[float]] = {}
    losses: dict[str, list[list[float]]] = {}
    table: list[dict[str, Any]] = []

    def measure(name: str, case: _Case, models: Sequence[nn.Module], size: int) -> None:
        for source in (trained, *(others if case == CASES[0] else ())):
            found = [at_the_end(model, _task(case, source).validation(_TESTED)) for model in models]
            right[name, case.name if source == trained else f"{case.name}, {source}"] = found
            table.append({"model": name, "case": case.name, "images": source, "parameters": size, "accuracy": sum(found) / len(found)})

    for row in (r for r in rows if r.entrant in known):
        for case in _cases(row, setting):
            runs = [_trained(row.entrant, case, trained, setting, seed) for seed in setting.each_seed()]
            measure(row.entrant.name, case, [model for model, _ in runs], parameters(runs[0][0]))
            if case == CASES[0]:
                losses[row.entrant.name] = [loss for _, loss in runs]
    for case in CASES[: max(len(_cases(row, setting)) for row in rows)]:
        measure(NEAREST, case, [Nearest(_task(case, trained))] * setting.seeds, 0)
    notes = " ".join(n for n in (note, absent, no_digits) if n)
    return Result(_findings(rows, right, setting), table, _draw(right, losses), notes)


def _cases(row: _Row, setting: Setting) -> Sequence[_Case]:
    return CASES[: setting.pick(quick=row.quick, default=row.default, full=len(CASES))]


def _task(case: _Case, source: str) -> FewShot:
    return FewShot(ways=_WAYS, shots=case.shots, delayed=case.delayed, images=source, side=8)


def _trained(entrant: Entrant, case: _Case, source: str, setting: Setting, seed: int) -> tuple[nn.Module, list[float]]:
    task = cast(VectorSource, _task(case, source))
    steps, batch = setting.pick(quick=300, default=600, full=60_000), 64 if case.shots > 1 else 128
    model = entrant.build(task, setting.pick(quick=64, default=64, full=256), 2, seed, heads=4, conv=2 if case.delayed else 1)
    begin(model, _WAYS, seed, 0.1 if case.delayed else 0.2)  # a delayed label also stands beside the last image
    lr = setting.pick(quick=5e-3, default=4e-3, full=1e-3)
    return model, fit(model, task, steps, batch=batch, lr=lr, seed=seed, cosine=True, setting=setting, name=f"{entrant.name}, {case.name}")


def _findings(rows: Sequence[_Row], right: Mapping[tuple[str, str], Sequence[float]], setting: Setting) -> list[Finding]:
    made = []
    for (name, case), found in right.items():
        learns = next((r.learns for r in rows if r.entrant.name == name), None)
        if learns is not None and case in [c.name for c in CASES]:
            bounds = {"low": _LEARNS} if learns else {"high": CHANCE}
            expected, each = "above 0: learns" if learns else "about 0, chance", [scaled(x, 1 / _WAYS) for x in found]
            made.append(Finding(f"{name}, {case}: scaled accuracy", each, expected, source="order", **bounds))
    if setting.size != "quick":
        for other in (NEAREST, "linear attention"):
            more = [a - b for a, b in zip(right["DeltaNet", "1-shot"], right[other, "1-shot"], strict=True)]
            made.append(Finding(f"1-shot: accuracy of DeltaNet - {other}", more, "0 or more", low=-_TIE, source="order"))
    return made


def available(name: str) -> tuple[str, str]:
    """The name of images whose package is installed and no note, or no name and a note that says what is missing."""
    try:
        images(name)
    except FastWeightError as error:
        return "", f"No {name} were used: {error}."
    return name, ""


def begin(model: nn.Module, labels: int, seed: int, scale: float = 0.2) -> None:
    """Where training of a model of images beside labels begins, the same for all; it changes the model in place.

    The last ``labels`` inputs are louder, by ``scale``, since a label is one number beside the many of an image. What a self-referential
    matrix takes a softmax of is twice as large. A short convolution of two tokens takes keys from the token before: there stands the
    image that a delayed label belongs to.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight: Tensor = model.enter.weight  # type: ignore[union-attr, assignment]
        weight[:, -labels:] = scale * torch.randn(len(weight), labels, generator=draw)
        for block in model.blocks:  # type: ignore[union-attr]
            programmer: Any = getattr(block.layer, "programmer", None)
            if "P_0" in getattr(programmer, "slow", {}):
                programmer.project.weight *= 2
            if getattr(programmer, "conv", None) is not None and "k" in programmer.convolved:
                weight, at = programmer.conv.weight, 0
                weight *= 0.3
                for name in programmer.convolved:
                    size = programmer.sizes[name]
                    weight[at : at + size, 0, -2 if name == "k" else -1] += 1
                    at += size


@torch.no_grad()
def at_the_end(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of sequences whose last target is told right."""
    right = [model(x)[0][:, -1].argmax(-1) == y[:, -1] for x, y in batches]
    return float(torch.cat(right).double().mean())


class Nearest(nn.Module):
    """No training: the label of the image of the sequence that is nearest to the last one."""

    def __init__(self, task: FewShot) -> None:
        super().__init__()
        self.ways, self.delayed = task.ways, task.delayed

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        pictures, labels = x[..., : -self.ways], x[..., -self.ways :]
        labels = labels[:, 1:] if self.delayed else labels[:, :-1]
        near = torch.cdist(pictures[:, -1:], pictures[:, :-1])[:, 0].argmin(-1)
        y = torch.zeros_like(x[..., -self.ways :])
        y[:, -1] = labels[torch.arange(len(x)), near]
        return y, None


def _draw(right: Mapping[tuple[str, str], Sequence[float]], losses: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    made, (left, middle) = figure(2, width=5.0, height=4.0)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(name for name, _ in right))}
    for name, runs in losses.items():
        mean = [sum(step) / len(step) for step in zip(*runs, strict=True)]
        left.plot(range(1, len(mean) + 1), smoothed(mean), color=colours[name], lw=1.5)
    left.set_xlabel("steps of training, 1-shot")
    left.set_ylabel("loss (nats; averaged over about 20 steps)")
    left.set_ylim(bottom=0)
    cases = list(dict.fromkeys(case for _, case in right))
    names = list(colours)
    for (name, case), found in right.items():
        x = cases.index(case) + 0.11 * (names.index(name) - (len(names) - 1) / 2)
        middle.plot([x] * len(found), found, ".", color=colours[name], ms=4)
        middle.plot([x], [sum(found) / len(found)], "D" if name == NEAREST else "o", color=colours[name], ms=7)
    middle.axhline(1 / _WAYS, color="0.5", lw=1, ls=":")
    middle.set_xticks(range(len(cases)), [case.replace(", ", ",\n") for case in cases])
    middle.set_ylim(0, 1.03)
    middle.set_ylabel("accuracy on new classes (dotted: chance)")
    for name in names:
        middle.plot([], [], "D" if name == NEAREST else "o", color=colours[name], label=name)
    made.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=len(names))
    return made
