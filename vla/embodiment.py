"""Embodiment: names, order, units, limits, control mode and cameras of one robot. numpy only.

Read from configs/embodiment/*.yaml (plain YAML, no Hydra) and stored in every bundle and data set. Two embodiments
that differ are refused with every difference named: a wrong camera order or gripper sign gives 0 % and no error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np

from vla.errors import ConfigError, EmbodimentMismatch, explain, nearest
from vla.types import Command, ControlMode

ACTION_SPACES = ("ee_delta", "osc_delta", "joint_position")
ROTATION_FORMATS = ("axis_angle", "euler_xyz", "quaternion_xyzw", "rotation_6d", "none")
OUTPUT_KINDS = ("positions", "velocities", "trajectory", "follow_joint_trajectory", "gripper_command")


@dataclass(frozen=True)
class Camera:
    """name: key in Observation.images. topic: ROS image topic. height, width: pixels as published."""

    name: str
    height: int
    width: int
    topic: str = ""


@dataclass(frozen=True)
class Joint:
    """Limits of one commanded joint, rad (m for sliding joints), per second, per second squared, per second cubed.

    max_jerk: None when the robot states none; then jerk is not limited. All joints of a robot state one, or none does.
    """

    name: str
    lower: float
    upper: float
    max_velocity: float
    max_acceleration: float
    max_jerk: float | None = None


@dataclass(frozen=True)
class Output:
    """Where commands go, and as what.

    topic: a topic, or the name of an action. kind: positions or velocities (std_msgs/Float64MultiArray), trajectory
    (trajectory_msgs/JointTrajectory), follow_joint_trajectory or gripper_command (actions of control_msgs). joints:
    which, in this order; () for all. names: what the driver calls them, where it differs. timeout_s: after how long
    without a command the driver stops by itself; velocities are refused without one, because nothing else ends them.
    max_effort: N (or N m) of a gripper_command's goal; 0 is the driver's own choice, which is none at all in some.
    """

    topic: str
    kind: str = "positions"
    joints: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    timeout_s: float = 0.0
    max_effort: float = 0.0


@dataclass(frozen=True)
class JointSource:
    """A topic of sensor_msgs/JointState. joints: which it tells; () for all. names: what its driver calls them, in this
    order, where it differs."""

    topic: str
    joints: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embodiment:
    """Everything that must agree between data, bundle, environment and robot.

    name: identifier. rate_hz: actions per second. action_space: one of ACTION_SPACES.
    action_names / action_units: order and units of the action vector. state_names: order of Observation.state.
    rotation_format: of the rotation part of actions and state. gripper_open: the action value that opens the gripper
    (+1 or -1); closing is its negative. control_mode: what Command.values are. joints: commanded joints, in order,
    gripper last if it is one of them. workspace_lower/upper: metres in the robot base frame, of the tool point.
    max_tool_speed_m_s: cartesian limit. cameras: in model order. robot_model: MJCF or URDF file, relative to the
    embodiment models folder, used for kinematics ("" when the control mode needs none). tool_site: the site of the
    model that actions move. home: joint positions of a safe start. command_topic: of one Float64MultiArray with all
    joints; outputs: instead of it, where it takes several or another kind. joint_states: where those do not come on
    /joint_states, all joints by the names they have here. urdf: file whose limits hold too, the stricter of each.
    max_time_scale: a chunk that is too fast is slowed down as a whole up to this factor, and refused beyond it; 1
    leaves chunks as they are, for the Gate to limit tick by tick.
    """

    name: str
    rate_hz: float
    action_space: str
    action_names: tuple[str, ...]
    action_units: tuple[str, ...]
    state_names: tuple[str, ...]
    rotation_format: str
    gripper_open: int
    control_mode: ControlMode
    cameras: tuple[Camera, ...]
    joints: tuple[Joint, ...] = ()
    workspace_lower: tuple[float, float, float] = (-np.inf, -np.inf, -np.inf)
    workspace_upper: tuple[float, float, float] = (np.inf, np.inf, np.inf)
    max_tool_speed_m_s: float = np.inf
    max_tool_speed_rad_s: float = np.inf
    robot_model: str = ""
    tool_site: str = ""
    home: tuple[float, ...] = ()
    command_topic: str = ""
    outputs: tuple[Output, ...] = ()
    joint_states: tuple[JointSource, ...] = ()
    urdf: str = ""
    max_time_scale: float = 1.0

    def __post_init__(self) -> None:
        where = f"embodiment {self.name!r}"
        if self.action_space not in ACTION_SPACES:
            raise ConfigError(
                f"{where}.action_space: {self.action_space!r} is unknown. {nearest(self.action_space, ACTION_SPACES)}"
            )
        if self.rotation_format not in ROTATION_FORMATS:
            raise ConfigError(
                f"{where}.rotation_format: {self.rotation_format!r} is unknown. "
                + nearest(self.rotation_format, ROTATION_FORMATS)
            )
        if self.gripper_open not in (-1, 1):
            raise ConfigError(explain(f"{where}.gripper_open", "+1 or -1", self.gripper_open, "Say which sign opens."))
        if len(self.action_names) != len(self.action_units):
            raise ConfigError(
                explain(
                    f"{where}.action_units",
                    f"{len(self.action_names)} entries, one per action",
                    len(self.action_units),
                    "Name a unit for every action dimension.",
                )
            )
        if not self.rate_hz > 0:
            raise ConfigError(explain(f"{where}.rate_hz", "a positive rate", self.rate_hz, "Give actions per second."))
        if not 1.0 <= self.max_time_scale < np.inf:
            raise ConfigError(
                explain(f"{where}.max_time_scale", "1 or more", self.max_time_scale, "1 never slows a chunk down.")
            )
        self._check_outputs(f"{where}.outputs")
        self._check_joint_states(f"{where}.joint_states")

    def _check_outputs(self, where: str) -> None:
        for output in self.outputs:
            key = f"{where}[{output.topic}]"
            if output.kind not in OUTPUT_KINDS:
                raise ConfigError(f"{key}.kind: {output.kind!r} is unknown. {nearest(output.kind, OUTPUT_KINDS)}")
            if output.kind == "velocities" and not output.timeout_s > 0:
                expected = "the time after which the driver stops by itself"
                remedy = "A velocity goes on when this process dies: set the driver's command timeout, and state it."
                raise ConfigError(explain(f"{key}.timeout_s", expected, output.timeout_s, remedy))
            if output.kind == "gripper_command" and len(output.joints) != 1:
                raise ConfigError(explain(f"{key}.joints", "one joint", list(output.joints), "Name the gripper's."))
        self._check_shares(where, "output", self.outputs)

    def _check_joint_states(self, where: str) -> None:
        topics = [source.topic for source in self.joint_states]
        if len(topics) != len(set(topics)):
            remedy = "Name a topic once, with all joints it tells."
            raise ConfigError(explain(where, "every topic once", topics, remedy))
        for source in self.joint_states:
            if len(source.names) != len(set(source.names)):
                remedy = "A driver has a name of its own for each joint."
                raise ConfigError(explain(f"{where}[{source.topic}].names", "each once", list(source.names), remedy))
        self._check_shares(where, "source", self.joint_states)

    def _check_shares(self, where: str, noun: str, shares: Sequence[Output | JointSource]) -> None:
        """Each joint is in one of them, each with a name of the driver's if there are any."""
        names = [joint.name for joint in self.joints]
        found: list[str] = []
        for share in shares:
            key = f"{where}[{share.topic}]"
            for name in share.joints:
                if name not in names:
                    raise ConfigError(f"{key}.joints: {name!r} is no joint of {self.name}. {nearest(name, names)}")
            if share.names and len(share.names) != len(share.joints):
                raise ConfigError(
                    explain(f"{key}.names", f"{len(share.joints)} names", len(share.names), "One per joint.")
                )
            found += share.joints or names
        missing = [name for name in names if shares and name not in found]
        if missing or len(found) != len(set(found)):
            got = f"none for {missing}" if missing else f"two for {[n for n in names if found.count(n) > 1]}"
            raise ConfigError(explain(where, f"one {noun} for every joint", got, "Correct the joints."))

    # ---- sizes and names ----
    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def grippers(self) -> tuple[int, ...]:
        """Which actions are grippers, by their names."""
        return tuple(place for place, name in enumerate(self.action_names) if "gripper" in name)

    def gripper_sides(self, actions: np.ndarray) -> np.ndarray:
        """bool[..., G]: whether each gripper action of float[..., A] is above its middle, which is 0, or for joint
        positions that of the joint in the same place, whatever the action is called."""
        places = list(self.grippers)
        absolute = self.action_space == "joint_position" and len(self.joints) == self.action_dim
        middle = [(self.joints[i].lower + self.joints[i].upper) / 2 if absolute else 0.0 for i in places]
        return np.asarray(np.asarray(actions)[..., places] > np.array(middle))

    @property
    def state_dim(self) -> int:
        return len(self.state_names)

    @property
    def period_s(self) -> float:
        return 1.0 / self.rate_hz

    @property
    def command_names(self) -> tuple[str, ...]:
        """Order of Command.values: joints for joint control, action dimensions for operational-space control."""
        return self.action_names if self.control_mode is ControlMode.OSC_DELTA else tuple(j.name for j in self.joints)

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    @property
    def gripper_joints(self) -> tuple[int, ...]:
        """Which entries of a command are grippers, by their names."""
        names = self.command_names
        return tuple(place for place, name in enumerate(names) if "gripper" in name or "finger" in name)

    @property
    def sinks(self) -> tuple[Output, ...]:
        """The outputs, or the one that `command_topic` stands for."""
        return self.outputs or (Output(self.command_topic or "/arm_controller/commands"),)

    @property
    def joint_sources(self) -> tuple[JointSource, ...]:
        """`joint_states`, or the topic that it stands for."""
        return self.joint_states or (JointSource("/joint_states"),)

    @property
    def state_is_joints(self) -> bool:
        """The state is read from joint states by name: no kinematics are needed for it."""
        return set(self.state_names) <= {joint.name for joint in self.joints}

    def joint_state_vector(self, positions: np.ndarray) -> np.ndarray:
        """float32[S] in the order of state_names from positions float64[D] of the joints; see `state_is_joints`."""
        places = {joint.name: place for place, joint in enumerate(self.joints)}
        return np.asarray(positions, np.float64)[[places[name] for name in self.state_names]].astype(np.float32)

    def camera(self, name: str) -> Camera:
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise ConfigError(f"camera {name!r} is not one of {self.name}. {nearest(name, self.camera_names)}")

    def stop(self, positions: np.ndarray | None = None, stamp_ns: int = 0) -> Command:
        """The command that holds the arm where it is.

        positions: float64[D] measured joint positions; needed for joint control. Operational-space deltas hold with
        zeros, the gripper entry included: LIBERO's gripper integrates its input, so zero keeps the grasp.
        """
        if self.control_mode is ControlMode.OSC_DELTA:
            return Command(self.control_mode, np.zeros(self.action_dim), stamp_ns, "hold")
        if positions is None or len(positions) != len(self.joints):
            got = "nothing" if positions is None else f"{len(positions)} values"
            raise ConfigError(
                explain("positions", f"{len(self.joints)} measured joint positions", got, "Pass the joint state.")
            )
        return Command(self.control_mode, np.asarray(positions, np.float64).copy(), stamp_ns, "hold")

    # ---- equality with names ----
    def differences(self, other: Embodiment) -> list[str]:
        """Every field that matters to a policy and differs, as `field: mine != theirs`; [] when they fit."""
        out = []
        for key in (
            "rate_hz", "action_space", "action_names", "action_units", "state_names", "rotation_format",
            "gripper_open", "control_mode", "camera_names",
        ):  # fmt: skip
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine != theirs:
                out.append(f"{key}: {_show(mine)} != {_show(theirs)}")
        return out

    def require_same(self, other: Embodiment, what: str, remedy: str = "Use a policy made for this robot.") -> None:
        """Raise EmbodimentMismatch naming every difference; `what` says who met whom."""
        found = self.differences(other)
        if found:
            raise EmbodimentMismatch(f"{what}: {len(found)} difference(s): " + "; ".join(found) + f". {remedy}")

    # ---- plain data ----
    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML; `from_dict` inverts it. What the first format did not have is left out where
        it says nothing, so that a robot that needs none of it is written as ever."""
        data = asdict(self)
        data["control_mode"] = self.control_mode.value
        for key, nothing in (("outputs", ()), ("joint_states", ()), ("urdf", ""), ("max_time_scale", 1.0)):
            if data[key] == nothing:
                del data[key]
        for joint in data["joints"]:
            if joint["max_jerk"] is None:
                del joint["max_jerk"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Embodiment:
        """Build from plain data. Unknown keys are refused with the nearest known name."""
        known = {f.name for f in fields(cls)}
        values = dict(data)
        _refuse_unknown("embodiment", values, known)
        missing = [f.name for f in fields(cls) if f.name not in values and f.default is MISSING]
        if missing:
            raise ConfigError(
                explain("embodiment", "all required keys", f"missing {missing}", "Add them to the embodiment file.")
            )
        try:
            values["control_mode"] = ControlMode(values["control_mode"])
        except ValueError as error:
            modes = [mode.value for mode in ControlMode]
            raise ConfigError(
                f"embodiment.control_mode: {values['control_mode']!r} is unknown. "
                + nearest(str(values["control_mode"]), modes)
            ) from error
        values["cameras"] = tuple(_build(Camera, "camera", item) for item in values["cameras"])
        values["joints"] = tuple(_build(Joint, "joint", item) for item in values.get("joints", ()))
        values["outputs"] = tuple(_build(Output, "output", item) for item in values.get("outputs", ()))
        values["joint_states"] = tuple(_build(JointSource, "joint_states", x) for x in values.get("joint_states", ()))
        for key in ("action_names", "action_units", "state_names"):
            values[key] = tuple(str(item) for item in values[key])
        for key in ("workspace_lower", "workspace_upper", "home"):
            if key in values:
                values[key] = tuple(float(item) for item in values[key])
        return cls(**values)


def _refuse_unknown(what: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{what}: unknown key {key!r}. {nearest(key, known)}")


def _build(kind: type, what: str, item: Any) -> Any:
    if isinstance(item, kind):
        return item
    _refuse_unknown(what, item, {f.name for f in fields(kind)})
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in item.items()})
    except TypeError as error:
        raise ConfigError(f"{what} {dict(item)}: {error}. Give {[f.name for f in fields(kind)]}.") from error


def _show(value: Any) -> str:
    if isinstance(value, ControlMode):
        return value.value
    return str(list(value)) if isinstance(value, tuple) else str(value)
