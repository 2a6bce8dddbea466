"""What can be set on each node: one declaration for its command line, its ROS parameters and its launch arguments.

Plain data, loaded with numpy and yaml only: a launch file reads it in ROS's own Python, which has little more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from policies.parts import GROUPS
from vla.errors import ConfigError, explain, nearest

KINDS = ("flag", "int", "float", "text", "words", "list")


@dataclass(frozen=True)
class Setting:
    """name: of the ROS parameter and the launch argument; on the command line `--name`, with dashes.

    kind: flag, int, float, text; words: a name and key=value pairs, on the command line as several words; list: any
    number of texts, on the command line one per option. In ROS parameters and launch arguments both are one text with
    blanks between. default: of that kind, "" where nothing need be said. low, high: inclusive range of a number.
    """

    name: str
    kind: str
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    required: bool = False
    unit: str = ""

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def described(self) -> str:
        """The help text, with the range or the default, for ROS parameters and launch arguments."""
        notes = [f"in {self.unit}"] if self.unit else []
        if math.isfinite(self.low) or math.isfinite(self.high):
            notes.append(f"{self.low:g} to {self.high:g}")
        if self.choices:
            notes.append("one of " + ", ".join(filter(None, self.choices)))
        if self.kind in ("int", "float", "flag"):
            notes.append(f"default {str(self.default).lower()}")
        return self.help + (f" ({'; '.join(notes)})" if notes else "")

    def read(self, value: Any) -> Any:
        """value: of the kind, or its text. ConfigError when it is neither, out of range or not a choice."""
        if self.kind in ("words", "list"):
            return value.split() if isinstance(value, str) else [str(word) for word in value]
        if self.kind == "text":
            text = str(value)
            if self.choices and text not in self.choices:
                raise ConfigError(f"{self.name}: {text!r} is unknown. {nearest(text, self.choices)}")
            return text
        if self.kind == "flag":
            known = {"true": True, "false": False}
            if str(value).lower() not in known:
                raise ConfigError(explain(self.name, "true or false", repr(value), "Correct it."))
            return known[str(value).lower()]
        whole = self.kind == "int"
        try:
            number = float(value)
            if isinstance(value, bool) or (whole and number != int(number)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            wanted = "a whole number" if whole else "a number"
            raise ConfigError(explain(self.name, wanted, repr(value), "Correct it.")) from None
        if not self.low <= number <= self.high:
            raise ConfigError(explain(self.name, f"{self.low:g} to {self.high:g}", f"{number:g}", "Correct it."))
        return int(number) if whole else number

    def parse(self, text: str) -> Any:
        """`read`, as argparse wants it."""
        try:
            return self.read(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def words(self, value: Any) -> list[str]:
        """The words of a command line that say `value`."""
        value = self.read(value)
        if self.kind == "flag":
            return [self.option] if value else []
        if self.kind == "words":
            return [self.option, *value] if value else []
        if self.kind == "list":
            return [word for item in value for word in (self.option, item)]
        return [] if value == "" else [self.option, str(value)]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        metavar = self.unit.upper() or None  # None: argparse takes the name
        if self.kind == "flag":
            parser.add_argument(self.option, action="store_true", help=self.help)
        elif self.kind == "words":
            pair: Any = ("NAME", "KEY=VALUE")
            parser.add_argument(self.option, nargs="+", default=[], metavar=pair, help=self.help)
        elif self.kind == "list":
            parser.add_argument(
                self.option, action="append", default=[], metavar="NAME", help=self.help + "; repeatable"
            )
        elif self.kind == "text":
            parser.add_argument(
                self.option, default=self.default, choices=self.choices or None, required=self.required, help=self.help
            )
        else:
            parser.add_argument(
                self.option, type=self.parse, default=self.default, metavar=metavar, help=self.described
            )


_ROBOT = Setting("embodiment", "text", "", "robot: a shipped name or a YAML file", required=True)

POLICY = (
    Setting("policy", "text", "", "bundle folder, name of a shipped bundle, ws:// address, or 'hold'", required=True),
    *(Setting(group, "words", "", text) for group, text in GROUPS.items()),
    Setting("device", "text", "cpu", "where a bundle runs: cpu, cuda, cuda:1, ...; auto is the GPU if there is one"),
    Setting("threads", "int", 1, "torch CPU threads", 1, 256),
    Setting("embodiment", "text", "", "the robot as it is now: topics, joints, limits; needed for 'hold' and ws://"),
    Setting("compressed", "flag", False, "hear <camera topic>/compressed, pictures as JPEG or PNG"),
    Setting("slop", "float", 0.02, "largest distance of any stamp from the first camera's", 0.0, 1.0, unit="s"),
    Setting("max_age", "float", 0.5, "oldest usable observation", 0.01, 10.0, unit="s"),
    Setting("hang_limit", "float", 0.5, "inference time that silences the heartbeat", 0.05, 60.0, unit="s"),
)

COMMAND = (
    _ROBOT,
    Setting("out", "text", "", "folder for trace.mcap and control.json, written at the end"),
    Setting("execute", "int", 8, "actions of a chunk to run before the next", 1, 1000),
    Setting("lead", "int", 2, "control periods that inference may take", 0, 100),
    Setting("sequential", "flag", False, "ask only when all actions are executed"),
    Setting("slot_wait", "float", 0.0, "wait this long in a period for the chunk it asked for", 0.0, 1.0, unit="s"),
    Setting("deadman", "flag", False, "move only while /vla/deadman says true, at least every 100 ms"),
    Setting("estop_required", "flag", False, "do not move before /vla/estop has said false; publish it often"),
    Setting("camera_timeout", "float", 0.14, "how late a picture may be", 0.01, 10.0, unit="s"),
    Setting("max_tracking_error", "float", 0.2, "of a joint from where it was commanded in the last 0.2 s, rad or m",
            0.005, 3.2),
    Setting("urdf", "text", "", "limits of this URDF hold too, the stricter of each"),
    Setting("robot_model", "text", "", "MJCF or URDF for inverse kinematics"),
    Setting("output", "text", "", "send all joints as this; nothing is what the robot's file says",
            choices=("", "positions", "velocities", "trajectory", "follow_joint_trajectory")),
    Setting("output_topic", "text", "", "topic or action of `output`; nothing is the robot's command topic"),
    Setting("driver_timeout", "float", 0.0, "after which the driver stops by itself, for velocities", 0.0, 0.15,
            unit="s"),
)  # fmt: skip

SIM = (
    Setting("env", "text", "tabletop", "what is simulated: tabletop, or a LIBERO suite such as libero_object"),
    Setting("task", "text", "", "task name or number; nothing is the environment's own"),
    Setting("rtf", "float", 0.0, "simulated seconds per wall second; 0 is 1, or 0.25 for LIBERO", 0.0, 1.0),
    Setting("policy", "text", "none", "expert: answer requests here", choices=("none", "expert")),
)

CAMERA = (
    Setting("source", "text", "/dev/video0", "V4L2 device, or video file"),
    Setting("embodiment", "text", "", "robot whose camera this is: it says topic and size"),
    Setting("camera", "text", "", "which of the robot's cameras; nothing is its first"),
    Setting("topic", "text", "", "of the pictures; nothing is the robot's, else /camera/image_raw"),
    Setting("frame_id", "text", "", "of the pictures; nothing is the camera's name"),
    Setting("width", "int", 0, "of the pictures; 0 is the robot's, else the source's", 0, 16384, unit="pixels"),
    Setting("height", "int", 0, "of the pictures; 0 is the robot's, else the source's", 0, 16384, unit="pixels"),
    Setting("resize", "flag", False, "scale pictures of another size"),
    Setting("rate", "float", 0.0, "asked of the device, or at which the file is played; 0 is its own", 0.0, 1000.0,
            unit="Hz"),
    Setting("loop", "flag", False, "play the file again and again"),
    Setting("pixel_format", "text", "", "asked of the device, such as mjpeg or yuyv422; nothing is what it gives"),
    Setting("transport", "text", "raw", "pictures as they are, JPEG on <topic>/compressed, or both",
            choices=("raw", "compressed", "both")),
    Setting("quality", "int", 90, "of JPEG pictures; more is larger and truer", 1, 95),
)  # fmt: skip

RECORDER = (
    _ROBOT,
    Setting("out", "text", "recordings", "folder of the recordings"),
    Setting("name", "text", "", "what names of recordings begin with; nothing is the robot's name"),
    Setting("wait", "flag", False, "record only from `start` to `stop` on /vla/record"),
    Setting("compressed", "flag", False, "record <camera topic>/compressed"),
    Setting("topic", "list", "", "record this as well, as /name:package/msg/Type"),
    Setting("without", "list", "", "leave this topic out"),
    Setting("compression", "text", "none", "of the recording, chunk by chunk", choices=("none", "lz4", "zstd")),
    Setting("queue", "float", 256.0, "memory before the disk", 1.0, 65536.0, unit="MiB"),
    Setting("min_free", "float", 1024.0, "end a recording with less on the disk", 0.0, 1e9, unit="MiB"),
)

# Of the rclpy shell itself, for every node.
RCLPY = (
    Setting("autostart", "flag", True, "configure and activate at once; false waits for `ros2 lifecycle set`"),
    Setting("stats", "text", "", "write message counts and timings into this file at the end"),
)


@dataclass(frozen=True)
class NodeKind:
    """name: of the node in the graph. module: has `build(options) -> NodeCore`."""

    name: str
    module: str
    settings: tuple[Setting, ...] = field(repr=False)


NODES = {
    "policy": NodeKind("vla_policy", "ros_nodes.policy_node", POLICY),
    "command": NodeKind("vla_command", "ros_nodes.command_node", COMMAND),
    "sim": NodeKind("vla_sim", "ros_nodes.sim_node", SIM),
    "camera": NodeKind("vla_camera", "ros_nodes.camera_node", CAMERA),
    "recorder": NodeKind("vla_recorder", "ros_nodes.recorder_node", RECORDER),
}


def add_arguments(parser: argparse.ArgumentParser, settings: Sequence[Setting]) -> None:
    for setting in settings:
        setting.add_to(parser)


def options(settings: Sequence[Setting], values: Mapping[str, Any]) -> argparse.Namespace:
    """What a command line with these values would give; ConfigError for a missing, unknown or wrong one."""
    names = [setting.name for setting in settings]
    for name in values:
        if name not in names:
            raise ConfigError(f"{name!r} is no setting. {nearest(name, names)}")
    read = {setting.name: setting.read(values.get(setting.name, setting.default)) for setting in settings}
    for setting in settings:
        if setting.required and not read[setting.name]:
            raise ConfigError(explain(setting.name, setting.help, "nothing", f"Set {setting.name}."))
    return argparse.Namespace(**read)
