"""The training loop. A run is a folder: config.json, metrics.jsonl, checkpoints/, figures/."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from .. import plots
from ..language.errors import FastWeightError
from ..layers.programmer import is_gate_parameter
from ..models.files import last_checkpoint, read_json, write_json
from ..models.language_model import LanguageModel
from ..tasks.source import IGNORED, Source
from . import checkpoint
from .config import TrainConfig, differences
from .metrics import Metrics, read_metrics


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C or SIGTERM) and has saved itself."""

    def __init__(self, signal_number: int, command: str) -> None:
        super().__init__(f"stopped and saved; continue with: {command}")
        self.signal_number = signal_number


class Result(NamedTuple):
    """Where a finished run lies, its model, and the last validation."""

    folder: Path
    model: LanguageModel
    bits: float
    accuracy: float
    tokens_per_second: float


def train(config: TrainConfig, console: Console | None = None) -> Result:
    """Train a small language model; every ``checkpoint_every`` steps, and when told to stop, everything is saved."""
    config.check()
    console = console or Console()
    run = config.folder()
    source = config.source()
    model_config, own = config.model(source.vocabulary)
    model = LanguageModel(model_config, own, seed=config.seed)
    optimiser = build_optimiser(model, config)
    source.batch(config.seed, 0, config.batch, config.length)  # data that will not do is refused before anything is written
    done = _begin(run, config, source, model, optimiser)
    metrics = Metrics(run / "metrics.jsonl", upto=done.step)
    if config.task == "text":
        console.print(f"data: {source.identity}", highlight=False, soft_wrap=True)
    console.print(
        f"{run}: {model.parameters_count():,} parameters, layers {', '.join(model.config.layers)}", highlight=False, soft_wrap=True
    )
    try:
        with _until_told_to_stop() as told, _bar(console) as bar:
            bits, accuracy, speed = _steps(config, run, source, model, optimiser, done, metrics, told, bar, console)
    finally:
        metrics.close()
        plots.loss_curve({run.name: read_metrics(run / "metrics.jsonl")}, run / "figures" / "loss.png", unit=_unit(config))
    return Result(run, model.eval(), bits, accuracy, speed)


def _begin(run: Path, config: TrainConfig, source: Source, model: LanguageModel, optimiser: torch.optim.Optimizer) -> checkpoint.Progress:
    """A fresh run folder, or the state of the one to resume."""
    checkpoint.clean(run)
    started = last_checkpoint(run) is not None
    if config.resume and started:
        stored = read_json(run / "config.json")
        if changed := differences(stored, config):
            raise FastWeightError(
                f"cannot resume {run} with other options: {', '.join(changed)}; repeat its options, or start a new run with --name"
            )
        done = checkpoint.load_checkpoint(run, model, optimiser)
        if done.data != source.identity:
            raise FastWeightError(f"cannot resume {run}: it was trained on {done.data}, now the data is {source.identity}")
        return done
    if config.resume:
        raise FastWeightError(f"{run} has no checkpoint to resume from; leave --resume out to start it, or check --name and --runs")
    if started:
        raise FastWeightError(f"{run} is already there; continue it with --resume, or start another with --name")
    write_json(run / "config.json", dataclasses.asdict(config))
    return checkpoint.Progress(0, 0, 0.0, source.identity)


def _steps(
    config: TrainConfig, run: Path, source: Source, model: LanguageModel, optimiser: torch.optim.Optimizer,
    done: checkpoint.Progress, metrics: Metrics, told: list[int], bar: Progress, console: Console,
) -> tuple[float, float, float]:  # fmt: skip
    task = bar.add_task("", total=config.steps, completed=done.step, info="")
    bits = accuracy = float("nan")
    for step in range(done.step, config.steps):
        began = time.perf_counter()
        loss, norm, tokens = _one_step(config, source, model, optimiser, step)
        seconds = time.perf_counter() - began
        done = done._replace(step=step + 1, tokens=done.tokens + tokens, seconds=done.seconds + seconds)
        metrics.add(step=step + 1, loss=loss, gradient_norm=norm, tokens=done.tokens, seconds=round(done.seconds, 4),
                    learning_rate=optimiser.param_groups[0]["lr"])  # fmt: skip
        if not math.isfinite(loss):
            raise FastWeightError(f"the loss is {loss} at step {step + 1}; start again with a lower --learning-rate")
        last = step + 1 == config.steps
        if last or (step + 1) % config.evaluate_every == 0:
            bits, accuracy = validate(model, source, config)
            metrics.add(step=step + 1, validation_bits=bits, validation_accuracy=accuracy)
            _report(console, config, done, loss, bits, accuracy)
        bar.update(task, completed=step + 1, info=f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")
        if last or told or (step + 1) % config.checkpoint_every == 0:
            checkpoint.save_checkpoint(run, model, optimiser, done)
        if told and not last:
            raise Interrupted(told[0], command(config))
    if math.isnan(bits):
        bits, accuracy = validate(model, source, config)
    return bits, accuracy, done.tokens / max(done.seconds, 1e-9)


def _one_step(
    config: TrainConfig, source: Source, model: LanguageModel, optimiser: torch.optim.Optimizer, step: int
) -> tuple[float, float, int]:
    model.train()
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)
    inputs, targets = source.batch(config.seed, step, config.batch, config.length)
    loss = _loss(model(inputs)[0], targets)
    optimiser.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimiser.step()
    return loss.item(), norm.item(), inputs.numel()


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    along = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(along, 1.0)))


def build_optimiser(model: LanguageModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; vectors and the parameters of decays keep their size."""
    named = list(model.named_parameters())
    decayed = [p for n, p in named if p.ndim >= 2 and not is_gate_parameter(n)]
    kept = [p for n, p in named if p.ndim < 2 or is_gate_parameter(n)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


@torch.no_grad()
def validate(model: LanguageModel, source: Source, config: TrainConfig) -> tuple[float, float]:
    """Bits for each target (per byte, for text), and how many are told right."""
    model.eval()
    nats, right, count = 0.0, 0, 0
    for inputs, targets in source.validation(config.batch, config.length):
        logits, _ = model(inputs)
        counted = targets != IGNORED
        n = int(counted.sum())
        nats += _loss(logits, targets).item() * n
        right += int((logits.argmax(-1) == targets)[counted].sum())
        count += n
    if not count:
        return float("nan"), float("nan")
    return nats / count / math.log(2), right / count


def _unit(config: TrainConfig) -> str:
    return "bits per byte" if config.task == "text" else "bits per value"


def _report(console: Console, config: TrainConfig, done: checkpoint.Progress, loss: float, bits: float, accuracy: float) -> None:
    left = done.seconds / done.step * (config.steps - done.step)
    console.print(
        f"step {done.step:>6}/{config.steps}  loss {loss:.3f}  validation {bits:.3f} {_unit(config)}, {accuracy:.1%} right  "
        f"{done.tokens / done.seconds:,.0f} tokens/s  {left:.0f} s left",
        highlight=False,
        soft_wrap=True,
    )


def command(config: TrainConfig) -> str:
    """The command that resumes a run."""
    words = ["fastweights", "train"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "resume" or value == field.default:
            continue
        option = "--" + field.name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    return shlex.join([*words, "--resume"])


@contextmanager
def _until_told_to_stop() -> Iterator[list[int]]:
    """The numbers of the signals that asked to stop; only a main thread can be told."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {s: signal.signal(s, lambda number, _: told.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bar(console: Console) -> Progress:
    columns = [BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[info]}"), TimeRemainingColumn()]
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
