"""`vla bench decode`: every decoder over one policy, in one run: passes, time, FLOPs, and success against greedy."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vla.errors import ConfigError, explain
from vla.files import write_text

EPILOG = """Costs: over the observations of greedy episodes, decoders in turn on each, in an order drawn for each, warm-
up left out. ms per chunk holds images, text, prefix and decoding; the loop takes whole chunks, so that is also the time
to the first action. Inferences that reuse a chunk count among them. actions/s: executed actions over inference time;
Hz: observations that were looked at over it; tokens/s: over decoding time. x bins, x FAST: actions/s of greedy decoding
of those. Executed: actions per inference, in the episodes of the observations, or, where a line reuses chunks, in 20 of
its own or all that ran for success. Greedy is measured twice: how far 'again' is from 1.00 is noise. Tokens per pass
leave out values that never moved in the demonstrations. Layers: that ran, where a pass is not the whole depth.
Overhead: decoding time outside of the passes, in percent of them; between: the part of it that lies between two passes,
the rest comes once per chunk, before the first and behind the last. Repaired: tokens of all chunks. Averaged: chunks in
which an ensemble took the mean. Agreement: what the decoders' setting of that name should be here. Anytime FAST gets
the deadline that cuts about half of the values. Exact decoders run no episodes: they give greedy's actions; the share
of equal chunks is printed, and how many differ with the model in bf16. The others run the same seeds as greedy of their
reference; the difference is paired, 'inconclusive' when its interval holds 0.

examples:
  vla bench decode                                           costs only, on the shipped policy
  vla bench decode --episodes 1000 --only "flow, 4 steps"    success too, of some lines and what they are compared with
  vla bench decode --execute 1                               of a policy that is asked as often as possible
  vla bench decode --device cuda                             again on a GPU"""

REFERENCES = ("greedy bins", "greedy FAST")
ANYTIME_LINE = "anytime FAST"


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
        "--execute", type=int, default=8, metavar="N", help="actions of a chunk to execute (default: 8)"
    )
    parser.add_argument("--lead", type=int, metavar="N", help="of them, to ask ahead (default: 2, at most execute)")
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
                        lead=min(2, args.execute) if args.lead is None else args.lead, device=args.device,
                        **({} if args.seed is None else {"seed": args.seed}))  # fmt: skip
    if args.execute > (horizon := policy.bundle.config.horizon):
        raise ConfigError(
            explain("--execute", f"1 to {horizon}, the actions of a chunk", args.execute, "Execute fewer of them.")
        )
    chosen, refused = decode_entries.served(policy, decode_entries.chosen(args.only))
    if not chosen:
        reason = next(iter(refused.values()))
        raise ConfigError(explain("bench decode", "a line that this bundle serves", reason, "Choose other lines."))
    heads = [head.name for head in policy.bundle.config.heads if head.kind == "tokens"]
    seen, usual = decode_costs.observations(policy, config, args.observations)
    curves = {head: decode_costs.cost_curve(policy, head, seen[0]) for head in heads}
    anytime: list[decode_costs.Cut] = []
    for place, entry in enumerate(chosen):
        if entry.name == ANYTIME_LINE:
            anytime = decode_costs.anytime_curve(policy, entry.parts.decoder.head, seen)
            deadline = f"deadline_ms={decode_costs.half_cut(anytime)}"
            chosen[place] = replace(entry, options=(*entry.options, deadline))
    with _progress(console, "costs", len(seen) + 3) as tick:
        costs = decode_costs.costs(policy, chosen, seen, lambda: tick(1))
    with _progress(console, "reuse", sum(bool(entry.reuse) for entry in chosen)) as tick:
        paces = dict.fromkeys((entry.name for entry in chosen), usual)
        for entry in chosen:
            if entry.reuse:
                paces[entry.name] = decode_costs.pace(policy, entry, config)
                tick(1)
    reports: dict[str, Any] = {}
    if args.episodes:
        workers = args.workers or os.cpu_count() or 1
        for entry in chosen:
            if entry.exact and entry.reference in costs:
                continue
            # A deadline is measured, so it may be another one than that of the episodes that are there.
            named = " ".join((entry.name, *(entry.options if entry.name == ANYTIME_LINE else ())))
            folder = args.out / "episodes" / "".join(c if c.isalnum() else "-" for c in named)
            with _progress(console, entry.name, args.episodes) as tick:
                reports[entry.name] = bench.success(path, entry, config, folder, workers, tick)
    # The others all execute as many as each other; that some end their episodes sooner is not their pace.
    paces |= {e.name: paces[e.name].of(reports[e.name]) for e in chosen if e.reuse and e.name in reports}
    active = policy.bundle.action_normalizer.active
    rows = [bench.row(entry, costs, paces, reports, float(active.mean())) for entry in chosen]
    return {
        "policy": args.policy,
        "bundle_hash": policy.bundle.fingerprint,
        "env": args.env,
        "task": args.task,
        "seed": config.seed,
        "episodes": args.episodes,
        "execute": args.execute,
        "lead": config.lead,
        "observations": len(seen),
        "order_seed": decode_costs.ORDER_SEED,
        "moving": {name: bool(moves) for name, moves in zip(policy.embodiment.action_names, active)},
        "noise_floor": {
            row["reference"]: row["speedup"] for row in rows if row["decoder"] == f"{row['reference']}, again"
        },
        "device": _hardware(policy.device),
        "precision": str(next(policy.bundle.model.parameters()).dtype).removeprefix("torch."),
        "threads": threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "pass_ms": curves,
        "anytime": [asdict(cut) for cut in anytime],
        "rows": rows,
        "not_served": refused,
    }


def _hardware(device: Any) -> str:
    """The name of a torch.device's hardware."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # on Linux platform.processor() is empty, or names the architecture only
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
    "decoder", "exact", "passes", "layers", "tokens/pass", "ms p50 / p95", "x bins", "x FAST", "tokens/s", "actions/s",
    "Hz", "overhead", "between",
)  # fmt: skip
WORK: tuple[str, ...] = (
    "decoder", "MFLOP", "of the prefix", "executed", "reused", "repaired", "averaged", "agreement", "equal",
    "bf16 flips", "rms",
)  # fmt: skip
ANYTIME: tuple[str, ...] = ("deadline of anytime FAST", "ms", "values cut", "rms to the whole chunk")
SUCCESS: tuple[str, ...] = ("decoder", "success, %, 95 % interval", "n", "paired, points", "verdict", "to")


def _costs(row: dict[str, Any]) -> list[str]:
    return [
        row["decoder"], "yes" if row["exact"] else "no", f"{row['passes_per_chunk']:.1f}", _number(row["layers"], 1),
        _number(row["tokens_per_pass"], 1), f"{row['ms_per_chunk']['p50']:.1f} / {row['ms_per_chunk']['p95']:.1f}",
        *(_number(row["speedups"].get(name), 2) for name in REFERENCES), _number(row["tokens_per_s"], 0),
        f"{row['actions_per_s']:.0f}", f"{row['refresh_hz']:.1f}", _percent(row["overhead"]),
        _percent(row["overhead_between"]),
    ]  # fmt: skip


def _work(row: dict[str, Any]) -> list[str]:
    return [
        row["decoder"], f"{row['flops_per_chunk'] / 1e6:.0f}", f"{row['prefix_flops'] / 1e6:.0f}",
        f"{row['executed_per_inference']:.2f}", _percent(row["reused"] or None), str(row["repaired"]),
        _percent(row["averaged"]), _number(row["agreement"], 2), _percent(row["same_chunks"]),
        _percent(row["bf16_flips"]), _number(row["rms_to_reference"], 3),
    ]  # fmt: skip


def _success(row: dict[str, Any]) -> list[list[str]]:
    """A line per entry that it is compared with."""
    low, high = row["wilson_95"]
    own = [row["decoder"], f"{100 * row['success_rate']:.1f} ({100 * low:.1f} to {100 * high:.1f})", str(row["n"])]
    differences = [d for d in (row["paired_difference"], *row["further_differences"]) if d]
    if not differences:
        return [[*own, "", "equal by proof" if row["exact"] and row["reference"] != row["decoder"] else "", ""]]
    return [
        [*own, f"{d['points']:+.1f} ({d['newcombe_95'][0]:+.1f} to {d['newcombe_95'][1]:+.1f})", d["verdict"], d["to"]]
        for d in differences
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def tables(results: dict[str, Any]) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    """(titles, lines) of costs, of work and deviation, of anytime decoding's error against time, and of success, where
    there are any."""
    ran = [row for row in results["rows"] if row["success_rate"] is not None]
    anytime = [
        [f"{cut['deadline_ms']:.1f} ms", f"{cut['ms']:.1f}", _percent(cut["cut"]), f"{cut['rms']:.3f}"]
        for cut in results["anytime"]
    ]
    every = [
        (COSTS, [_costs(row) for row in results["rows"]]),
        (WORK, [_work(row) for row in results["rows"]]),
        (ANYTIME, anytime),
        (SUCCESS, [line for row in ran for line in _success(row)]),
    ]
    return [(titles, lines) for titles, lines in every if lines]


def facts(results: dict[str, Any]) -> list[str]:
    """What holds for all rows: how they were measured, and what passes cost, a line per head."""
    moving = [name for name, moves in results["moving"].items() if moves]
    return [
        f"{results['device']}, {results['threads']} threads, {results['precision']}, "
        f"execute {results['execute']}, lead {results['lead']}, {results['observations']} observations, order drawn "
        f"from {results['order_seed']}",
        f"values that move: {len(moving)} of {len(results['moving'])} ({', '.join(moving)})",
        *(f"noise: {name} again, x {factor:.3f} of itself" for name, factor in results["noise_floor"].items()),
        *(
            f"a pass over so many tokens, head {head}, ms (times that of one): "
            + ", ".join(f"{count}: {ms:.2f} ({ms / curve[1]:.1f})" for count, ms in curve.items())
            for head, curve in results["pass_ms"].items()
        ),
    ]


def show(results: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    for fact in facts(results):
        console.print(fact, highlight=False)
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
    parts = [*(f"- {line}" for line in facts(results)), ""]
    for titles, lines in tables(results):
        parts += [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines)] + [""]
    return "\n".join(parts)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Success against inference time, the frontier; and, as PATH-passes, against passes, where a decoder is capped."""
    frontier = [(row, 1e3 / row["actions_per_s"]) for row in rows if row["success_rate"] is not None]
    _scatter(frontier, "inference time per executed action, ms", path)
    capped = [(row, row["passes_per_chunk"]) for row, _ in frontier if "passes" in row["config"]]
    if capped:
        of = {row["reference"] for row, _ in capped}
        exact = [(row, row["passes_per_chunk"]) for row, _ in frontier if row["exact"] and row["reference"] in of]
        _scatter([*exact, *capped], "passes per chunk", path.with_stem(f"{path.stem}-passes"))


def _scatter(points: list[tuple[dict[str, Any], float]], label: str, path: Path) -> None:
    """Success of rows, each at its x, with intervals and names."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    middle = np.exp(np.mean(np.log([x for _, x in points])))
    for row, x in points:
        y, (low, high) = row["success_rate"], row["wilson_95"]
        axis.errorbar(x, 100 * y, yerr=[[100 * (y - low)], [100 * (high - y)]], fmt="o" if row["exact"] else "s",
                      markersize=4, linewidth=0.7)  # fmt: skip
    axis.set_xscale("log")
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which("{x:g}")
    axis.set_xlabel(label)
    axis.set_ylabel("success, %, 95 % interval")
    axis.grid(alpha=0.3)
    figure.draw_without_rendering()  # from here on the axes stay where they are
    taken: list[Any] = []
    for row, x in sorted(points, key=lambda point: (point[1], point[0]["success_rate"])):
        # Names stand on the inner side of their points, as near as others leave room.
        side, align = (5, "left") if x < middle else (-5, "right")
        name = axis.annotate(row["decoder"], (x, 100 * row["success_rate"]), xytext=(side, 0),
                             textcoords="offset points", fontsize=7, ha=align, va="center")  # fmt: skip
        for height in sorted(range(-40, 41, 4), key=abs):
            name.set_position((side, height))
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
    figure.savefig(path, dpi=120)
    plt.close(figure)
