"""Several processes do the steps of one; any number of them continues; and killing one loses nothing but the steps since a checkpoint."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import fastweights as fw
from fastweights.models import load
from fastweights.tasks import task as task_named
from fastweights.train import TrainConfig, train
from fastweights.train.config import differences
from fastweights.train.metrics import read_metrics
from fastweights.train.scores import counts, loss_of

TINY = {"steps": 6, "batch": 4, "length": 32, "depth": 2, "d_model": 16, "heads": 2, "evaluate_every": 3, "checkpoint_every": 3,
        "rule": "gated_delta,softmax"}  # fmt: skip
NUMBERS = {"task": "icl-regression:d=3,examples=5", "rule": "delta", "depth": 1}
UNEVEN = {"task": "parity:lengths=3-8,longer=9-12", "rule": "delta", "depth": 1}

# One interpreter imports the library, and forks into the processes of one group after the other, as torchrun would start them.
GROUPS = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from rich.console import Console
from fastweights import plots
from fastweights.language.errors import FastWeightError
from fastweights.models import files
from fastweights.train import Interrupted, TrainConfig, checkpoint, loop, processes

plots.loss_curve = lambda *_, **__: None

def die_when_renaming(step):
    rename = os.replace
    def replace(a, b):
        if str(b).endswith(f"step_{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)
    files.os.replace = replace

def die_when_handing_over(step):
    save, whole = checkpoint.save_checkpoint, checkpoint.whole
    given = []
    def one(x):
        given.append(x)
        if len(given) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(x)
    def watched(run, model, optimiser, progress, among):
        checkpoint.whole = one if progress.step == step else whole
        return save(run, model, optimiser, progress, among)
    checkpoint.save_checkpoint = watched

def be_told_to_stop(step):
    one_step = loop._one_step
    def told(job, now):
        if now + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(job, now)
    loop._one_step = told

def work(group):
    for hook, rank, step in group["hooks"]:
        if rank == int(os.environ["RANK"]):
            globals()[hook](step)
    with processes.processes() as among:
        assert among.size == group["size"]
        for config in group["configs"]:
            loop.train(TrainConfig(**config), Console(width=200))

for group in json.loads(sys.argv[1]):
    children = []
    for rank in range(group["size"]):
        if child := os.fork():
            children.append(child)
            continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(group["size"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(group["port"]))
        signal.alarm(120)
        code = 1
        try:
            work(group)
            code = 0
        except Interrupted as stop:
            code = 128 + stop.signal_number
        except FastWeightError as error:
            print(f"error on {rank}: {error}", file=sys.stderr)
            code = 2
        except RuntimeError as error:
            print(f"lost on {rank}: {error}", file=sys.stderr)
            code = 3
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("CODES", json.dumps(codes), flush=True)
"""


def group(*configs, size=2, hooks=()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"configs": configs, "size": size, "hooks": hooks, "port": port}


def run_groups(*groups):
    """What every group printed, and the exit codes of its processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", GROUPS, json.dumps(groups)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("CODES ")
    codes = [json.loads(part.splitlines()[0]) for part in parts[1:]]
    printed = [parts[0], *(part.partition("\n")[2] for part in parts[1:-1])]
    return printed, codes, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process trains ``one-*``; two, and four, train the others and continue what one has begun."""
    folder = tmp_path_factory.mktemp("processes")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)

    def options(name, **changes):
        return {**TINY, "text": str(text), "runs": str(folder), "name": name, **changes}

    def alone(name, **changes):
        train(TrainConfig(**options(name, **changes)), Console(quiet=True))

    alone("one")
    alone("one-accumulated", batch=2, accumulate=2)
    alone("one-numbers", **NUMBERS)
    alone("one-uneven", **UNEVEN)
    alone("one-long", steps=15)
    alone("passed-on", steps=3)
    spread = [
        options(f"two{name}-{shard}", shard=shard, **changes)
        for shard in ("none", "full")
        for name, changes in {
            "": {}, "-accumulated": {"batch": 2, "accumulate": 2}, "-numbers": NUMBERS, "-uneven": UNEVEN,
            "-bfloat16": {"precision": "bfloat16"},
        }.items()
    ]  # fmt: skip
    passed_on = [options("passed-on", resume=True, steps=6, shard="full"), options("passed-on", resume=True, steps=9, shard="none")]
    killed = {"steps": 9, "shard": "full"}
    printed, codes, errors = run_groups(
        group(*spread, *passed_on),
        group(options("passed-on", resume=True, steps=12, shard="full"), size=4),
        group(options("killed-0", **killed), hooks=[("die_when_renaming", 0, 6)]),
        group(options("killed-1", **killed), hooks=[("die_when_handing_over", 1, 6)]),
        group(options("stopped", steps=100, checkpoint_every=100), hooks=[("be_told_to_stop", 1, 2)]),
        group(options("odd", batch=3)),
        group(options("missing", resume=True)),
    )
    alone("passed-on", resume=True, steps=15)
    return folder, alone, printed, codes, errors


def values(run):
    """Everything measured, but for times."""
    return [{n: x for n, x in line.items() if n != "seconds"} for line in read_metrics(run / "metrics.jsonl")]


def assert_equal_runs(a, b, tolerance=1e-5):
    left, right = values(a), values(b)
    assert [x.keys() for x in left] == [x.keys() for x in right]
    assert all(abs(x[n] - y[n]) < tolerance for x, y in zip(left, right, strict=True) for n in x)
    ours, theirs = load(a).state_dict(), load(b).state_dict()
    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=tolerance) for n in theirs)


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("what", ["", "-accumulated", "-numbers", "-uneven"])
def test_two_processes_do_the_steps_of_one(runs, what, shard):
    folder, *_ = runs
    assert_equal_runs(folder / f"two{what}-{shard}", folder / f"one{what}")


def test_rows_of_a_batch_may_have_different_numbers_of_targets():
    _, targets = task_named(UNEVEN["task"]).batch(0, 0, 4, 0)
    first, second = (int(counts(part).sum()) for part in targets.tensor_split(2))
    assert first != second


def test_two_half_batches_are_one_batch(runs):
    """The validation batches differ in size, not in what is in them."""
    folder, *_ = runs
    assert_equal_runs(folder / "one-accumulated", folder / "one")


@pytest.mark.parametrize("shard", ["none", "full"])
def test_bfloat16(runs, shard):
    folder, *_ = runs
    exact, rounded = values(folder / f"two-{shard}"), values(folder / f"two-bfloat16-{shard}")
    differ = [abs(x["loss"] - y["loss"]) for x, y in zip(exact, rounded, strict=True) if "loss" in x]
    assert 0 < max(differ) < 0.05
    assert {t.dtype for t in load(folder / f"two-bfloat16-{shard}").state_dict().values()} == {torch.float32}


def test_any_number_of_processes_continues(runs):
    """1 process, then 2 in shares, 2 with all, 4 in shares (some of which are empty), and 1 again."""
    folder, _, _, codes, _ = runs
    assert codes[:2] == [[0, 0], [0, 0, 0, 0]]
    assert_equal_runs(folder / "passed-on", folder / "one-long")


def test_the_first_process_alone_prints(runs):
    _, _, printed, _, _ = runs
    assert printed[1].count("step      9/12") == 0
    assert printed[1].count("step     12/12") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_of_a_process_during_a_checkpoint(runs, rank):
    """Of the first when all is written but not renamed, of the second when it has handed over some of its parts."""
    folder, alone, _, codes, _ = runs
    killed = folder / f"killed-{rank}"
    assert codes[2 + rank][rank] == -signal.SIGKILL
    assert codes[2 + rank][1 - rank] == 3
    assert [p.name for p in sorted((killed / "checkpoints").glob("step_*"))] == ["step_00000003"]
    assert len(list((killed / "checkpoints").glob(".*"))) == 1 - rank
    assert [x["step"] for x in values(killed) if "loss" in x] == list(range(1, 7))
    alone(f"killed-{rank}", resume=True, steps=15)
    assert not list((killed / "checkpoints").glob(".*"))
    assert_equal_runs(killed, folder / "one-long")


def test_all_stop_when_one_is_told_to(runs):
    folder, _, _, codes, _ = runs
    assert codes[4] == [128 + signal.SIGTERM] * 2
    assert [p.name for p in (folder / "stopped" / "checkpoints").iterdir()] == ["step_00000002"]
    assert [x["step"] for x in values(folder / "stopped")] == [1, 2]


def test_what_is_refused_is_refused_by_all(runs):
    *_, codes, errors = runs
    assert codes[5:] == [[2, 2], [2, 2]]
    for rank in (0, 1):
        assert f"error on {rank}: --batch is 3, expected a multiple of the 2 processes" in errors
    assert errors.count("missing has no checkpoint to resume from") == 2


def test_options(tmp_path):
    with pytest.raises(fw.FastWeightError, match="--accumulate is 0"):
        train(TrainConfig(accumulate=0))
    if not torch.cuda.is_available():
        with pytest.raises(fw.FastWeightError, match="--device is cuda"):
            train(TrainConfig(device="cuda", runs=str(tmp_path)))
    assert differences({"seed": 1, "shard": "full"}, TrainConfig(accumulate=2)) == ["--accumulate (was 1, is 2)", "--seed (was 1, is 0)"]


def test_parts_of_a_batch_add_up_to_its_loss():
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 5, 3, generator=draw, dtype=torch.float64)
    classes = torch.randint(3, (4, 5), generator=draw)
    classes[0] = classes[1] = classes[2, 1:] = -100  # the first half has none
    numbers = torch.randn(4, 5, 3, generator=draw, dtype=torch.float64)
    numbers[classes == -100] = float("nan")
    for targets in (classes, numbers):
        parts = [loss_of(o, t, int(counts(targets).sum())) for o, t in zip(outputs.chunk(2), targets.chunk(2), strict=True)]
        assert parts[0] == 0
        assert abs(sum(parts) - loss_of(outputs, targets)) < 1e-12


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command itself: on 2 processes, then 1, then 4."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    fixed = {**TINY, "text": str(text), "runs": str(tmp_path)}

    def command(name, size, *extra, **changes):
        words = [w for k, v in {**fixed, "name": name, **changes}.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
        line = [*(start or [sys.executable]), "-m", "fastweights", "train", *words, *extra]
        done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    command("whole", 1, steps=9)
    command("cut", 2, "--shard", "full", steps=3)
    command("cut", 1, "--resume", steps=6)
    command("cut", 4, "--resume", "--shard", "full", steps=9)
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")
