"""`vla launch`: what `ros2 launch` does with our launch files, where there is no ROS: the same arguments, the wheel."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from ros_nodes import launching
from ros_nodes.outputs import Outputs, sent_as
from ros_nodes.policies import check_robot, is_bundle
from ros_nodes.shell import EXIT_LIMIT_S
from vla.embodiment import Embodiment
from vla.errors import BundleError, ConfigError, explain
from vla.resources import BUNDLE_MARKER, bundle_path, load_embodiment

EPILOG = """Arguments are those of `ros2 launch launch/NAME.launch.py`, as name:=value; `vla launch NAME --show-args`
lists them. Ctrl-C ends all nodes. Exit code: 0 when each ended cleanly, 1 when one did not, 2 when nothing was started,
with what to correct.

examples:
  vla launch sim env:=tabletop
  vla launch robot bundle:=tabletop robot:=tabletop
  vla launch camera source:=/dev/video2 robot:=so101 camera:=wrist
  vla launch record robot:=tabletop wait:=true"""
RESPAWN_DELAY_S = 1.0
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "; ".join(f"{launch.name}: {launch.summary}" for launch in launching.LAUNCHES.values())
    parser.epilog = EPILOG
    parser.add_argument("name", choices=tuple(launching.LAUNCHES), help=names)
    parser.add_argument("arguments", nargs="*", metavar="NAME:=VALUE", help="what the launch takes")
    parser.add_argument("-s", "--show-args", action="store_true", help="list the arguments of the launch")


def run(args: argparse.Namespace) -> int:
    launch = launching.launch_named(args.name)
    if args.show_args:
        print(described(launch))
        return 0
    values = read(launch, args.arguments)
    look(values)
    nodes = {node: launching.wheel_command(launch, node, values) for node in launch.parts}
    return Processes(nodes, values.get("respawn", "").lower() == "true").run()


def described(launch: launching.Launch) -> str:
    """The arguments as `ros2 launch --show-args` prints them."""
    lines = [f"{launch.name}: {launch.summary}", "Arguments (pass arguments as '<name>:=<value>'):"]
    for name, facts in launching.declarations(launch, launching.WHEEL_ONLY).items():
        choices = f" Valid choices are: {facts['choices']}" if "choices" in facts else ""
        lines += ["", f"    '{name}':", f"        {facts['description']}{choices}"]
        lines += [
            f"        (default: {facts['default_value']!r})" if "default_value" in facts else "        (required)"
        ]
    return "\n".join(lines)


def read(launch: launching.Launch, words: list[str]) -> dict[str, str]:
    """{argument: text}; ConfigError for what is unknown, wrong, missing, or needs ROS."""
    values: dict[str, str] = {}
    for word in words:
        name, given, value = word.partition(":=")
        if not given:
            raise ConfigError(explain("argument", "name:=value", repr(word), "Write it so."))
        values[name] = value
    for setting in launching.ROS_ONLY:
        if setting.name in values and setting.read(values.pop(setting.name)) != setting.default:
            remedy = f"Use `ros2 launch launch/{launch.name}.launch.py`, or leave it out."
            raise ConfigError(explain(setting.name, "ROS 2 (rclpy)", "the DDS wheel", remedy))
    launching.check(launch, values, launching.WHEEL_ONLY)
    return values


def look(values: dict[str, str]) -> None:
    """Raise what the nodes would, for a robot, an output, a domain or a bundle that cannot be, before one of them
    starts."""
    robot = load_embodiment(values["robot"]) if values.get("robot") else None
    if robot is not None and not values.get("params_file"):  # which may say the rest
        kind, topic, timeout_s = (values.get(name, "") for name in ("output", "output_topic", "driver_timeout"))
        Outputs(sent_as(robot, kind, topic, float(timeout_s or 0)))
    bundle = values.get("bundle", "")
    if bundle and is_bundle(bundle):
        trained = _trained_for(bundle)
        if robot is not None:
            check_robot(robot, trained, bundle)
    if env := values.get("env", ""):
        from sim.environment import check_name  # gymnasium, for one word

        check_name(env)
    from ros_nodes.wire import domain_id  # last: it needs the wheel

    domain_id(values.get("domain") or None)


def _trained_for(bundle: str) -> Embodiment:
    """Without torch, which takes seconds to import; the node checks the rest."""
    path = bundle_path(bundle) / BUNDLE_MARKER
    try:
        return Embodiment.from_dict(json.loads(path.read_text(encoding="utf-8"))["embodiment"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise BundleError(explain(str(path), "a bundle's description", got, "Copy or train it again.")) from error


class Processes:
    """The nodes of one launch. One that ends by itself ends them all, unless it is to be started again."""

    def __init__(self, commands: dict[str, list[str]], respawn: bool = False):
        self._commands, self._respawn = commands, respawn
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ending = False
        self._told = ""  # the node whose end was said, and ended the launch

    def run(self) -> int:
        """0 after SIGINT or SIGTERM when every node ended with 0, else 1."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for name in self._commands:
                self._start(name)
            good = self._watch()
        finally:
            codes = self._end()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for name, code in codes.items():
            if code and name != self._told:
                print(f"vla launch: {name} ended with code {code}", file=sys.stderr)
        return 0 if good and not any(codes.values()) else 1

    def _on_signal(self, number: int, frame: Any) -> None:
        self._ending = True

    def _start(self, name: str) -> None:
        # A session of its own: Ctrl-C in the terminal reaches the nodes once, from here, and in order.
        environment = {**os.environ, **launching.environment()}
        self._running[name] = subprocess.Popen(self._commands[name], env=environment, start_new_session=True)

    def _watch(self) -> bool:
        """Until the end is asked for; False when a node ended by itself."""
        while not self._ending:
            time.sleep(_POLL_S)
            for name, process in self._running.items():
                if process.poll() is None:
                    continue
                print(f"vla launch: {name} ended by itself with code {process.returncode}", file=sys.stderr)
                if not self._respawn:
                    self._told = name
                    return False
                time.sleep(RESPAWN_DELAY_S)
                if not self._ending:
                    self._start(name)
                break
        return True

    def _end(self) -> dict[str, int]:
        """End all nodes, the consumer of a stream before its source; their exit codes."""
        codes = {}
        for name, process in self._running.items():
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(EXIT_LIMIT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            # A node that was still importing has no handler yet and ends by the signal itself: nothing was lost.
            codes[name] = 0 if process.returncode == -signal.SIGTERM else process.returncode
        return codes
