"""Every task trains, with the folder, the metrics and the resuming of any run; its scores are told in the right words."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

import fastweights as fw
from fastweights.cli import main
from fastweights.models import LanguageModel, SequenceModel
from fastweights.tasks import TASKS
from fastweights.tasks.source import IGNORED
from fastweights.train import TrainConfig, train
from fastweights.train.metrics import read_metrics
from fastweights.train.scores import Scores, loss_of, score

TINY = {"steps": 3, "batch": 2, "depth": 1, "d_model": 16, "heads": 2, "evaluate_every": 2, "checkpoint_every": 2, "rule": "delta"}
SMALL = {
    "recall": "pairs=3", "mqar": "tokens=16,vocabulary=32", "copying": "lengths=3-5,longer=6-8", "parity": "lengths=3-8,longer=9-12",
    "modular": "lengths=3-8,longer=9-12", "words": "lengths=3-8,longer=9-12", "language": "lengths=2-8,longer=9-12",
    "listops": "depth=2,deeper=3", "code": "statements=6", "retrieval": "pairs=4,d_key=4", "overwrite": "pairs=4,d_key=4",
    "icl-regression": "d=3,examples=5", "fewshot": "side=5", "continual": "side=5,parts=2,shots=2",
    "timeseries": "series=Tiny,folder=FOLDER", "tmaze": "corridor=5", "bandit": "trials=10",
}  # fmt: skip
LONGER = {"copying", "parity", "modular", "words", "language", "listops"}
NUMBERS = {"retrieval", "overwrite", "icl-regression"}


def options(tmp_path, name):
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"Tiny_{part}.ts").write_text("@classLabel true a b\n@data\n1,2,3:0,1,0:a\n2,1:1,1:b\n")
    return {**TINY, "task": f"{name}:{SMALL[name]}".replace("FOLDER", str(tmp_path)), "runs": str(tmp_path / "runs"), "name": name}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_resumes_exactly(tmp_path, name):
    given = options(tmp_path, name)
    text = Console(record=True, width=200, file=io.StringIO())
    whole = train(TrainConfig(**given), text)
    assert isinstance(whole.model, LanguageModel if hasattr(TASKS[name], "vocabulary") else SequenceModel)
    assert sorted(p.name for p in whole.folder.iterdir()) == ["checkpoints", "config.json", "figures", "metrics.jsonl"]
    (line,) = [x for x in read_metrics(whole.folder / "metrics.jsonl") if x["step"] == 3 and "loss" not in x]
    classes = {"bits", "accuracy", "sequences"}
    expected = {f"validation_{n}" for n in ({"error"} if name in NUMBERS else classes)} | {f"longer_{n}" for n in classes if name in LONGER}
    assert set(line) == expected | {"step"}
    said = text.export_text()
    assert ("error" in said) == (name in NUMBERS)
    assert ("bits per answer" in said) == (name not in NUMBERS)
    assert ("longer" in said.partition("step ")[2]) == (name in LONGER)
    assert math.isnan(whole.error) == (name not in NUMBERS)
    assert math.isnan(whole.accuracy) == math.isnan(whole.bits) == (name in NUMBERS)
    assert (whole.longer is None) == (name not in LONGER)

    train(TrainConfig(**{**given, "name": "cut", "steps": 2}), text)
    cut = train(TrainConfig(**{**given, "name": "cut", "resume": True}), text)
    # the learning rate of these steps belongs to the warm-up, which does not depend on their number
    assert all(torch.equal(a, b) for a, b in zip(cut.model.state_dict().values(), whole.model.state_dict().values(), strict=True))
    assert torch.tensor(cut[2:4]).equal(torch.tensor(whole[2:4])) or name in NUMBERS
    assert cut.longer == whole.longer


def test_a_vector_run_is_refused_where_its_rule_or_task_has_changed(tmp_path):
    given = options(tmp_path, "retrieval")
    file = tmp_path / "own.py"
    body = (
        "import fastweights as fw\nfrom fastweights import Key, Value, outer\n\n"
        "@fw.rule\ndef mine(W, k: Key, v: Value):\n    return {} * W + outer(v, k)\n"
    )
    file.write_text(body.format(0.9))
    train(TrainConfig(**{**given, "rule": f"{file}:mine"}), Console(quiet=True))
    with pytest.raises(fw.FastWeightError, match=r"--task \(was retrieval:pairs=4,d_key=4, is retrieval:pairs=4\)"):
        train(TrainConfig(**{**given, "rule": f"{file}:mine", "task": "retrieval:pairs=4", "resume": True}), Console(quiet=True))
    file.write_text(body.format(0.8))
    with pytest.raises(fw.RuleError, match="trained with another rule"):
        train(TrainConfig(**{**given, "rule": f"{file}:mine", "resume": True}), Console(quiet=True))


def test_the_command_line_trains_a_task(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["--steps", "2", "--depth", "1", "--d-model", "16", "--heads", "2", "--batch", "2"]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--rule", "delta", "--task", "parity:lengths=3-8,longer=9-12", *words])
    out = capfd.readouterr().out
    assert stop.value.code == 0
    assert "data: parity: lengths 3-8, longer 9-12, every true, start true" in out
    assert "done: runs/delta-parity-lengths-3-8-longer-9-12" in out
    assert "generate" not in out
    assert json.loads((tmp_path / "runs/delta-parity-lengths-3-8-longer-9-12/config.json").read_text())["task"].startswith("parity:")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--task", "parity:length=3"])
    assert stop.value.code == 2
    assert "its options are lengths=3-40" in " ".join(capfd.readouterr().err.split())


# ---- losses and scores -----------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """Answers what it is told to."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs):
        return self.outputs, []


def test_losses_are_means_over_what_counts():
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(4, (3, 5), generator=draw)
    targets[0, 1:] = targets[2, 3] = IGNORED
    numbers = torch.randn(3, 5, 4, generator=draw, dtype=torch.float64)
    numbers[targets == IGNORED] = float("nan")
    nats, half, n = 0.0, 0.0, 0
    for b in range(3):
        for t in range(5):
            if targets[b, t] != IGNORED:
                row = outputs[b, t].detach().numpy()
                nats -= row[targets[b, t]] - np.log(np.exp(row).sum())
                half += ((row - numbers[b, t].numpy()) ** 2).sum() / 2
                n += 1
    for given, expected in ((targets, nats / n), (numbers, half / n)):
        loss = loss_of(outputs, given)
        assert abs(loss.item() - expected) < 1e-12
        (gradient,) = torch.autograd.grad(loss, outputs)
        assert gradient.isfinite().all()
        assert not gradient[targets == IGNORED].any()
    assert abs(score(Fixed(outputs), [(None, numbers)]).error - 2 * half / n) < 1e-12
    assert abs(score(Fixed(outputs), [(None, targets)]).bits - nats / n / math.log(2)) < 1e-12


def test_a_sequence_is_right_where_all_that_counts_is():
    targets = torch.tensor([[0, 1, IGNORED], [1, 1, 1], [IGNORED, 0, IGNORED], [1, 0, 0]])
    answers = torch.tensor([[0, 1, 0], [1, 0, 1], [1, 0, 1], [0, 1, 1]])
    outputs = torch.nn.functional.one_hot(answers, 2).double()
    found = score(Fixed(outputs), [(None, targets), (None, targets)])
    assert (found.accuracy, found.sequences) == (5 / 9, 2 / 4)
    assert score(Fixed(outputs), []).known() == Scores().known() == {}
