"""`vla demo`: a policy drives a simulated arm over ROS 2 topics, and a report says how well."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from vla.cli.demo_run import Run
    from vla.cli.results import Episode, RunRecord

EVAL_SEED_START = 1_000_000
EPILOG = """results in DIR: report.html, episodes.mp4, trace.mcap (Foxglove), summary.json, run.json, logs/

exit code: 0 when all episodes ran and the success rate is at least --min-success, 1 when it is lower, 2 when the run
could not be made, 130 after Ctrl-C (what was finished by then is in DIR)

examples:
  vla demo
  vla demo --episodes 5 --seed 1000100 --task stack
  vla demo --policy outputs/train/bundle --out outputs/mine
  vla demo --decoder jacobi window=4
  vla demo --pruning flashvla --reuse flashvla --ensembling act
  vla demo --env libero_object --task 3 --policy expert --episodes 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from policies import parts

    parser.epilog = EPILOG
    parser.add_argument("--episodes", type=_positive, default=20, metavar="N", help="default: 20")
    parser.add_argument(
        "--seed", type=int, default=EVAL_SEED_START, metavar="S", help="of the first (default: 1000000)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), metavar="DIR", help="default: outputs/demo")
    parser.add_argument("--env", default="tabletop", help="tabletop (default), libero_object, libero_spatial, ...")
    parser.add_argument("--task", help="task family or number (default: all of the environment)")
    parser.add_argument(
        "--policy",
        help="bundle folder, shipped bundle, ws:// address, 'expert' or 'hold' (default: shipped, else expert)",
    )
    parts.add_arguments(parser)
    parser.add_argument("--device", default="cpu", help="of a bundle: cpu (default), cuda, ...; auto: the GPU if any")
    parser.add_argument(
        "--rtf", type=float, metavar="F", help="simulated seconds per wall second (default: 1; LIBERO 0.25)"
    )
    parser.add_argument("--domain", type=int, help="ROS domain (default: a free one)")
    parser.add_argument("--realtime", action="store_true", help="real-time priority for the nodes, where the user may")
    parser.add_argument("--min-success", type=float, default=0.5, metavar="R", help="for exit code 0 (default: 0.5)")
    parser.add_argument("--no-film", action="store_true", help="skip episodes.mp4 and the pictures in the trace")
    parser.add_argument("--json", action="store_true", help="print summary.json at the end, progress to stderr")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from policies.parts import named_in
    from vla.cli.demo_run import Plan, Run
    from vla.cli.results import write_results
    from vla.errors import VlaError

    console = Console(stderr=args.json)
    policy = args.policy or _default_policy(args.env)
    parts = named_in(args)
    _check(args.env, policy, parts, args.device)
    plan = Plan(
        args.env, policy, args.task, args.episodes, args.seed, args.out, args.rtf, args.domain, args.realtime,
        parts, args.device,
    )  # fmt: skip
    if args.seed < EVAL_SEED_START and policy != "expert":
        console.print(f"note: a policy may have been trained on seeds below {EVAL_SEED_START}")
    run_ = Run(plan)
    with closing(run_.recorder):
        console.print(f"starting {', '.join(_nodes(policy))} on ROS domain {run_.graph.domain}, loopback")
        failure: VlaError | None = None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C
        try:
            with run_:
                _episodes(run_, console)
        except KeyboardInterrupt:
            run_.interrupted = True
            console.print("stopped; writing what was measured so far")
        except VlaError as error:  # a node died in mid-run: what was measured until then is kept
            if not run_.finished:
                raise
            run_.interrupted, failure = True, error
        finally:
            signal.signal(signal.SIGTERM, before)
        record = run_.record()
        write_results(record, plan.out)
        _finish(run_, record, console, film=not args.no_film)
    if args.json:
        print(json.dumps(record.summary(), indent=2))
    if failure is not None:
        raise failure
    if run_.interrupted:
        return 130
    return 0 if record.success_rate >= args.min_success else 1


def _episodes(run_: Run, console: Console) -> None:
    """The run itself, with a live line below the finished episodes on a terminal."""
    from rich.live import Live

    good = done = 0

    def line() -> str:
        return _status_line(run_, good, done)

    with Live(
        get_renderable=line, console=console, refresh_per_second=4, transient=True, auto_refresh=console.is_terminal
    ):
        for episode in run_.episodes():
            done, good = done + 1, good + episode.success
            console.print(_episode_line(episode, run_.plan.episodes), highlight=False)


def _episode_line(episode: Episode, total: int) -> str:
    from rich.markup import escape

    mark = "[green]success[/]" if episode.success else "[red]failure[/]"
    note = f", {episode.note}" if episode.note else ""
    seconds = episode.end_s - episode.start_s
    return f"{episode.index + 1:>3}/{total}  {mark}  {seconds:5.1f} s  {escape(episode.instruction)}{escape(note)}"


def _status_line(run_: Run, good: int, done: int) -> str:
    """What the nodes said last: never waits for them."""
    from rich.markup import escape

    sim, control, beat = run_.graph.sim_status(), run_.graph.control_status(), run_.graph.heartbeat()
    numbers = beat.values if beat is not None else {}
    parts = [
        f"episode {done + 1}/{run_.plan.episodes}",
        f"{good} of {done} succeeded",
        f"step {sim.get('steps', 0)}",
        f"gate {control.get('verdict') or 'waiting'}{': ' + control['reason'] if control.get('reason') else ''}",
        f"missed {control.get('missed', 0)} of {control.get('due', 0)}",
    ]
    if "latency_ms_p95" in numbers:
        parts.append(f"inference p95 {numbers['latency_ms_p95']} ms")
    return f"[dim]{escape(' · '.join(parts))}[/]\n[bold]{escape(str(sim.get('instruction', '')))}[/]"


def _finish(run_: Run, record: RunRecord, console: Console, film: bool) -> None:
    """Film, trace, report and the final table. A film that cannot be made costs the film, not the results."""
    from rich.table import Table

    from vla.cli.film import write_film
    from vla.cli.report import rows, write_report
    from vla.errors import VlaError

    out = run_.plan.out
    film_path, trace_path = out / "episodes.mp4", out / "trace.mcap"
    if film and run_.recorder.frames:
        try:
            busy: AbstractContextManager[object] = nullcontext()
            if console.is_terminal:
                busy = console.status("writing the film")
            with busy:
                rate = max(1, round(record.rate_hz))
                write_film(film_path, run_.recorder.shots(run_.plan.episodes, rate), rate)
                run_.add_pictures()
        except VlaError as error:
            console.print(f"no film: {error}")
    write_report(record, out, film_path, trace_path)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows(record):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
    console.print(f"\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)


def _default_policy(env: str) -> str:
    """The shipped bundle with the environment's name, else the scripted expert."""
    from vla.resources import pretrained_names

    return env if env in pretrained_names() else "expert"


def _check(env: str, policy: str, parts: Mapping[str, tuple[str, ...]], device: str = "cpu") -> None:
    """Misspelt names are found here, at once, instead of in the log of a process that died."""
    from policies.parts import Parts
    from sim.control import EXPERTS
    from sim.environment import ENVIRONMENTS
    from vla.errors import ConfigError, nearest
    from vla.resources import bundle_path, is_address, load_embodiment

    if env not in ENVIRONMENTS:
        raise ConfigError(f"env: unknown environment {env!r}. {nearest(env, ENVIRONMENTS)}")
    if policy == "expert" and env not in EXPERTS:
        raise ConfigError(f"policy: no scripted expert for {env!r}. Pass --policy BUNDLE or --policy hold.")
    named = [*parts, *(["device"] if device != "cpu" else [])]
    if is_address(policy):
        from policies.remote.attach import attached
        from ros_nodes.graph import robot_of

        if device != "cpu":
            raise ConfigError(f"device: expected a bundle as policy, got {policy!r}. Pass it to `vla serve`.")
        attached(policy, load_embodiment(robot_of(env)), Parts.named(parts))[1].close()
    elif policy not in ("expert", "hold"):
        bundle_path(policy)
        if named:
            Parts.named(parts).load(bundle_path(policy), device)
    elif named:
        raise ConfigError(f"{', '.join(named)}: expected a bundle as policy, got {policy!r}. Pass --policy BUNDLE.")


def _nodes(policy: str) -> tuple[str, ...]:
    return ("sim node with its expert", "command node") if policy == "expert" else ("sim", "policy", "command node")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value
