"""Training: it learns, it resumes bit for bit, and nothing that kills it loses more than the steps since the last checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

import fastweights as fw
from fastweights.models import load
from fastweights.tasks import Recall, Text
from fastweights.train import TrainConfig, train
from fastweights.train.metrics import read_metrics

TINY = {"steps": 12, "batch": 2, "length": 32, "depth": 1, "d_model": 16, "heads": 2, "evaluate_every": 6, "checkpoint_every": 4}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return str(path)


def quiet():
    return Console(file=open(os.devnull, "w"))


def losses(run):
    return [(x["step"], x["loss"]) for x in read_metrics(run / "metrics.jsonl") if "loss" in x]


def weights(run):
    return {n: p.clone() for n, p in load(run).state_dict().items()}


def test_a_run_is_a_folder(tmp_path, text):
    result = train(TrainConfig(**TINY, text=text, runs=str(tmp_path)), quiet())
    run = tmp_path / "gated_delta-text"
    assert result.folder == run
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "figures", "metrics.jsonl"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]
    assert (run / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [s for s, _ in losses(run)] == list(range(1, 13))
    assert json.loads((run / "config.json").read_text())["steps"] == 12


def test_it_learns_text(tmp_path, text):
    result = train(TrainConfig(**TINY | {"steps": 80, "d_model": 32}, text=text, runs=str(tmp_path), learning_rate=0.01), quiet())
    assert result.bits < 1.5


def test_it_learns_to_recall(tmp_path):
    options = {"steps": 400, "batch": 32, "depth": 2, "d_model": 64, "heads": 2, "evaluate_every": 1000, "checkpoint_every": 1000}
    result = train(TrainConfig(task="recall:pairs=3", runs=str(tmp_path), learning_rate=0.005, rule="delta", **options), quiet())
    assert result.accuracy > 0.5


def test_resuming_is_exact(tmp_path, text):
    whole = train(TrainConfig(**TINY, text=text, runs=str(tmp_path), name="whole"), quiet()).folder
    config = TrainConfig(**TINY | {"steps": 12}, text=text, runs=str(tmp_path), name="cut")
    train(config, quiet())
    run = tmp_path / "cut"
    newest = run / "checkpoints" / "step_00000012"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(TrainConfig(**{**TINY, "resume": True}, text=text, runs=str(tmp_path), name="cut"), quiet())
    assert losses(run) == losses(whole)
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_what_cannot_be_resumed_is_refused(tmp_path, text):
    config = {**TINY, "text": text, "runs": str(tmp_path)}
    train(TrainConfig(**config), quiet())
    with pytest.raises(fw.FastWeightError, match="continue it with --resume"):
        train(TrainConfig(**config), quiet())
    with pytest.raises(fw.FastWeightError, match=r"--d-model \(was 16, is 32\)"):
        train(TrainConfig(**{**config, "d_model": 32, "resume": True}), quiet())
    (tmp_path / "other.txt").write_text("something else entirely " * 100)
    with pytest.raises(fw.FastWeightError, match="it was trained on text of 4500 bytes"):
        train(TrainConfig(**{**config, "text": str(tmp_path / "other.txt"), "resume": True}), quiet())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"heads": 3}, "not a multiple"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"task": "recall:pairs=65"}, "64 keys"),
        ({"task": "recal"}, "did you mean 'recall'"),
        ({"text": "nowhere"}, "no text at 'nowhere'"),
        ({"length": 100_000}, "too few for windows"),
        ({"rule": "delt"}, "did you mean 'delta'"),
        ({"rule": "gone.py:mine"}, "no file 'gone.py'"),
        ({"learning_rate": 1e30, "steps": 12}, "the loss is"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, text, changes, message):
    with pytest.raises(fw.FastWeightError, match=message):
        train(TrainConfig(**{**TINY, "text": text, "runs": str(tmp_path), **changes}), quiet())


def test_rules_from_files(tmp_path, text):
    file = tmp_path / "own.py"
    file.write_text(
        "import fastweights as fw\nfrom fastweights import Key, Value, outer\n\n"
        "@fw.rule\ndef mine(W, k: Key, v: Value):\n    return 0.9 * W + outer(v, k)\n\nnot_a_rule = 1\n"
    )
    result = train(TrainConfig(**TINY, text=text, runs=str(tmp_path), rule=f"{file}:mine,softmax"), quiet())
    assert result.model.config.layers == ("mine", "softmax")
    for name, message in (("other", "nothing of that name. Rules in the file: mine"), ("not_a_rule", "it is a int")):
        with pytest.raises(fw.RuleError, match=message):
            train(TrainConfig(rule=f"{file}:{name}", runs=str(tmp_path)), quiet())


# ---- killed ----------------------------------------------------------------------------------------------------------


def start(tmp_path, text, name, *extra, steps=60):
    options = {**TINY, "steps": steps, "checkpoint_every": 1, "evaluate_every": 1000}
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    command = [sys.executable, "-m", "fastweights", "train", *words, "--text", text, "--runs", str(tmp_path), "--name", name, *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_step(run, step):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        lines = read_metrics(run / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError("training did not get there")


def test_kill_9_at_any_moment_loses_nothing_but_the_last_steps(tmp_path, text):
    """A checkpoint is written at every step, so most kills fall into one."""
    whole = start(tmp_path, text, "whole")
    assert whole.wait(timeout=120) == 0
    draw = random.Random(0)
    extra = []
    for _ in range(4):
        process = start(tmp_path, text, "killed", *extra)
        run = tmp_path / "killed"
        done = read_metrics(run / "metrics.jsonl")
        wait_for_step(run, (done[-1]["step"] if done else 0) + draw.randrange(2, 9))
        time.sleep(draw.random() * 0.02)
        process.kill()
        process.wait()
        extra = ["--resume"] if any((run / "checkpoints").glob("step_*")) else []
    assert start(tmp_path, text, "killed", *extra).wait(timeout=120) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_told_to_stop_saves_and_says_how_to_continue(tmp_path, text, number):
    process = start(tmp_path, text, "told", steps=5000)
    wait_for_step(tmp_path / "told", 3)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 128 + number
    assert "continue with: fastweights train" in output
    assert "--name told" in output
    assert "--steps 5000" in output
    assert output.rstrip().endswith("--resume")
    stored = json.loads(next(iter(sorted((tmp_path / "told" / "checkpoints").glob("step_*"))[-1:])).joinpath("training.json").read_text())
    assert stored["step"] == losses(tmp_path / "told")[-1][0]


def test_batches_are_a_function_of_seed_and_step():
    for source in (Text(bytes(range(256)) * 20), Recall(4)):
        a, b, c = source.batch(0, 5, 3, 16), source.batch(0, 5, 3, 16), source.batch(0, 6, 3, 16)
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[0], c[0])


def test_recall_can_be_solved_from_its_input():
    inputs, targets = Recall(pairs=5, vocabulary=32).batch(1, 2, 4, 0)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        known = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        asked = [(row[t], w) for t, w in enumerate(wanted) if w != -100]
        assert len(asked) == 5
        assert all(known[key] == value for key, value in asked)


def test_validation_text_is_not_trained_on():
    text = Text(bytes(range(200)) * 10)
    held_out = text.data[text.split :]
    assert len(held_out) == 100
    starts = torch.randint(0, text.split - 17, (10,))
    assert starts.max() + 17 <= text.split
    inputs, targets = next(iter(text.validation(4, 16)))
    assert torch.equal(inputs[0], held_out[:16].long())
    assert torch.equal(targets[0], held_out[1:17].long())
