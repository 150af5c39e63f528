"""The command line, as a person uses it."""

import csv
import io
import json
import subprocess
import sys

import pytest

from fastweights import cli
from fastweights.bench import scans
from fastweights.engine.kernels import library
from fastweights.train.processes import tells

RULES = """
import torch
import fastweights as fw
from fastweights import Key, LogDecay, Rate, Value, outer

@fw.rule
def leaky_delta(W, k: Key, v: Value, beta: Rate, g: LogDecay):
    W = W + outer(beta * (v - W @ k), k)
    return W * g.exp()

@fw.rule
def squashed(W, k: Key, v: Value):
    return W + outer(v - torch.tanh(W @ k), k)

@fw.rule
def wrong(W, k: Key, v: Value):
    return W + outer(k, v)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(RULES)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 60)
    return tmp_path


def run(capfd, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    captured = capfd.readouterr()
    return stop.value.code, captured.out, captured.err


def test_rules(capfd):
    code, out, _ = run(capfd, "rules")
    assert code == 0
    for part in ("gated_delta", "exp(g) W", "decay scalar or per channel", "1/2 |v"):
        assert part in out


def test_one_rule(capfd):
    code, out, _ = run(capfd, "rules", "gated_delta")
    assert code == 0
    for part in ("LogDecay", "(B, T, H, K)", "e^{g} W", "W [exp(g) I", "Yang"):
        assert part in out
    assert "2 micro-steps" in run(capfd, "rules", "delta * 2")[1]


def test_presets_stand_beside_the_rules(capfd, here):
    assert "retnet" in run(capfd, "rules")[1]
    assert "rotary True" in run(capfd, "rules", "retnet")[1]
    code, _, _ = run(
        capfd, "train", "--rule", "gla,kda", "--steps", "2", "--depth", "2", "--d-model", "16", "--text", "text.txt", "--length", "16"
    )
    assert code == 0


def test_check(capfd, here):
    code, out, _ = run(capfd, "check", "delta")
    assert (code, "delta: PASS" in out) == (0, True)
    code, out, _ = run(capfd, "check", "own.py:leaky_delta")
    assert (code, "leaky_delta: PASS" in out) == (0, True)
    code, out, _ = run(capfd, "check", "own.py:squashed")
    assert code == 0
    assert "refused: tanh of a read of W" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "delt"], "did you mean 'delta'"),
        (["check", "nowhere.py:x"], "there is no file 'nowhere.py'"),
        (["check", "own.py:gone"], "Rules in the file: leaky_delta, squashed, wrong"),
        (["check", "own.py:wrong"], "fails on tensors of the shapes of its roles"),
        (["generate", "nowhere"], "nowhere/config.json is not there"),
        (["train", "--text", "gone"], "there is no text at 'gone'"),
    ],
)
def test_errors_are_one_message_without_a_traceback(capfd, here, words, message):
    code, _, err = run(capfd, *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_train_and_generate_with_a_rule_of_ones_own(capfd, here):
    small = ["--steps", "6", "--batch", "2", "--length", "32", "--depth", "1", "--d-model", "16", "--heads", "2", "--text", "text.txt"]
    for rule in ("leaky_delta", "squashed"):
        code, out, _ = run(capfd, "train", "--rule", f"own.py:{rule}", "--name", rule, *small)
        assert code == 0
        assert f"fastweights generate runs/{rule} --rule own.py:{rule}" in out
        code, out, _ = run(capfd, "generate", f"runs/{rule}", "--rule", f"own.py:{rule}", "--prompt", "to be", "--tokens", "8")
        assert code == 0
        assert out.startswith("to be")
        code, _, err = run(capfd, "generate", f"runs/{rule}")
        assert code == 2
        assert f"--rule FILE.py:{rule}" in err


def test_generation_continues_from_a_memory_file(capfd, here):
    small = ["--steps", "4", "--batch", "2", "--length", "32", "--depth", "1", "--d-model", "16", "--heads", "2", "--text", "text.txt"]
    run(capfd, "train", "--name", "m", *small)
    for _ in range(2):
        code, _, _ = run(capfd, "generate", "runs/m", "--prompt", "a", "--tokens", "3", "--memory", "memory.safetensors")
        assert code == 0
    assert (here / "memory.safetensors").is_file()


def test_files_that_users_trust_us_with_are_safe(capfd, here):
    small = ["--steps", "4", "--batch", "2", "--length", "32", "--depth", "1", "--d-model", "16", "--heads", "2", "--text", "text.txt"]
    run(capfd, "train", "--rule", "own.py:leaky_delta", "--name", "m", *small)
    run(capfd, "train", "--rule", "own.py:leaky_delta", "--name", "other", "--seed", "1", *small)
    own = ["--rule", "own.py:leaky_delta", "--tokens", "2"]
    (here / "box").mkdir()
    (here / "box" / "precious.txt").write_text("mine")
    code, _, err = run(capfd, "generate", "runs/m", "--memory", "box", *own)
    assert (code, "is a folder" in err) == (2, True)
    assert (here / "box" / "precious.txt").read_text() == "mine"
    assert run(capfd, "generate", "runs/m", "--memory", "kept", *own)[0] == 0
    code, _, err = run(capfd, "generate", "runs/other", "--memory", "kept", *own)
    assert (code, "memory of another model" in err) == (2, True)
    (here / "own.py").write_text(RULES.replace("return W * g.exp()", "return W * (2 * g).exp()"))
    code, _, err = run(capfd, "train", "--rule", "own.py:leaky_delta", "--name", "m", "--resume", *small)
    assert (code, "fingerprint differs" in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def x(:", "line 1, cannot be read: SyntaxError"),
        ("import gone_away", "ModuleNotFoundError"),
        ("y = nothing", "line 1, cannot be read: NameError"),
    ],
)
def test_rule_files_that_cannot_be_read(capfd, here, text, message):
    (here / "bad.py").write_text(text)
    code, _, err = run(capfd, "check", "bad.py:x")
    assert (code, message in err) == (2, True)


def test_bodies_that_raise_are_told_with_their_line(capfd, here):
    (here / "bad.py").write_text(RULES.replace("outer(k, v)", "outer(undefined, v)"))
    code, _, err = run(capfd, "check", "bad.py:wrong")
    assert code == 2
    assert "bad.py:" in err
    assert "undefined" in err


def test_a_run_that_is_not_there_cannot_be_resumed(capfd, here):
    code, _, err = run(capfd, "train", "--text", "text.txt", "--name", "gone", "--length", "32", "--resume")
    assert (code, "no checkpoint to resume from" in err) == (2, True)
    assert not (here / "runs" / "gone").exists()


def test_text_from_standard_input(capfd, here, monkeypatch):
    class Piped:
        buffer = io.BytesIO(b"some piped text, again and again. " * 40)

    monkeypatch.setattr(sys, "stdin", Piped)
    words = ["--steps", "2", "--batch", "1", "--length", "16", "--depth", "1", "--d-model", "16", "--heads", "2"]
    code, out, _ = run(capfd, "train", "--text", "-", "--name", "piped", *words)
    assert code == 0
    assert "text of 1360 bytes" in out


def test_doctor(capfd):
    code, out, _ = run(capfd, "doctor")
    assert code == 0
    assert "torch" in out


@pytest.mark.parametrize("verb", ["rules", "check", "train", "generate", "doctor"])
def test_every_verb_shows_an_example(capfd, verb):
    code, out, _ = run(capfd, verb, "--help")
    assert code == 0
    assert f"Example: fastweights {verb}" in out


def test_importing_the_package_needs_only_torch():
    code = "import sys, fastweights; print(*sorted({'matplotlib', 'tyro', 'rich', 'safetensors'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not out.strip()


@pytest.mark.skipif(library().lib is None, reason=f"no kernels: {library().why}")
def test_bench_writes_what_it_measured(here, capfd, monkeypatch):
    for name in scans.SHAPES:
        monkeypatch.setitem(scans.SHAPES, name, (1, 2, 32, 16))
    monkeypatch.setattr(scans, "GOALS", {(16, False): 0.0, (16, True): 2.0})
    code, out, _ = run(capfd, "bench", "--parts", "scans", "decode", "--shapes", "A", "--seconds", "0")
    assert code == 0
    assert "Gated DeltaNet" in out
    found = json.loads((here / "runs/bench/bench.json").read_text())
    assert len(found["scans"]) == 2 * len(scans.CLASSES)
    assert all(0 < row["share"] < 1 for row in found["scans"])
    assert found["decode"]["step"] > 0
    assert (here / "runs/bench/bench.png").stat().st_size > 10_000


def test_several_experiments_share_a_page(here, capfd):
    code, out, _ = run(capfd, "reproduce", "blocking", "rescorla-wagner", "blocking", "--quick", "--seeds", "1")
    assert code == 0
    assert "2 of 2 came out" in out
    page = (here / "runs/reproduce/index.html").read_text()
    assert page.count("<img") == 2
    run(capfd, "reproduce", "successor-representation", "blocking", "--quick", "--seeds", "1")
    assert (here / "runs/reproduce/index.html").read_text().count("<img") == 3  # of all that have been run
    code, _, err = run(capfd, "reproduce", "blocking", "--all")
    assert code == 2
    assert "not both" in err


@pytest.mark.parametrize("words", [["hebb,gated_delta+softmax"], ["hebb", "gated_delta+softmax"]], ids=["commas", "spaces"])
def test_compare_trains_every_rival_alike(here, capfd, words):
    small = ("--sizes", "16", "--depth", "2", "--steps", "2", "--heads", "2")
    code, out, _ = run(capfd, "compare", "--task", "mqar:pairs=2,tokens=16", "--rules", *words, *small)
    assert code == 0
    folder = here / "runs/compare-mqar"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [row["rule"] for row in rows] == ["hebb", "gated_delta+softmax"]
    assert (folder / "figure.pdf").stat().st_size > 5000
    assert "accuracy" in out


def test_compare_without_a_rival(here, capfd):
    code, _, err = run(capfd, "compare", "--task", "mqar", "--rules", "hebb,", "--sizes", "16")
    assert code == 2
    assert "at least one rule" in err


def test_of_the_processes_of_torchrun_the_first_tells(monkeypatch):
    assert tells()
    monkeypatch.setenv("RANK", "1")
    assert tells()  # alone, whatever else set it
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not tells()
    monkeypatch.setenv("RANK", "0")
    assert tells()
