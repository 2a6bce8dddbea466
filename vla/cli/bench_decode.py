"""`vla bench decode`: every decoder over one policy, in one run: passes, time, FLOPs, and success against greedy."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vla.errors import ConfigError, explain, nearest
from vla.files import write_text

EPILOG = """Costs: over the observations of greedy episodes, decoders in turn on each, warm-up left out. ms per chunk
holds images, text, prefix and decoding; the loop takes whole chunks, so that is also the time to the first action.
Inferences that reuse a chunk count among them. actions/s is executed actions over inference time, refresh one over it.
x bins, x FAST: times as fast as greedy decoding of those. Overhead: decoding time outside of the passes, in percent of
them. Exact decoders run no episodes: they give greedy's actions; the share of equal chunks is printed, and how many
differ with the model in bf16. The others run the same seeds as greedy of their reference; the difference is paired,
'inconclusive' when its interval holds 0.

examples:
  vla bench decode                                           costs only, on the shipped policy
  vla bench decode --policy outputs/heads/bundle --episodes 1000 --out outputs/bench
  vla bench decode --device cuda                             again on a GPU"""

REFERENCES = ("greedy bins", "greedy FAST")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--policy", default="tabletop", metavar="BUNDLE", help="folder or shipped name")
    parser.add_argument("--env", default="tabletop", help="environment (default: tabletop)")
    parser.add_argument("--task", default="all", help="task family (default: all take turns)")
    parser.add_argument("--observations", type=int, default=100, metavar="N", help="to measure costs on (default: 100)")
    parser.add_argument("--episodes", type=int, default=0, metavar="N", help="for success (default: 0, none)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the first episode (default: that of vla eval)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="lines to run, with their references")
    parser.add_argument(
        "--execute", type=int, default=8, metavar="N", help="actions executed per inference (default: 8)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads while costs are measured (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="processes for episodes (default: one per core)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), metavar="DIR", help="default: outputs/bench")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, progress to stderr")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    # In a file or a pipe lines may be as long as they are.
    console = Console(stderr=args.json, width=None if sys.stdout.isatty() else 200)
    if args.observations < 10 or args.episodes < 0:
        raise ConfigError(explain("bench decode", "10 or more observations, 0 or more episodes", "less", "See --help."))
    results = measure(args, console)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "decode.json", json.dumps(results, indent=1))
    write_text(args.out / "decode.md", markdown(results))
    if args.episodes:
        plot(results["rows"], args.out / "decode.png")
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        show(results, console)
        console.print(f"\n{args.out / 'decode.json'}", highlight=False)
    return 0


def measure(args: argparse.Namespace, console: Any) -> dict[str, Any]:
    """All of it as plain data."""
    import torch

    from policies.vla_policy import VlaPolicy
    from sim import decode_benchmark as bench
    from sim import decode_costs, decode_entries
    from sim.evaluate import EvalConfig
    from vla.resources import bundle_path

    path = str(bundle_path(args.policy))
    threads = args.threads or os.cpu_count() or 1
    policy = VlaPolicy.from_bundle(path, device=args.device, threads=threads)
    config = EvalConfig(env=args.env, task=args.task, episodes=max(1, args.episodes), execute=args.execute,
                        device=args.device, **({} if args.seed is None else {"seed": args.seed}))  # fmt: skip
    chosen, refused = decode_entries.served(policy, _chosen(args.only))
    heads = [head.name for head in policy.bundle.config.heads if head.kind == "tokens"]
    seen = decode_costs.observations(policy, config, args.observations)
    curves = {head: decode_costs.cost_curve(policy, head, seen[0]) for head in heads}
    with _progress(console, "costs", len(seen) + 3) as tick:
        costs = decode_costs.costs(policy, chosen, seen, lambda: tick(1))
    anytime = []
    if {"anytime FAST", "greedy FAST"} <= costs.keys():
        anytime = [asdict(cut) for cut in decode_costs.anytime_curve(policy, "fast", seen, costs["greedy FAST"])]
    with _progress(console, "reuse", sum(bool(entry.reuse) for entry in chosen)) as tick:
        reused = {}
        for entry in chosen:
            if entry.reuse:
                reused[entry.name] = decode_costs.reuse_share(policy, entry, config)
                tick(1)
    reports: dict[str, Any] = {}
    if args.episodes:
        workers = args.workers or os.cpu_count() or 1
        for entry in chosen:
            if entry.reference and entry.exact:
                continue
            folder = args.out / "episodes" / "".join(c if c.isalnum() else "-" for c in entry.name)
            with _progress(console, entry.name, args.episodes) as tick:
                reports[entry.name] = bench.success(path, entry, config, folder, workers, tick)
    dims = policy.embodiment.action_dim
    rows = [
        bench.row(
            entry, costs, args.execute, reports, reused.get(entry.name),
            bench.moving_share(costs[entry.reference or entry.name], dims),
        )
        for entry in chosen
    ]  # fmt: skip
    return {
        "policy": args.policy,
        "bundle_hash": policy.bundle.fingerprint,
        "env": args.env,
        "task": args.task,
        "seed": config.seed,
        "observations": len(seen),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu",
        "threads": threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "pass_ms": curves,
        "anytime": anytime,
        "rows": rows,
        "not_served": refused,
    }


def _chosen(only: list[str]) -> list[Any]:
    from sim.decode_entries import ENTRIES

    if not only:
        return list(ENTRIES)
    names = [entry.name for entry in ENTRIES]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: unknown line {name!r}. {nearest(name, names)}")
    wanted = set(only) | {entry.reference for entry in ENTRIES if entry.name in only}
    return [entry for entry in ENTRIES if entry.name in wanted]


@contextmanager
def _progress(console: Any, name: str, total: int) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield lambda count: None
        return
    with Progress(TextColumn(f"{name} {{task.completed}}/{total}"), BarColumn(), TimeRemainingColumn(),
                  console=console, transient=True) as bar:  # fmt: skip
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)


COSTS: tuple[str, ...] = (
    "decoder", "exact", "passes", "tokens/pass", "ms p50 / p95", "x bins", "x FAST", "actions/s", "MFLOP", "reused",
    "equal", "bf16 flips", "rms", "overhead",
)  # fmt: skip
ANYTIME: tuple[str, ...] = ("deadline of anytime FAST", "ms", "values cut", "rms to the whole chunk")
SUCCESS: tuple[str, ...] = ("decoder", "success, %, 95 % interval", "n", "paired, points", "verdict", "to")


def _costs(row: dict[str, Any]) -> list[str]:
    return [
        row["decoder"], "yes" if row["exact"] else "no", f"{row['passes_per_chunk']:.1f}",
        "" if row["tokens_per_pass"] is None else f"{row['tokens_per_pass']:.1f}",
        f"{row['ms_per_chunk']['p50']:.1f} / {row['ms_per_chunk']['p95']:.1f}",
        *(f"{row['speedups'][name]:.2f}" if name in row["speedups"] else "" for name in REFERENCES),
        f"{row['actions_per_s']:.0f}", f"{row['flops_per_chunk'] / 1e6:.0f}", _percent(row["reused"] or None),
        _percent(row["same_chunks"]), _percent(row["bf16_flips"]), f"{row['rms_to_reference']:.3f}",
        _percent(row["overhead"]),
    ]  # fmt: skip


def _success(row: dict[str, Any]) -> list[str]:
    low, high = row["wilson_95"]
    d = row["paired_difference"]
    return [
        row["decoder"], f"{100 * row['success_rate']:.1f} ({100 * low:.1f} to {100 * high:.1f})", str(row["n"]),
        f"{d['points']:+.1f} ({d['wilson_95'][0]:+.1f} to {d['wilson_95'][1]:+.1f})" if d else "",
        d["verdict"] if d else "equal by proof" if row["exact"] and row["reference"] != row["decoder"] else "",
        d["to"] if d else "",
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def tables(results: dict[str, Any]) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    """(titles, lines) of costs, of anytime decoding's error against time, and of success, where there are any."""
    ran = [row for row in results["rows"] if row["success_rate"] is not None]
    anytime = [
        [f"{cut['deadline_ms']:.1f} ms", f"{cut['ms']:.1f}", _percent(cut["cut"]), f"{cut['rms']:.3f}"]
        for cut in results["anytime"]
    ]
    every = [
        (COSTS, [_costs(row) for row in results["rows"]]),
        (ANYTIME, anytime),
        (SUCCESS, [_success(row) for row in ran]),
    ]
    return [(titles, lines) for titles, lines in every if lines]


def curves(results: dict[str, Any]) -> list[str]:
    """What passes cost, a line per head."""
    return [
        f"a pass over so many tokens, head {head}, ms (times that of one): "
        + ", ".join(f"{count}: {ms:.2f} ({ms / curve[1]:.1f})" for count, ms in curve.items())
        for head, curve in results["pass_ms"].items()
    ]


def show(results: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    for curve in curves(results):
        console.print(curve, highlight=False)
    for titles, lines in tables(results):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in titles:
            table.add_column(title, justify="left" if title == titles[0] else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for name, reason in results["not_served"].items():
        console.print(f"not served: {name}: {reason}", highlight=False)


def markdown(results: dict[str, Any]) -> str:
    """The same for a page of documentation."""
    parts = [*(f"- {line}" for line in curves(results)), ""]
    for titles, lines in tables(results):
        parts += [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines)] + [""]
    return "\n".join(parts)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Success against latency: the frontier."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for row in rows:
        if row["success_rate"] is None:
            continue
        x, y, (low, high) = row["ms_per_chunk"]["p50"], row["success_rate"], row["wilson_95"]
        axis.errorbar(x, 100 * y, yerr=[[100 * (y - low)], [100 * (high - y)]], fmt="o" if row["exact"] else "s",
                      markersize=4, linewidth=0.7)  # fmt: skip
        axis.annotate(row["decoder"], (x, 100 * y), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axis.set_xlabel("ms per chunk, p50")
    axis.set_ylabel("success, %, 95 % interval")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
