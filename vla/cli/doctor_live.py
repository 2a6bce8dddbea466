"""`vla doctor --robot`: the topics of a robot, before anything moves."""

from __future__ import annotations

import argparse
import json
import queue
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vla.errors import ConfigError, explain

if TYPE_CHECKING:
    from ros_nodes.doctor import Finding
    from ros_nodes.listening import Place
    from vla.embodiment import Embodiment

LIVE_S, SHADOW_S = 5.0, 30.0
SHELLS = ("rclpy", "wheel")
_OF_POLICY = ("decoder", "pruning", "reuse", "ensembling", "device", "threads", "compressed", "slop", "max_age")
_END_S = 10.0  # how long the last inference may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ros_nodes import settings
    from ros_nodes.launching import WHEEL_ONLY
    from ros_nodes.names import Names

    group = parser.add_argument_group("a robot's topics")
    group.add_argument("--robot", help="embodiment: a shipped name or a YAML file")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--live", action="store_true", help="listen, and compare with the robot's description")
    mode.add_argument("--shadow", action="store_true", help="run the policy, publish nothing, compare with an operator")
    group.add_argument("--policy", metavar="BUNDLE", help="folder or shipped name; --live: compare with its data, too")
    group.add_argument("--seconds", type=float, help=f"how long (default: {LIVE_S:g}; --shadow: {SHADOW_S:g})")
    group.add_argument("--instruction", default="", metavar="TEXT", help="--shadow: instead of /vla/instruction")
    group.add_argument(
        "--shell", choices=SHELLS, default="", help="default: rclpy where ROS is sourced, else the wheel"
    )
    group.add_argument("--use-sim-time", action="store_true", help="follow /clock instead of the wall clock")
    Names.add_arguments(group)
    settings.add_arguments(parser, [s for s in settings.POLICY if s.name in _OF_POLICY])
    settings.add_arguments(parser, WHEEL_ONLY)


def run(args: argparse.Namespace) -> int:
    """1 when a check failed."""
    from ros_nodes.doctor import WRONG
    from ros_nodes.listening import Place
    from ros_nodes.names import Names
    from vla.resources import embodiment_names, load_embodiment

    if not args.robot:
        known = f"one of {', '.join(embodiment_names())}, or a YAML file"
        raise ConfigError(explain("--robot", known, "nothing", "Say whose topics to look at."))
    if not (args.live or args.shadow):
        raise ConfigError(explain("--robot", "--live or --shadow beside it", "neither", "Add one of them."))
    if args.shadow and not args.policy:
        raise ConfigError(explain("--policy", "what to run beside the operator", "nothing", "Name a bundle."))
    seconds = args.seconds if args.seconds is not None else SHADOW_S if args.shadow else LIVE_S
    if not seconds > 0:
        raise ConfigError(explain("--seconds", "a positive number", seconds, "Give seconds."))
    robot = load_embodiment(args.robot)
    if args.domain and not args.domain.isdecimal():
        raise ConfigError(explain("--domain", "a number", repr(args.domain), "Give the ROS domain."))
    domain = int(args.domain) if args.domain else None
    names = Names.of(args.namespace, args.remap)
    place = Place(args.shell, domain, args.network, args.distro, args.use_sim_time, names)
    found = _shadow(args, place, seconds) if args.shadow else _live(args, robot, place, seconds)
    usable = all(finding.state != WRONG for finding in found)
    if args.json:
        print(json.dumps({"usable": usable, "checks": [asdict(finding) for finding in found]}, indent=2))
    else:
        _print(found)
    return 0 if usable else 1


def _live(args: argparse.Namespace, robot: Embodiment, place: Place, seconds: float) -> list[Finding]:
    from ros_nodes.doctor import OK, WRONG, Finding, Live, check, check_content
    from ros_nodes.listening import listen

    found: list[Finding] = []
    content = None
    if args.policy:
        from ros_nodes.policies import differences
        from vla.checkpoints.bundle import read_content, read_data
        from vla.embodiment import Embodiment
        from vla.resources import bundle_path

        path = bundle_path(args.policy)
        unlike = differences(robot, Embodiment.from_dict(read_content(path)["embodiment"]))
        state, got = (WRONG, "; ".join(unlike)) if unlike else (OK, "the same")
        remedy = "Use a policy made for this robot." if unlike else ""
        found.append(Finding("policy", state, f"one made for {robot.name}", got, remedy))
        content = read_data(path)
    live = Live(robot, args.compressed)
    graph = listen(place, live.subscriptions, seconds, live)
    found += check(live, graph, args.slop, args.max_age, place.names, place.chosen == "rclpy")
    if args.policy and not any(f.name == "policy" and f.state == WRONG for f in found):
        found += check_content(live, content)
    return found


def _shadow(args: argparse.Namespace, place: Place, seconds: float) -> list[Finding]:
    from ros_nodes import policy_node, settings
    from ros_nodes.listening import NODE, listen
    from ros_nodes.node import Now
    from ros_nodes.shadow import Shadow, findings
    from ros_nodes.shell import Worker

    values = {name: getattr(args, name) for name in _OF_POLICY}
    options = settings.options(settings.POLICY, {**values, "policy": args.policy, "embodiment": args.robot})
    results: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    worker = Worker(NODE, lambda name, value: results.put((name, value)))
    shadow = Shadow(policy_node.build(options), worker.put, args.instruction)

    def tick(now: Now) -> None:
        while not results.empty():
            shadow.on_result(*results.get(), now)
        shadow.tick(now)

    worker.start()
    try:
        listen(place, shadow.subscriptions, seconds, shadow, tick)
    finally:
        worker.end(_END_S)
    return findings(shadow)


def _print(found: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    from ros_nodes.doctor import DOUBT, OK, WRONG

    colours, console = {OK: "green", DOUBT: "yellow", WRONG: "red"}, Console()
    for finding in found:
        line = f" {finding.name}: expected {finding.expected}; got {finding.got}"
        rest = f". {finding.remedy}" if finding.remedy else ""
        console.print(Text(f"{finding.state:<5}", colours[finding.state]) + Text(line + rest), soft_wrap=True)
    count = {state: sum(f.state == state for f in found) for state in colours}
    print(f"\n{len(found)} checks: {count[WRONG]} wrong, {count[DOUBT]} doubtful. Nothing was published.")
