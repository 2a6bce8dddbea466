"""`vla bench schedulers`: stop and think, overlap, ensembling and real-time chunking on one replayed latency trace."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from vla.errors import ConfigError, explain, nearest
from vla.files import write_text

DEFAULT_LATENCY = "two_cores"
EPILOG = """Every schedule meets the same latencies on the same seeds, on simulated time: the same command gives the
same schedulers.json, whatever else the machine does. --latency takes a trace.mcap of `vla demo`, a JSON file of
milliseconds, the name of a shipped trace, or a distribution: lognormal:p50=30,p95=60,seed=1  constant:ms=50

difference   of success to the line it is compared with, on the same seeds, and its 95 % interval
pauses       share of the control periods without a fresh action, from the first action on; the longest in a row
age          from the observation that an action came from to its execution, mean
jump         change of the commanded joint velocity from one period to the next, where chunks meet / within chunks:
             mean, and each episode's largest (the tool's are in schedulers.json)
jerk         of the commanded joints, root mean square

examples:
  vla bench schedulers --episodes 20
  vla bench schedulers --policy outputs/mine/bundle --latency outputs/demo/trace.mcap --scales 1 3 10 --episodes 200
  vla bench schedulers --only "overlapped, FAST" --latency lognormal:p50=80,p95=300,seed=1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--policy", default="tabletop", metavar="BUNDLE", help="folder or shipped name")
    parser.add_argument("--latency", default=DEFAULT_LATENCY, metavar="TRACE", help=f"default: {DEFAULT_LATENCY}")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0, 10.0], metavar="K", help="times as slow")
    parser.add_argument("--env", default="tabletop", help="environment (default: tabletop)")
    parser.add_argument("--task", default="all", help="task family (default: all take turns)")
    parser.add_argument("--episodes", type=int, default=20, metavar="N", help="of every line and scale (default: 20)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the first episode (default: that of vla eval)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="lines to run, with their references")
    parser.add_argument("--execute", type=int, default=8, metavar="N", help="actions per chunk (default: 8)")
    parser.add_argument(
        "--lead", type=int, metavar="N", help="periods that inference may take (default: 99 %% of the scaled trace)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core; 0: this one)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), metavar="DIR", help="default: outputs/bench")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, progress to stderr")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(stderr=args.json, width=None if sys.stdout.isatty() else 200)
    results = measure(args, console)
    write_text(args.out / "schedulers.json", json.dumps(results, indent=1) + "\n")
    write_text(args.out / "schedulers.md", markdown(results))
    plot(results, args.out / "schedulers.png")
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        show(results, console)
        console.print(f"\n{args.out / 'schedulers.json'}", highlight=False)
    return 0


def measure(args: argparse.Namespace, console: Any) -> dict[str, Any]:
    """All of it as plain data, without a word about this machine or the time it took."""
    from sim import latency
    from sim import scheduler_benchmark as bench
    from sim.evaluate import EvalConfig
    from vla.checkpoints.bundle import load
    from vla.resources import bundle_path

    if args.episodes < 1 or min(args.scales) < 0 or len(set(args.scales)) < len(args.scales):
        remedy = "See vla bench schedulers --help."
        raise ConfigError(explain("bench schedulers", "1 or more episodes, scales that differ", "others", remedy))
    lines = _chosen(args.only)
    trace = latency.read(args.latency)
    path = bundle_path(args.policy)
    bundle = load(path)
    good, refused = bench.served(bundle, lines)
    if not good:
        reason = next(iter(refused.values()))
        raise ConfigError(explain("bench schedulers", "a line that this bundle serves", reason, "Choose other lines."))
    period_s = bundle.embodiment.period_s
    leads = {scale: args.lead or bench.lead_for(trace, scale, period_s, args.execute) for scale in args.scales}
    base = EvalConfig(
        policy=str(path), env=args.env, task=args.task, episodes=args.episodes, execute=args.execute,
        latency=args.latency, device=args.device, **({} if args.seed is None else {"seed": args.seed}),
    )  # fmt: skip
    workers = (os.cpu_count() or 1) if args.workers is None else args.workers
    with _progress(console, len(good) * len(leads) * args.episodes) as tick:
        rows = bench.compare(base, good, leads, args.out / "schedulers", workers, tick)
    return {
        "policy": args.policy,
        "bundle_hash": bundle.fingerprint,
        "env": args.env,
        "task": args.task,
        "seed": base.seed,
        "episodes": args.episodes,
        "period_ms": round(period_s * 1e3, 3),
        "latency": trace.describe(),
        "rows": rows,
        "not_served": refused,
    }


def _chosen(only: list[str]) -> list[Any]:
    from sim.scheduler_benchmark import LINES

    by_name = {line.name: line for line in LINES}
    wanted: set[str] = set()
    for name in only:
        if name not in by_name:
            raise ConfigError(f"--only: unknown line {name!r}. {nearest(name, by_name)}")
        while name:  # what it is compared with, and so on
            wanted.add(name)
            name = by_name[name].reference
    return [line for line in LINES if not only or line.name in wanted]


def _progress(console: Any, total: int) -> Any:
    from vla.cli.bench_decode import _progress as bar

    return bar(console, "episodes", total)


TITLES = ("schedule", "lead", "success, %, 95 % interval", "paired, points", "pauses", "longest", "age, ms",
          "jump, rad/s, mean", "largest", "jerk, rad/s³", "steps")  # fmt: skip


def tables(results: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, lines) of each latency scale."""
    scales = dict.fromkeys(row["scale"] for row in results["rows"])
    return [(f"{scale:g}x", [_line(row) for row in results["rows"] if row["scale"] == scale]) for scale in scales]


def _line(row: dict[str, Any]) -> list[str]:
    low, high = row["wilson_95"]
    paired = row["paired_difference"]
    difference = ""
    if paired:
        low_d, high_d = paired["newcombe_95"]
        difference = f"{paired['points']:+.1f} ({low_d:+.1f} to {high_d:+.1f})"
    return [
        row["schedule"], "" if row["lead"] is None else str(row["lead"]),
        f"{100 * row['rate']:.1f} ({100 * low:.1f} to {100 * high:.1f}) of {row['trials']}", difference,
        f"{100 * row['pause_share']:.1f} %", str(row["longest_pause"]), _said(row["age_ms"]),
        _jump(row["joints_rad_s"], "mean"), _jump(row["joints_rad_s"], "max"), _said(row["jerk_rad_s3"]),
        f"{row['steps_per_episode']:.0f}",
    ]  # fmt: skip


def _said(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _jump(jumps: dict[str, float] | None, kind: str) -> str:
    return "" if jumps is None else f"{jumps[f'switch_{kind}']:.2f} / {jumps[f'within_{kind}']:.2f}"


def about(results: dict[str, Any]) -> str:
    """The latency that all lines met."""
    latency = results["latency"]
    spread = ", ".join(f"{key} {value:.0f}" for key, value in latency["total_ms"].items())
    period = f"control period {results['period_ms']:g} ms"
    return f"latency {latency['name']}: {latency['inferences']} inferences, {spread} ms; {period}"


def show(results: dict[str, Any], console: Any) -> None:
    """The results as one table per latency scale."""
    from rich.table import Table

    console.print(about(results), highlight=False)
    for title, lines in tables(results):
        table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
        for name in TITLES:
            table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for reason in dict.fromkeys(results["not_served"].values()):
        names = "; ".join(name for name, own in results["not_served"].items() if own == reason)
        console.print(f"not served: {names}: {reason}", highlight=False)


def markdown(results: dict[str, Any]) -> str:
    """The same for a page of documentation."""
    parts = [about(results), ""]
    for title, lines in tables(results):
        rows = ((f"{title}: {TITLES[0]}", *TITLES[1:]), ["---"] * len(TITLES), *lines)
        parts += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(parts)


_PANELS = (
    ("success, %, 95 % interval", lambda row: 100 * row["rate"]),
    ("pauses, % of periods", lambda row: 100 * (row["pause_share"] or 0.0)),
    ("age of actions, ms", lambda row: row["age_ms"]),
    ("joint jump at switches, rad/s", lambda row: (row["joints_rad_s"] or {}).get("switch_mean")),
    ("jerk, rad/s³", lambda row: row["jerk_rad_s3"]),
)


def plot(results: dict[str, Any], path: Path) -> None:
    """Each measure against how slow inference is: a colour per schedule, a line style per head."""
    from matplotlib.figure import Figure

    rows = results["rows"]
    names = list(dict.fromkeys(row["schedule"] for row in rows))
    kinds, heads = (list(dict.fromkeys(name.split(", ")[part] for name in names)) for part in (0, 1))
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    figure = Figure(figsize=(3.2 * len(_PANELS), 4.2), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for axis, (title, value) in zip(axes, _PANELS):
        for place, name in enumerate(names):
            kind, head = name.split(", ")
            own = {row["scale"]: row for row in rows if row["schedule"] == name}
            # intervals beside each other, so that they can be told apart
            shift = 0.05 * (place - (len(names) - 1) / 2) if "interval" in title else 0.0
            x, y = [i + shift for i, scale in enumerate(scales) if scale in own], [value(row) for row in own.values()]
            colour, style = f"C{kinds.index(kind)}", ("-", "--", ":")[heads.index(head) % 3]
            axis.plot(x, y, style, marker="o", markersize=3, linewidth=1, color=colour, label=name)
            if "interval" in title:
                bounds = [[100 * bound for bound in row["wilson_95"]] for row in own.values()]
                axis.vlines(x, *zip(*bounds), color=colour, linewidth=0.7)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(scales)), [f"{scale:g}x" for scale in scales])
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[len(axes) // 2].set_xlabel(f"latency, times the trace {results['latency']['name']}", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
