"""report.html: one self-contained file, no script, no network; made from a RunRecord."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vla.cli import plots
from vla.cli.results import RunRecord, by_family
from vla.files import write_text
from vla.runtime.summary import wilson_95

MAX_EVENTS = 100
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667080; --line: #dde2e9; --paper: #fff; --plot: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a2b0; --line: #333b47; --paper: #14171c;
  --plot: #f4f5f7; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 940px;
  margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p.sub { color: var(--soft); margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; } .card span { color: var(--soft); font-size: .82rem; }
.good { color: #2f9e62; } .bad { color: #d1495b; }
figure { margin: 0; background: var(--plot); border-radius: 8px; padding: .5rem; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; } video { width: 100%; border-radius: 8px; background: #111; }
code { font-size: .86rem; }
"""


def write_report(record: RunRecord, out: Path, film: Path | None = None, trace: Path | None = None) -> Path:
    """Write `out`/report.html and return its path. film, trace: shown or linked when they exist."""
    path = out / "report.html"
    write_text(path, render(record, film, trace))
    return path


def render(record: RunRecord, film: Path | None = None, trace: Path | None = None) -> str:
    """The page as text."""
    title = f"{record.env}: {record.successes} of {len(record.episodes)} episodes succeeded"
    policy = ", ".join([record.policy, *(" ".join([group, *words]) for group, words in record.parts.items())])
    scope = f"task {record.task or 'all'}, policy {policy}, {record.rate_hz:g} Hz, seeds from {record.seed}"
    if record.interrupted:
        scope += f"; interrupted after {len(record.episodes)} of {record.requested} episodes"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(scope)}</p>', _cards(record)]
    if film is not None and film.is_file():
        body.append(f'<video controls preload="metadata" src="{escape(film.name)}"></video>')
    if trace is not None and trace.is_file():
        body.append(f'<p class="sub">Every message of the run: <code>{escape(trace.name)}</code>, for Foxglove.</p>')
    body += [
        _section("Success per task family", _plot(plots.success_per_family(record)) + _families(record)),
        _section("Episodes", _episodes(record)),
        _section("Inference and commands", _plot(plots.timeline(record)) + _plot(plots.rates(record))),
        _section("Commands of the first episode", _plot(plots.actions(record))),
        _section("Gate", _plot(plots.verdicts(record)) + _reasons(record)),
        _section("Events", _events(record)),
        _section("Processes and messages", _processes(record)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def rows(record: RunRecord) -> list[tuple[str, str]]:
    """The final table, also printed in the terminal: (what, value)."""
    summary = record.summary()
    low, high = summary["wilson_95"]
    inference, transport = summary["inference_ms"], summary["transport_ms"]
    late = record.missed_actions + record.late_actions
    late_share = late / record.due_actions if record.due_actions else 0.0
    gate = summary["gate"]
    return [
        (
            "success",
            f"{record.successes}/{len(record.episodes)} = {record.success_rate:.1%} (95 %: {low:.1%} to {high:.1%})",
        ),
        ("control rate", f"{record.control_hz:.2f} Hz of {record.rate_hz:g} Hz nominal"),
        ("late or missed actions", f"{late} of {record.due_actions} ({late_share:.2%})"),
        ("inference p50 / p95 / p99", _join([inference["p50"], inference["p95"], inference["p99"]], "ms")),
        ("transport p50 / p95", _join([transport["p50"], transport["p95"]], "ms")),
        ("gate pass / reshape / stop", f"{gate['pass']} / {gate['reshape']} / {gate['stop']}"),
        ("dropped messages", str(sum(record.dropped.values()))),
        ("peak memory, all processes", f"{summary['peak_rss_mb']:.0f} MB"),
        ("real-time factor of /clock", f"{record.real_time_factor:.2f}"),
    ]


def _cards(record: RunRecord) -> str:
    cards = "".join(
        f'<div class="card"><b>{escape(value.split(" (")[0])}</b><span>{escape(name)}</span></div>'
        for name, value in rows(record)
    )
    return f'<div class="cards">{cards}</div>'


def _families(record: RunRecord) -> str:
    body = []
    for name, (good, total) in by_family(record.episodes).items():
        low, high = wilson_95(good, total)
        body.append((name, f"{good}/{total}", f"{good / total:.1%}", f"{low:.1%} to {high:.1%}"))
    return _table(("family", "successes", "rate", "95 % interval"), body)


def _episodes(record: RunRecord) -> str:
    body = [
        (
            str(e.index + 1), str(e.seed), e.family, e.instruction, _Mark(e.success),
            str(e.steps), f"{e.end_s - e.start_s:.1f}", e.note,
        )
        for e in record.episodes
    ]  # fmt: skip
    return _table(("", "seed", "family", "instruction", "", "steps", "s", ""), body)


def _reasons(record: RunRecord) -> str:
    ordered = sorted(record.gate_reasons.items(), key=lambda item: -item[1])
    return _table(("reason", "commands"), [(name, str(count)) for name, count in ordered])


def _events(record: RunRecord) -> str:
    if not record.events:
        return '<p class="sub">None: no stop, no silent heartbeat, no restart.</p>'
    shown = record.events[:MAX_EVENTS]
    more = len(record.events) - len(shown)
    table = _table(("s", "source", "what"), [(f"{e.at_s:.2f}", e.source, e.text) for e in shown])
    return table + (f'<p class="sub">and {more} more, in run.json</p>' if more else "")


def _processes(record: RunRecord) -> str:
    memory = _table(("process", "peak MB"), [(name, f"{mb:.0f}") for name, mb in record.rss_mb.items()])
    lost = _table(("topic", "dropped"), [(topic, str(count)) for topic, count in record.dropped.items() if count])
    return memory + (lost or '<p class="sub">No message was dropped.</p>')


class _Mark:
    """A success flag in a table cell."""

    def __init__(self, success: bool):
        self.html = '<span class="good">success</span>' if success else '<span class="bad">failure</span>'


def _table(header: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    lines = ["".join(f"<td>{c.html if isinstance(c, _Mark) else escape(str(c))}</td>" for c in row) for row in body]
    if not lines:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _plot(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _join(values: Sequence[float | None], unit: str) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values) + f" {unit}"
