"""What can be launched, with which arguments: one declaration for `ros2 launch` and for `vla launch`.

An argument that is not given is left to the parameter files, `params_file` after that of its node in launch/params, and
what these do not have to the default of ros_nodes/settings.py. `launch` and `launch_ros` are imported only by what a
launch file calls.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ros_nodes.names import Names
from ros_nodes.settings import NODES, RCLPY, Setting
from vla.errors import ConfigError, explain, nearest

CLOCK_OFFSET_VARIABLE = "VLA_CLOCK_OFFSET_NS"
_ROOT = Path(__file__).resolve().parents[1]
_END_S = 20.0  # what a node may take to end before it is told again: a long trace needs a while


@dataclass(frozen=True)
class Launch:
    """parts: {node of ros_nodes/settings.py: {its setting: the argument that has another name}}, in starting order.
    required: arguments without which nothing can be started."""

    name: str
    summary: str
    parts: Mapping[str, Mapping[str, str]]
    required: tuple[str, ...] = ()
    simulated: bool = field(default=True, repr=False)  # takes use_sim_time


_POLICY = {"policy": "bundle", "embodiment": "robot"}
LAUNCHES = {
    launch.name: launch
    for launch in (
        Launch("policy", "the policy node: cameras and joint states in, chunks out", {"policy": _POLICY}, ("bundle",)),
        Launch("sim", "a simulated arm behind the topics of a real one", {"sim": {}}, simulated=False),
        Launch(
            "robot", "policy and gate against a driver, or against sim",
            {"policy": _POLICY, "command": {"embodiment": "robot"}}, ("bundle", "robot"),
        ),
        Launch("camera", "a V4L2 device or a video file as a camera's topic", {"camera": {"embodiment": "robot"}}),
        Launch("record", "a robot's topics into rosbag2 recordings", {"recorder": {"embodiment": "robot"}}, ("robot",)),
    )
}  # fmt: skip

_PARAMS_FILE = Setting("params_file", "text", "", "ROS parameter file that is read after those in launch/params")
_PYTHON = Setting("python", "text", sys.executable, "Python of the nodes, such as an environment's with torch")
_SIM_TIME = Setting("use_sim_time", "flag", False, "follow /clock instead of the wall clock")
_OF_SHELL = {setting.name: setting for setting in (_SIM_TIME, *RCLPY)}  # parameters of every node
_QOS = "qos_overrides"
_RESPAWN = Setting("respawn", "flag", False, "start a node again that ends by itself")
_NAMESPACE = Setting("namespace", "text", "", "of nodes, topics and services")
ROS_ONLY = (
    Setting("autostart", "flag", True, "configure and activate at once"),
    Setting("log_level", "text", "info", "of the nodes", choices=("debug", "info", "warn", "error", "fatal")),
)
WHEEL_ONLY = (
    Setting("domain", "text", "", "ROS domain; nothing is ROS_DOMAIN_ID, else 0"),
    Setting("network", "text", "loopback", "loopback, auto (as CYCLONEDDS_URI says), or an interface"),
    Setting("distro", "text", "jazzy", "ROS 2 distribution of the peers"),
)


def common(launch: Launch) -> tuple[Setting, ...]:
    return (_PARAMS_FILE, _PYTHON, *((_SIM_TIME,) if launch.simulated else ()), _RESPAWN, _NAMESPACE)


def settings_of(launch: Launch) -> dict[str, Setting]:
    """{argument: the setting it sets, of the last node that has it}."""
    found: dict[str, Setting] = {}
    for node, names in launch.parts.items():
        for setting in NODES[node].settings:
            found[names.get(setting.name, setting.name)] = setting
    return found


def launch_named(name: str) -> Launch:
    if name not in LAUNCHES:
        raise ConfigError(f"launch: {name!r} is unknown. {nearest(name, LAUNCHES)}")
    return LAUNCHES[name]


def declarations(launch: Launch, extra: Sequence[Setting]) -> dict[str, dict[str, Any]]:
    """{argument: its description, default_value unless it is required, choices if any}, as launch files declare it."""
    of_nodes = settings_of(launch).keys() | _OF_SHELL.keys()
    out: dict[str, dict[str, Any]] = {}
    for name, setting in {**settings_of(launch), **{s.name: s for s in (*common(launch), *extra)}}.items():
        choices = ["true", "false"] if setting.kind == "flag" else list(setting.choices)
        default = str(setting.default).lower() if setting.kind == "flag" else str(setting.default)
        if name in of_nodes:  # left to the parameter files
            default, choices = "", ["", *filter(None, choices)] if choices else []
        out[name] = {"description": setting.described}
        if name not in launch.required:
            out[name]["default_value"] = default
        if choices:
            out[name]["choices"] = choices
    return out


def check(launch: Launch, values: Mapping[str, str], extra: Sequence[Setting] = ()) -> None:
    """ConfigError for an argument that is unknown, wrong or missing. values: texts, "" where nothing is said."""
    known = {**settings_of(launch), **{setting.name: setting for setting in (*common(launch), *extra)}}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{launch.name}: no argument {name!r}. {nearest(name, known)}")
        if value != "":
            known[name].read(value)
    Names.of(values.get("namespace", ""), ())
    for name in launch.required:
        if not values.get(name):
            raise ConfigError(explain(name, known[name].help, "nothing", f"Pass {name}:=..."))


def parameters(launch: Launch, node: str, values: Mapping[str, str]) -> dict[str, Any]:
    """{parameter: value} of `node`, as far as arguments say something; words and lists as one text, as in ROS."""
    names = launch.parts[node]
    out: dict[str, Any] = {}
    for setting in (*NODES[node].settings, *_OF_SHELL.values()):
        text = values.get(names.get(setting.name, setting.name), "")
        if text != "":
            value = setting.read(text)
            out[setting.name] = " ".join(value) if isinstance(value, list) else value
    return out


# ---- parameter files ----
def params_dir() -> Path:
    """launch/params, wherever this is installed."""
    prefixes = [Path(prefix) for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
    candidates = [
        _ROOT / "launch",
        Path(__file__).resolve().parent / "_launch",
        *(prefix / "share" / "vla_stack" / "launch" for prefix in prefixes),
    ]
    for candidate in candidates:
        if (candidate / "params").is_dir():
            return candidate / "params"
    raise ConfigError(explain("launch/params", "a folder of parameter files", "none", "Reinstall the package."))


def read_params(path: Path, node: str, namespace: str = "") -> dict[str, Any]:
    """What a ROS parameter file says to `node` of this namespace, its shell's parameters included; ConfigError when it
    says what the node does not have, or a value out of range, be it to the node of that name in another namespace."""
    name = NODES[node].name
    full = Names(namespace).full(name)
    values: dict[str, Any] = {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for key, section in _sections(data):
            fits = _fits(key, full)
            if fits or key.endswith(f"/{name}"):
                read = _checked(path, node, section)
                values |= read if fits else {}
    except OSError as error:
        raise ConfigError(explain("params_file", "a readable file", str(error), "Check the path.")) from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        remedy = "Write it as NODE: ros__parameters: NAME: VALUE."
        raise ConfigError(explain(str(path), "a ROS parameter file", f"{error!r}", remedy)) from error
    return values


def _sections(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(full name of a node, or its pattern; its parameters). Namespaces may be keys with their nodes below."""
    for key, value in data.items():
        if key == "ros__parameters":
            yield above, value or {}
        elif not isinstance(value, Mapping | None):
            raise TypeError(f"{key}: {value!r}")
        elif value:
            yield from _sections(value, f"{above}/{str(key).strip('/')}")


def _fits(key: str, name: str) -> bool:
    """As rcl does: * stands for one part of a name, ** for any number of them."""
    parts = {"*": r"/\w+", "**": r"(?:/\w+)*"}
    pattern = "".join(parts.get(part, "/" + re.escape(part)) for part in key.split("/")[1:])
    return re.fullmatch(pattern, name) is not None


def _checked(path: Path, node: str, section: Mapping[str, Any]) -> dict[str, Any]:
    known = {**_OF_SHELL, **{setting.name: setting for setting in NODES[node].settings}}
    values = {}
    for name, value in section.items():
        if name in known:
            values[name] = known[name].read(value)
        elif name.split(".")[0] == _QOS:
            values[name] = value
        else:
            raise ConfigError(f"{path}: {NODES[node].name} has no parameter {name!r}. {nearest(name, known)}")
    return values


# ---- processes ----
def environment() -> dict[str, str]:
    """What every node of a launch shares: where the code is, the clock's offset, one thread per maths library."""
    clock = os.environ.setdefault(CLOCK_OFFSET_VARIABLE, str(time.time_ns() - time.monotonic_ns()))
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {"PYTHONPATH": path, CLOCK_OFFSET_VARIABLE: clock, **threads}


def wheel_command(launch: Launch, node: str, values: Mapping[str, str]) -> list[str]:
    """The command line that runs `node` on the DDS wheel as these arguments say. ConfigError for a parameter file that
    asks for what only rclpy does."""
    namespace = values.get("namespace", "")
    said = dict(read_params(params_dir() / f"{node}.yaml", node, namespace))
    if path := values.get("params_file"):
        said |= read_params(Path(path), node, namespace)
        beyond = [name for name in said if name.split(".")[0] == _QOS or (name == "autostart" and not said[name])]
        if beyond:
            remedy = f"Use `ros2 launch launch/{launch.name}.launch.py`, or leave it out."
            raise ConfigError(explain(f"{path}: {beyond[0]}", "ROS 2 (rclpy)", "the DDS wheel", remedy))
    said |= parameters(launch, node, values)
    words = [word for s in NODES[node].settings if s.name in said for word in s.words(said[s.name])]
    words += [word for s in WHEEL_ONLY if values.get(s.name) for word in (s.option, values[s.name])]
    words += ["--namespace", namespace] if namespace else []
    words += ["--use-sim-time"] if said.get("use_sim_time") else []
    words += ["--stats", said["stats"]] if said.get("stats") else []
    return [values.get("python") or sys.executable, "-m", NODES[node].module, *words]


# ---- for launch files ----
def arguments(name: str) -> list[Any]:
    """The DeclareLaunchArguments of one launch."""
    from launch.actions import DeclareLaunchArgument

    return [DeclareLaunchArgument(name, **facts) for name, facts in declarations(LAUNCHES[name], ROS_ONLY).items()]


def node(name: str, part: str) -> Any:
    """The action of a launch file that starts one node as the arguments say."""
    from launch.actions import OpaqueFunction

    return OpaqueFunction(function=_start, args=[LAUNCHES[name], part])


def _start(context: Any, launch: Launch, part: str) -> list[Any]:
    from launch.substitutions import LaunchConfiguration
    from launch_ros.actions import LifecycleNode

    names = [*settings_of(launch), *(setting.name for setting in (*common(launch), *ROS_ONLY))]
    values = {name: LaunchConfiguration(name).perform(context) for name in names}
    check(launch, values, ROS_ONLY)
    files = [params_dir() / f"{part}.yaml", *([Path(values["params_file"])] if values["params_file"] else [])]
    for path in files:
        read_params(path, part, values["namespace"])
    given = parameters(launch, part, values)
    return [
        LifecycleNode(
            name=NODES[part].name,
            namespace=values["namespace"],
            executable=values["python"],
            arguments=["-m", "ros_nodes.rclpy_shell", part],
            ros_arguments=["--log-level", values["log_level"]],
            parameters=[*map(str, files), *([given] if given else [])],
            additional_env=environment(),
            respawn=_RESPAWN.read(values["respawn"]),
            respawn_delay=1.0,
            sigterm_timeout=str(_END_S),
            sigkill_timeout=str(_END_S),
            output="screen",
        )
    ]
