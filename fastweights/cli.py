"""Fast weight programmers: rules, checks, training and generation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from .language.errors import FastWeightError
from .verbs import Bench, Check, Compare, Convert, Doctor, Generate, Lens, Reproduce, Rules, Train


def main(arguments: list[str] | None = None) -> None:
    """Entry point; errors that fastweights raises are printed without a traceback."""
    options = tyro.cli(_VERBS, prog="fastweights", args=arguments, description=__doc__)
    try:
        sys.exit(_RUN[type(options)](options, Console()))
    except FastWeightError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of a pipe went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(2)


def _say(console: Console, text: str) -> None:
    """Plain text, wrapped by the terminal only, so that it can be copied whole."""
    console.print(escape(text), highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    """A table whose columns but the last keep to one line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, no_wrap=i < len(columns) - 1, overflow="fold")
    return table


def _rules(options: Rules, console: Console) -> int:
    from .language.rule import FORMS
    from .models import PRESETS, SYSTEMS
    from .rules import CATALOGUE, RECURRENT
    from .train.config import find_rule

    if options.name in SYSTEMS:
        system = SYSTEMS[options.name]
        _say(console, f"{options.name} is a system ({system.cite}), a layer by itself; forms: {', '.join(system.forms)}\n{system.equation}")
        return 0
    if options.name:
        preset = PRESETS.get(options.name)
        if preset is not None:
            _say(console, f"{options.name} is a preset ({preset.cite}): the rule {preset.rule} with {_made(preset)}")
        _one_rule(find_rule(options.name if preset is None else preset.rule), console)
        return 0
    if options.markdown:
        _say(console, markdown_table())
        return 0
    table = _table("rule", "the new W (and y, if it is not W q); what one step descends")
    for rule in (*CATALOGUE, *RECURRENT):
        forms = f"{rule.kind}; all forms" if len(rule.forms) == len(FORMS) else ", ".join(rule.forms)
        objective = f"; descends {rule.objective.equation}" if rule.objective else ""
        about = f"[dim]{escape(forms + objective)}[/dim]"
        table.add_row(f"[bold]{rule.name}[/bold]", f"{escape(rule.equation())}\n{about}")
    console.print(table)
    presets = _table("preset", "rule", "options of the layer; source")
    for name, preset in PRESETS.items():
        presets.add_row(f"[bold]{name}[/bold]", preset.rule, f"{_made(preset)}\n[dim]{escape(preset.cite)}[/dim]")
    console.print(presets)
    systems = _table("system", "what it computes; forms; source")
    for name, system in SYSTEMS.items():
        about = f"[dim]{', '.join(system.forms)}; {escape(system.cite)}[/dim]"
        systems.add_row(f"[bold]{name}[/bold]", f"{escape(system.equation)}\n{about}")
    console.print(systems)
    _say(console, "All forms: recurrent, parallel, chunk. Rules combine: r1 >> r2, r * n, r.T. About one: fastweights rules NAME")
    _say(console, "A preset is a published layer, a rule with its programmer; a system is more than that: fastweights train --rule NAME")
    return 0


def _made(preset: Any) -> str:
    """How a preset's layer is made."""
    own = [f"{signal} of its own" for signal in preset.signals]
    return ", ".join([*(f"{k} {v}" for k, v in preset.options.items()), *own])


def markdown_table() -> str:
    """The catalogue as it stands in the README."""
    from .rules import CATALOGUE

    lines = ["| rule | the new W (and y, if it is not W q) | class | source |", "|---|---|---|---|"]
    for rule in CATALOGUE:
        equation = rule.equation().replace("|", "\\|")
        lines.append(f"| `{rule.name}` | {equation} | {rule.kind} | {rule.cite} |")
    return "\n".join(lines)


def _one_rule(rule: Any, console: Console) -> None:
    console.print(Panel(escape(f"{rule.equation()}\n\n{rule.doc}".strip()), title=escape(rule.name)))
    table = _table("signal", "role", "shape")
    for name, s in rule.signals.items():
        table.add_row(name, str(s.role), s.letters(rule.shapes))
    for name, s in list(rule.states.items())[1:]:
        table.add_row(name, str(s.role), "carried from token to token")
    console.print(table)
    form = rule.explain() if rule.trace.program is None else str(rule.program)
    facts = {
        "forms": ", ".join(rule.forms), "normal form": form, "latex": rule.latex(),
        "objective": rule.objective.equation if rule.objective else "", "source": rule.cite,
    }  # fmt: skip
    for what, text in facts.items():
        if text:
            console.print(f"[bold]{what}[/bold]")
            _say(console, "  " + text.replace("\n", "\n  "))


def _check(options: Check, console: Console) -> int:
    from .engine.check import check
    from .train.config import find_rule

    rule = find_rule(options.name)
    _say(console, repr(rule))
    with console.status("running every form ..."):
        report = check(rule, seed=options.seed)
    table = _table("form", "dtype", "chunk", "error", "gradient", "tokens/s", "verdict")
    for row in report.rows:
        verdict = {None: "", True: "[green]PASS[/green]", False: "[red]FAIL[/red]"}[row.passed]
        errors = ["" if e is None else f"{e:.1e}" for e in (row.error, row.gradient)]
        speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        table.add_row(row.what, row.dtype, str(row.chunk or ""), *errors, speed, verdict)
    console.print(table)
    for row in report.rows:
        if row.note:
            _say(console, f"{row.what} {row.dtype}: {row.note}".replace(" :", ":"))
    _say(console, f"{rule.name}: {'PASS' if report.passed else 'FAIL'}")
    return 0 if report.passed else 1


def _train(options: Train, console: Console) -> int:
    from .train.loop import Interrupted, train
    from .train.processes import tells

    console = console if tells() else Console(quiet=True)
    try:
        result = train(options, console)
    except Interrupted as stop:
        _say(console, str(stop))
        return 128 + stop.signal_number
    _say(console, f"done: {result.folder}  (loss curve: {result.folder}/figures/loss.png)")
    if options.task == "text":
        _say(console, f"generate from it: fastweights generate {result.folder}" + _own(options))
    return 0


def _own(options: Train) -> str:
    files = [part.strip() for part in options.rule.split(",") if ".py:" in part]
    return f" --rule {','.join(files)}" if files else ""


def _generate(options: Generate, console: Console) -> int:
    from .models import Sampler, Stream, load
    from .train.config import layer_names

    own = layer_names(options.rule)[1] if options.rule else {}
    sampler = Sampler(options.temperature, options.top_k, options.top_p)
    if not options.prompt or options.tokens < 0:
        raise FastWeightError("--prompt needs at least one character, and --tokens at least 0")
    if options.memory and Path(options.memory).is_dir():
        raise FastWeightError(f"--memory {options.memory} is a folder; name a file")
    model = load(options.run, own)
    if model.config.vocabulary != 256:
        raise FastWeightError(f"the model in {options.run} was trained on a task, not on bytes of text")
    memory = Path(options.memory) if options.memory else None
    stream = Stream.load(memory, model) if memory and memory.is_file() else Stream(model, options.seed)
    prompt = options.prompt.encode()
    stream.feed(list(prompt))
    out = sys.stdout.buffer
    out.write(prompt)
    for token in stream.generate(options.tokens, sampler):
        out.write(bytes([token]))
        out.flush()
    out.write(b"\n")
    if memory:
        stream.save(memory)
    return 0


def _compare(options: Compare, console: Console) -> int:
    from .compare import compare, draw
    from .experiments.report import as_csv
    from .models.files import write_atomically
    from .plots import save_figure

    points = compare(options.train, options.rules, options.sizes, options.seeds, console)
    table = _table("rule", "d_model", "seed", "parameters", "state", f"{points[0].measure} on {options.train.task}")
    for p in points:
        table.add_row(p.rule, str(p.d_model), str(p.seed), f"{p.parameters:,}", f"{p.state_bytes:,} B", f"{p.score:.3f}")
    console.print(table)
    folder = Path(options.train.runs) / f"compare-{options.train.task.partition(':')[0]}"
    text = as_csv([p._asdict() for p in points])
    write_atomically(folder / "table.csv", lambda p: _write(p, text))
    for suffix in ("png", "pdf"):
        save_figure(draw(points, options.train.task), folder / f"figure.{suffix}")
    _say(console, f"{folder}/table.csv, {folder}/figure.png")
    return 0


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _lens(options: Lens, console: Console) -> int:
    from . import lens
    from .models import load
    from .tasks import read_text
    from .train.config import layer_names

    if options.tokens < 1:
        raise FastWeightError(f"--tokens is {options.tokens}, expected at least 1")
    model = load(options.run, layer_names(options.rule)[1] if options.rule else {})
    with console.status("reading ..."):
        seen = lens.look(model, read_text(options.text)[: options.tokens], window=options.window)
        lens.plot(seen, options.out, layer=options.layer, head=options.head)
    table = _table("layer", "|W| at the end", "kept", "error before", "after", "rank", "")
    for i, (layer, name) in enumerate(zip(seen.layers, seen.names, strict=True)):
        means = (seen.norms[i, :, -1], seen.kept[i], seen.errors.before[i], seen.errors.after[i], seen.ranks[i])
        table.add_row(str(layer), *(f"{float(x.nanmean()):.3g}" for x in means), name)
    console.print(table)
    for note in seen.notes:
        _say(console, note)
    _say(console, f"{len(seen.ids):,} tokens: {options.out}")
    return 0


def _convert(options: Convert, console: Console) -> int:
    from .convert import convert

    _say(console, convert(options.source, options.target, options.to))
    return 0


def _reproduce(options: Reproduce, console: Console) -> int:
    from .experiments import experiments, find
    from .experiments.report import write_page

    if options.quick and options.full:
        raise FastWeightError("--quick and --full are two sizes; give one of them, or none for the size between")
    if options.seeds < 0:
        raise FastWeightError(f"--seeds is {options.seeds}, expected at least 1")
    if options.names and options.all:
        raise FastWeightError(f"give names ({' '.join(options.names)}) or --all, not both")
    if not options.names and not options.all:
        return _list_experiments(console)
    chosen = list(experiments().values()) if options.all else [find(name) for name in dict.fromkeys(options.names)]
    good = [_run_experiment(e, options, console) for e in chosen]
    if len(chosen) > 1:
        _say(console, f"{sum(good)} of {len(chosen)} came out; all on one page: {write_page(options.runs, list(experiments()))}")
    return 0 if all(good) else 1


def _list_experiments(console: Console) -> int:
    from .experiments import experiments
    from .experiments.experiment import SIZES

    table = _table("experiment", *SIZES, "claim")
    for e in experiments().values():
        table.add_row(f"[bold]{e.name}[/bold]", *(_duration(e.seconds[s]) for s in SIZES), escape(f"{e.claim} ({e.cite})"))
    console.print(table)
    _say(console, "Some: fastweights reproduce NAME ... [--quick | --full] [--seeds n]")
    _say(console, "All, with a page that shows them: fastweights reproduce --all --quick")
    return 0


def _run_experiment(e: Any, options: Reproduce, console: Console) -> bool:
    from .experiments.report import finding_row, run, told

    size = "quick" if options.quick else "full" if options.full else "default"
    seeds = options.seeds or (1 if options.all and options.quick else 3)
    _say(console, f"{e.name}: {e.claim} ({e.cite})")
    with console.status("running ...") as status:
        result = run(e, size, seeds, options.runs, lambda text: status.update(f"{e.name}: {text}"))
    table = _table("measured", "expected", "", "what")
    for f in result.findings:
        verdict = "[green]PASS[/green]" if f.passed else "[red]FAIL[/red]"
        table.add_row(told(finding_row(f)), escape(f"{f.expected} ({f.source})"), verdict, escape(f.what))
    console.print(table)
    if result.notes:
        _say(console, result.notes)
    _say(console, f"{e.name}: {'PASS' if result.passed else 'FAIL'}  {options.runs}/reproduce/{e.name}/figure.png")
    return result.passed


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _bench(options: Bench, console: Console) -> int:
    from .bench import run

    run(options.parts, options.shapes, options.seconds, options.out, console)
    return 0


def _doctor(options: Doctor, console: Console) -> int:
    from .doctor import findings

    table = _table("what", "", "found")
    for what, found, good in findings():
        table.add_row(what, {True: "[green]ok[/green]", False: "[red]missing[/red]", None: ""}[good], escape(found))
    console.print(table)
    return 0


_RUN: dict[type, Any] = {
    Rules: _rules, Check: _check, Train: _train, Generate: _generate, Compare: _compare, Lens: _lens, Convert: _convert,
    Reproduce: _reproduce, Bench: _bench, Doctor: _doctor,
}  # fmt: skip
_VERBS: Any = Union[tuple(Annotated[verb, tyro.conf.subcommand(verb.__name__.lower())] for verb in _RUN)]  # noqa: UP007
