"""The training loop. A run is a folder: config.json, metrics.jsonl, checkpoints/, figures/."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from .. import plots
from ..language.errors import FastWeightError
from ..layers.programmer import is_gate_parameter
from ..models.files import last_checkpoint, read_json, write_json
from ..models.language_model import LanguageModel
from ..models.sequence_model import SequenceModel
from ..tasks.source import Source, VectorSource
from . import checkpoint
from .config import TrainConfig, differences
from .metrics import Metrics, read_metrics
from .scores import Scores, kind_of, loss_of, score, told, unit


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C or SIGTERM) and has saved itself."""

    def __init__(self, signal_number: int, command: str) -> None:
        super().__init__(f"stopped and saved; continue with: {command}")
        self.signal_number = signal_number


class Result(NamedTuple):
    """Where a finished run lies, its model, and the last validation.

    ``bits`` a target, and the share of targets that are told right, where there are classes to tell; ``error`` is the mean squared
    distance, where there are numbers. What does not apply is NaN. ``longer`` is the same at the lengths that a task tests on.
    """

    folder: Path
    model: LanguageModel
    bits: float
    accuracy: float
    tokens_per_second: float
    error: float = math.nan
    longer: Scores | None = None


def train(config: TrainConfig, console: Console | None = None) -> Result:
    """Train a small model; every ``checkpoint_every`` steps, and when told to stop, everything is saved.

    A ``LanguageModel`` on text or on a task of tokens, a ``SequenceModel`` on a task of vectors (``fastweights.tasks``).

    >>> import tempfile
    >>> config = TrainConfig(task="parity:longer=41-80", rule="deltaproduct", depth=1, steps=2, runs=tempfile.mkdtemp())
    >>> result = train(config, Console(quiet=True))
    >>> 0 < result.accuracy < 1, 0 < result.longer.accuracy < 1
    (True, True)
    """
    config.check()
    console = console or Console()
    run = config.folder()
    source = config.source()
    model = build_model(config, source)
    optimiser = build_optimiser(model, config)
    source.batch(config.seed, 0, config.batch, config.length)  # data that will not do is refused before anything is written
    done = _begin(run, config, source, model, optimiser)
    metrics = Metrics(run / "metrics.jsonl", upto=done.step)
    console.print(f"data: {source.identity}", highlight=False, soft_wrap=True, markup=False)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{run}: {parameters:,} parameters, layers {', '.join(model.config.layers)}", highlight=False, soft_wrap=True)
    try:
        with _until_told_to_stop() as stop, _bar(console) as bar:
            scores, longer, speed = _steps(config, run, source, model, optimiser, done, metrics, stop, bar, console)
    finally:
        metrics.close()
        lines = _drawn(source, read_metrics(run / "metrics.jsonl"))
        plots.loss_curve({run.name: lines}, run / "figures" / "loss.png", unit=unit(config.task, kind_of(source)))
    return Result(run, model.eval(), scores.bits, scores.accuracy, speed, scores.error, longer)


def build_model(config: TrainConfig, source: Source | VectorSource) -> Any:
    """A ``LanguageModel`` for tokens, a ``SequenceModel`` for vectors."""
    if kind_of(source) == "tokens":
        made, own = config.model(source.vocabulary)  # type: ignore[union-attr]
        return LanguageModel(made, own, seed=config.seed)
    made, own = config.model()
    return SequenceModel(made, d_in=source.d_in, d_out=source.d_out, rules=own, seed=config.seed)  # type: ignore[union-attr]


def _begin(
    run: Path, config: TrainConfig, source: Source | VectorSource, model: Any, optimiser: torch.optim.Optimizer
) -> checkpoint.Progress:
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
    config: TrainConfig, run: Path, source: Source | VectorSource, model: Any, optimiser: torch.optim.Optimizer,
    done: checkpoint.Progress, metrics: Metrics, stop: list[int], bar: Progress, console: Console,
) -> tuple[Scores, Scores | None, float]:  # fmt: skip
    task = bar.add_task("", total=config.steps, completed=done.step, info="")
    found: tuple[Scores, Scores | None] | None = None
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
            found = validate(model, source, config)
            metrics.add(step=step + 1, **{f"{part}_{n}": x for part, scores in _parts(found) for n, x in scores.known().items()})
            _report(console, config, done, loss, found)
        bar.update(task, completed=step + 1, info=f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")
        if last or stop or (step + 1) % config.checkpoint_every == 0:
            checkpoint.save_checkpoint(run, model, optimiser, done)
        if stop and not last:
            raise Interrupted(stop[0], command(config))
    return *(found or validate(model, source, config)), done.tokens / max(done.seconds, 1e-9)


def _one_step(
    config: TrainConfig, source: Source | VectorSource, model: nn.Module, optimiser: torch.optim.Optimizer, step: int
) -> tuple[float, float, int]:
    model.train()
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)
    inputs, targets = source.batch(config.seed, step, config.batch, config.length)
    loss = loss_of(model(inputs)[0], targets)
    optimiser.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimiser.step()
    return loss.item(), norm.item(), inputs.shape[0] * inputs.shape[1]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    along = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(along, 1.0)))


def build_optimiser(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; vectors and the parameters of decays keep their size."""
    named = list(model.named_parameters())
    decayed = [p for n, p in named if p.ndim >= 2 and not is_gate_parameter(n)]
    kept = [p for n, p in named if p.ndim < 2 or is_gate_parameter(n)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def validate(model: nn.Module, source: Source | VectorSource, config: TrainConfig) -> tuple[Scores, Scores | None]:
    """How well a model does on what it is not trained on, and at the longer lengths that a task is tested at, if it has such."""
    model.eval()
    further = getattr(source, "extended", lambda: None)()
    here = score(model, source.validation(config.batch, config.length))
    return here, None if further is None else score(model, further.validation(config.batch, config.length))


def _parts(found: tuple[Scores, Scores | None]) -> list[tuple[str, Scores]]:
    return [(part, scores) for part, scores in zip(("validation", "longer"), found, strict=True) if scores is not None]


def _drawn(source: Source | VectorSource, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics as ``plots`` draws them, which takes losses in nats and draws bits."""
    if kind_of(source) != "regression":
        return lines
    named: Mapping[str, tuple[str, float]] = {"loss": ("loss", 2 * math.log(2)), "validation_error": ("validation_bits", 1.0)}
    return [{named.get(n, (n, 1))[0]: x * named.get(n, (n, 1))[1] for n, x in line.items()} for line in lines]


def _report(console: Console, config: TrainConfig, done: checkpoint.Progress, loss: float, found: tuple[Scores, Scores | None]) -> None:
    left = done.seconds / done.step * (config.steps - done.step)
    said = "  ".join(f"{part} {told(scores, config.task)}" for part, scores in _parts(found))
    console.print(
        f"step {done.step:>6}/{config.steps}  loss {loss:.3f}  {said}  {done.tokens / done.seconds:,.0f} tokens/s  {left:.0f} s left",
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
