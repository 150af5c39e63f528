"""The training loop. A run is a folder: config.json, metrics.jsonl, checkpoints/, figures/."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
from .processes import ALONE, Processes, processes, whole
from .scores import Scores, counts, kind_of, loss_of, score, told, unit


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

    A ``LanguageModel`` on text or on a task of tokens, a ``SequenceModel`` on a task of vectors (``fastweights.tasks``). Under
    ``torchrun`` the processes take their rows of every batch, so that they do the steps that one would do, up to rounding; the first
    alone prints and writes, and any number of them, or one, can resume.

    >>> import tempfile
    >>> config = TrainConfig(task="parity:longer=41-80", rule="deltaproduct", depth=1, steps=2, runs=tempfile.mkdtemp())
    >>> result = train(config, Console(quiet=True))
    >>> 0 < result.accuracy < 1, 0 < result.longer.accuracy < 1
    (True, True)
    """
    config.check()
    with processes(config.device) as among:
        return _trained(config, among, (console or Console()) if among.first else Console(quiet=True))


class _Job(NamedTuple):
    """What stays as it is while a model is trained; ``spread`` is the model as it is called, over all processes."""

    config: TrainConfig
    run: Path
    source: Source | VectorSource
    model: Any
    spread: nn.Module
    optimiser: torch.optim.Optimizer
    among: Processes
    console: Console


def _trained(config: TrainConfig, among: Processes, console: Console) -> Result:
    job = _job(config, among, console)
    run, source = job.run, job.source
    done = _begin(job)
    metrics = Metrics(run / "metrics.jsonl" if among.first else None, upto=done.step)
    console.print(f"data: {source.identity}", highlight=False, soft_wrap=True, markup=False)
    parameters = sum(p.numel() for p in job.model.parameters())
    console.print(f"{run}: {parameters:,} parameters, layers {', '.join(job.model.config.layers)}", highlight=False, soft_wrap=True)
    try:
        with _until_told_to_stop() as stop, _bar(console) as bar:
            scores, longer, speed = _steps(job, done, metrics, stop, bar)
    finally:
        metrics.close()
        if among.first:
            lines = _drawn(source, read_metrics(run / "metrics.jsonl"))
            plots.loss_curve({run.name: lines}, run / "figures" / "loss.png", unit=unit(config.task, kind_of(source)))
    return Result(run, _put_together(job).eval(), scores.bits, scores.accuracy, speed, scores.error, longer)


def _job(config: TrainConfig, among: Processes, console: Console) -> _Job:
    """Model, data and optimiser, before anything is written; what will not do is refused."""
    if config.batch % among.size:
        raise FastWeightError(
            f"--batch is {config.batch}, expected a multiple of the {among.size} processes, each of which takes as many of its sequences"
        )
    source = config.source()
    if among.told(lambda: source.identity) != source.identity:
        raise FastWeightError(f"process {among.rank} reads other data than the first: {source.identity}; give all the same --text")
    source.batch(config.seed, 0, config.batch, config.length)
    model = build_model(config, source).to(among.device)
    spread = among.spread(model, config.shard)
    return _Job(config, config.folder(), source, model, spread, build_optimiser(model, config), among, console)


def _put_together(job: _Job) -> Any:
    """The model, whole on every process."""
    if job.among.size == 1 or job.config.shard == "none":
        return job.model
    model = build_model(job.config, job.source)
    model.load_state_dict({n: whole(t) for n, t in job.model.state_dict().items()})
    return model.to(job.among.device)


def build_model(config: TrainConfig, source: Source | VectorSource) -> Any:
    """A ``LanguageModel`` for tokens, a ``SequenceModel`` for vectors."""
    if kind_of(source) == "tokens":
        made, own = config.model(source.vocabulary)  # type: ignore[union-attr]
        return LanguageModel(made, own, seed=config.seed)
    made, own = config.model()
    return SequenceModel(made, d_in=source.d_in, d_out=source.d_out, rules=own, seed=config.seed)  # type: ignore[union-attr]


def _begin(job: _Job) -> checkpoint.Progress:
    """A fresh run folder, or the state of the one to resume."""
    if job.among.told(lambda: _resumes(job.run, job.config, job.source)):
        return checkpoint.load_checkpoint(job.run, job.model, job.optimiser, job.among)
    return checkpoint.Progress(0, 0, 0.0, job.source.identity)


def _resumes(run: Path, config: TrainConfig, source: Source | VectorSource) -> bool:
    """Whether there is a run to resume, and if not, its fresh folder; what must not be is refused."""
    checkpoint.clean(run)
    started = last_checkpoint(run) is not None
    if config.resume and started:
        stored = read_json(run / "config.json")
        if changed := differences(stored, config):
            raise FastWeightError(
                f"cannot resume {run} with other options: {', '.join(changed)}; repeat its options, or start a new run with --name"
            )
        data = checkpoint.progress_of(run).data
        if data != source.identity:
            raise FastWeightError(f"cannot resume {run}: it was trained on {data}, now the data is {source.identity}")
        return True
    if config.resume:
        checkpoint.progress_of(run)  # says that there is none
    if started:
        raise FastWeightError(f"{run} is already there; continue it with --resume, or start another with --name")
    write_json(run / "config.json", dataclasses.asdict(config))
    return False


def _steps(job: _Job, done: checkpoint.Progress, metrics: Metrics, stop: list[int], bar: Progress) -> tuple[Scores, Scores | None, float]:
    config = job.config
    task = bar.add_task("", total=config.steps, completed=done.step, info="")
    found: tuple[Scores, Scores | None] | None = None
    for step in range(done.step, config.steps):
        began = time.perf_counter()
        loss, norm, tokens = _one_step(job, step)
        seconds = time.perf_counter() - began
        done = done._replace(step=step + 1, tokens=done.tokens + tokens, seconds=done.seconds + seconds)
        metrics.add(step=step + 1, loss=loss, gradient_norm=norm, tokens=done.tokens, seconds=round(done.seconds, 4),
                    learning_rate=job.optimiser.param_groups[0]["lr"])  # fmt: skip
        if not math.isfinite(loss):
            raise FastWeightError(f"the loss is {loss} at step {step + 1}; start again with a lower --learning-rate")
        last = step + 1 == config.steps
        if last or (step + 1) % config.evaluate_every == 0:
            found = validate(job.model, job.source, config, job.among)
            metrics.add(step=step + 1, **{f"{part}_{n}": x for part, scores in _parts(found) for n, x in scores.known().items()})
            _report(job.console, config, done, loss, found)
        bar.update(task, completed=step + 1, info=f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")
        told_to_stop = job.among.largest(stop[0] if stop else 0)
        if last or told_to_stop or (step + 1) % config.checkpoint_every == 0:
            checkpoint.save_checkpoint(job.run, job.model, job.optimiser, done, job.among)
        if told_to_stop and not last:
            raise Interrupted(told_to_stop, command(config, job.among.size))
    return *(found or validate(job.model, job.source, config, job.among)), done.tokens / max(done.seconds, 1e-9)


def _one_step(job: _Job, step: int) -> tuple[float, float, int]:
    """The loss, the norm of its gradient, and the tokens of one step, over all its batches and processes."""
    config, among = job.config, job.among
    job.model.train()
    for group in job.optimiser.param_groups:
        group["lr"] = learning_rate(config, step)
    inputs, targets = job.source.batch(config.seed, step, config.batch * config.accumulate, config.length)
    count = int(counts(targets).sum())
    mine = zip(*(among.rows(x).to(among.device).chunk(config.accumulate) for x in (inputs, targets)), strict=True)
    job.optimiser.zero_grad()
    loss = 0.0
    for i, (x, y) in enumerate(mine):
        wait = i + 1 < config.accumulate and isinstance(job.spread, DistributedDataParallel)  # gradients meet once a step
        with job.spread.no_sync() if wait else nullcontext():
            with _autocast(config, among):
                outputs = job.spread(x)[0]
            part = loss_of(outputs, y, count)
            (part * among.size).backward()  # gradients become means over processes
        loss += part.item()
    norm = whole(torch.nn.utils.clip_grad_norm_(job.model.parameters(), config.clip))
    job.optimiser.step()
    return among.total(loss)[0], norm.item(), inputs.shape[0] * inputs.shape[1]


def _autocast(config: TrainConfig, among: Processes) -> torch.autocast:
    return torch.autocast(among.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


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


def validate(
    model: nn.Module, source: Source | VectorSource, config: TrainConfig, among: Processes = ALONE
) -> tuple[Scores, Scores | None]:
    """How well a model does on what it is not trained on, and at the longer lengths that a task is tested at, if it has such."""
    model.eval()
    further = getattr(source, "extended", lambda: None)()
    found = []
    for part in (source, *(() if further is None else (further,))):
        batches = ((x.to(among.device), y.to(among.device)) for x, y in part.validation(config.batch, config.length))
        with _autocast(config, among):
            found.append(score(model, batches, among))
    return found[0], found[1] if len(found) == 2 else None


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


def command(config: TrainConfig, size: int = 1) -> str:
    """The command that resumes a run, on so many processes of this machine."""
    words = ["fastweights", "train"] if size == 1 else ["torchrun", "--nproc-per-node", str(size), "-m", "fastweights", "train"]
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
