"""Run experiments and write what they found: a folder each, and one page of all of them."""

from __future__ import annotations

import csv
import html
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.files import read_json, write_atomically, write_json
from ..plots import save_figure
from ..train.metrics import Metrics
from .experiment import Experiment, Finding, Result, Setting, Size

RESULT = "result.json"


def run(experiment: Experiment, size: Size, seeds: int, runs: Path, tell: Any) -> Result:
    """Run one, and write ``RUNS/reproduce/NAME/`` with config.json, metrics.jsonl, table.csv, figure.png, figure.pdf and result.json."""
    folder = runs / "reproduce" / experiment.name
    write_json(folder / "config.json", {"experiment": experiment.name, "size": size, "seeds": seeds})
    metrics = Metrics(folder / "metrics.jsonl", upto=-1)
    begun = time.perf_counter()
    result = experiment.run(Setting(size, seeds, tell, lambda line: metrics.add(**line)))
    seconds = time.perf_counter() - begun
    metrics.close()
    write_atomically(folder / "table.csv", lambda p: _write_text(p, as_csv(result.table)))
    for suffix in ("png", "pdf"):
        save_figure(result.figure, folder / f"figure.{suffix}")
    write_json(
        folder / RESULT,
        {
            "name": experiment.name, "claim": experiment.claim, "cite": experiment.cite, "section": experiment.section, "size": size,
            "seeds": seeds, "seconds": round(seconds, 1), "passed": result.passed, "notes": result.notes, "page": experiment.page,
            "findings": [finding_row(f) for f in result.findings],
        },
    )  # fmt: skip
    return result


def finding_row(f: Finding) -> dict[str, Any]:
    low, high = f.interval
    return {
        "what": f.what, "expected": f.expected, "source": f.source, "measured": f.mean, "interval": [low, high],
        "seeds": list(map(float, f.measured)), "passed": f.passed,
    }  # fmt: skip


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in table for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def number(x: float) -> str:
    """Four figures, as one would write them."""
    return f"{x:.3g}" if x == 0 or 1e-3 <= abs(x) < 1e5 else f"{x:.1e}"


def told(f: Mapping[str, Any]) -> str:
    """A measured number with its interval over seeds."""
    low, high = f["interval"]
    return number(f["measured"]) if low == high else f"{number(f['measured'])} [{number(low)}, {number(high)}]"


def write_page(runs: Path, names: Sequence[str]) -> Path:
    """``RUNS/reproduce/index.html``: every figure, verdict and configuration of the named experiments that have been run."""
    folder = runs / "reproduce"
    found = [read_json(folder / n / RESULT) for n in names if (folder / n / RESULT).is_file()]
    page = folder / "index.html"
    write_atomically(page, lambda p: _write_text(p, _html(found)))
    return page


def _html(results: Sequence[Mapping[str, Any]]) -> str:
    good = sum(r["passed"] for r in results)
    rows = "".join(
        f'<tr><td><a href="#{r["name"]}">{r["name"]}</a></td><td>{html.escape(r["claim"])}</td>{_verdict(r["passed"])}'
        f"<td>{r['seconds']:.0f} s</td></tr>"
        for r in results
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fastweights: experiments</title><style>{_CSS}</style>'
        f"<h1>fastweights: experiments</h1><p>{good} of {len(results)} claims came out. Every one is "
        "<code>fastweights reproduce NAME</code>; numbers in brackets are 95 % intervals of the mean over seeds.</p>"
        f"<table><tr><th>name<th>claim<th>verdict<th>time</tr>{rows}</table>{''.join(map(_section, results))}</html>"
    )


def _section(r: Mapping[str, Any]) -> str:
    findings = "".join(
        f"<tr><td>{html.escape(f['what'])}</td><td>{told(f)}</td><td>{html.escape(f['expected'])}</td><td>{f['source']}</td>"
        f"{_verdict(f['passed'])}</tr>"
        for f in r["findings"]
    )
    notes = f"<p><b>Note.</b> {html.escape(r['notes'])}</p>" if r["notes"] else ""
    config = html.escape(json.dumps({"size": r["size"], "seeds": r["seeds"]}))
    about = "".join(f"<p>{html.escape(part)}</p>" for part in r["page"].split("\n\n"))
    return (
        f'<h2 id="{r["name"]}">{r["name"]}</h2><p><b>{html.escape(r["claim"])}</b> ({html.escape(r["cite"])})</p>{about}{notes}'
        f'<img src="{r["name"]}/figure.png" alt="figure of {r["name"]}"><table><tr><th>what<th>measured<th>expected<th>source<th></tr>'
        f'{findings}</table><p><code>{config}</code> · <a href="{r["name"]}/table.csv">table</a> · '
        f'<a href="{r["name"]}/figure.pdf">figure, PDF</a></p>'
    )


def _verdict(passed: bool) -> str:
    return f'<td class="{"pass" if passed else "fail"}">{"PASS" if passed else "FAIL"}</td>'


_CSS = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem .25rem 0;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #ddd}img{max-width:100%}.pass{color:#00734f}.fail{color:#b23b00;font-weight:bold}h2{margin-top:3rem}"
)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
