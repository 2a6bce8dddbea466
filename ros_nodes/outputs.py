"""What the command node sends, as the driver on the other side takes it: one message per output of the embodiment.

    positions                std_msgs/Float64MultiArray on TOPIC: the driver holds the last one
    velocities               the same; only with a stated driver timeout, because a velocity goes on. That of the
                             command, and a little more or less where the arm is off its path
    trajectory               trajectory_msgs/JointTrajectory: the command, what is planned next, and the stop
    follow_joint_trajectory  the same as goal of control_msgs/action/FollowJointTrajectory
    gripper_command          goal of control_msgs/action/GripperCommand, sent when it changes; without action clients
                             the goal's position on its twin, NAME/commands, with every command

A trajectory carries its own stop: whatever happens to this process, the controller ends at rest. It reaches at most
`horizon_s` beyond the command and begins to brake STOP_S after its stamp, or at the command where control periods are
longer than that; its last velocities are zero, as Jazzy's joint trajectory controller asks for. It starts at its stamp,
and its first point lies one period later, where the arm shall be when the next trajectory takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ros_nodes.messages import Trajectory, Values
from ros_nodes.node import Endpoint, Goal, Now, Send
from vla.embodiment import Embodiment, Output
from vla.errors import ConfigError, explain
from vla.runtime.gate import MAX_PERIODS, Verdict
from vla.runtime.limits import JointLimits, within_urdf
from vla.runtime.loop import CommandPath, ControlLoop
from vla.types import NS_PER_S, ControlMode

ACTION_TYPES = {
    "follow_joint_trajectory": "control_msgs/action/FollowJointTrajectory",
    "gripper_command": "control_msgs/action/GripperCommand",
}
_TOPIC_TYPES = {
    "positions": Values.type_name,
    "velocities": Values.type_name,
    "trajectory": Trajectory.type_name,
}
TWIN = "/commands"  # behind the name of a gripper's action: std_msgs/Float64MultiArray of one position
STOP_S = 0.15  # after the last command of a node that is gone, the arm brakes
_CATCH_UP_PER_S = 2.0  # of the way that a joint driven by velocities is off its path
_CATCH_UP_SHARE = 0.1  # of its limit, at most
_GRIPPER_STEP = 0.02  # of its range: a new goal for less would only restart the driver's motion


def sent_as(robot: Embodiment, kind: str, topic: str = "", timeout_s: float = 0.0) -> Embodiment:
    """The robot with all joints sent as `kind` to `topic`, "" for its command topic; as it is with "" for the kind.
    ConfigError where that cannot be."""
    if not kind:
        return robot
    topic = topic or robot.command_topic
    if not topic:
        raise ConfigError(explain("output_topic", "the topic or action to send to", "none", "Name it."))
    return replace(robot, outputs=(Output(topic, kind, timeout_s=timeout_s),))


class Outputs:
    """The outputs of one robot. horizon_s: how far a trajectory goes on as planned after the command, then it stops.
    actions: the shell has action clients; without them grippers are told on topics.

    twins: these topics.
    """

    def __init__(self, robot: Embodiment, horizon_s: float = 0.1, actions: bool = True) -> None:
        self._robot, self._has_actions = robot, actions
        grippers = [sink.topic + TWIN for sink in robot.sinks if sink.kind == "gripper_command"]
        self.twins: tuple[str, ...] = () if actions else tuple(grippers)
        self._horizon = max(0, int(min(horizon_s, STOP_S - robot.period_s) * robot.rate_hz + 1e-9))
        self._sinks: list[tuple[Output, np.ndarray, tuple[str, ...]]] = []
        for sink in robot.sinks:
            names = sink.joints or robot.command_names
            places = np.array([robot.command_names.index(name) for name in names])
            self._sinks.append((sink, places, sink.names or names))
        self._planned = any("trajectory" in sink.kind for sink in robot.sinks)
        self._drives = any(sink.kind == "velocities" for sink in robot.sinks)
        for sink in robot.sinks:
            if sink.kind == "velocities" and not robot.period_s < sink.timeout_s <= STOP_S:
                expected = f"above the period of {robot.period_s:g} s, up to {STOP_S:g} s"
                remedy = "A velocity goes on when this process dies: set the driver's command timeout, and state it."
                raise ConfigError(explain(f"{robot.name}: {sink.topic}: timeout_s", expected, sink.timeout_s, remedy))
        joints = self._drives and robot.control_mode is not ControlMode.OSC_DELTA
        self._limits = JointLimits.of(within_urdf(robot)) if joints else None
        self._grips: dict[str, float] = {}
        self._driven, self._driven_ns = np.zeros(len(robot.command_names)), 0  # the last velocities sent, and when

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        topics = [Endpoint(s.topic, _TOPIC_TYPES[s.kind]) for s, _, _ in self._sinks if s.kind in _TOPIC_TYPES]
        return (*topics, *(Endpoint(topic, Values.type_name) for topic in self.twins))

    @property
    def at_rest(self) -> bool:
        """What was sent last moves nothing by itself."""
        return not np.any(self._driven)

    @property
    def actions(self) -> tuple[tuple[str, str], ...]:
        """(name, type) of the action servers that goals go to."""
        goals = [s for s, _, _ in self._sinks if s.kind in ACTION_TYPES and s.topic + TWIN not in self.twins]
        return tuple((s.topic, ACTION_TYPES[s.kind]) for s in goals)

    @property
    def arms(self) -> frozenset[str]:
        """Names of the actions that move the arm: it stops where they are not followed."""
        return frozenset(sink.topic for sink, _, _ in self._sinks if sink.kind == "follow_joint_trajectory")

    def of(self, values: np.ndarray, positions: np.ndarray | None, loop: ControlLoop, now: Now) -> list[Send | Goal]:
        """What to send for the command `values` float64[D] that the loop has just decided. positions: float64[D] as
        measured, None if they are not known."""
        path = loop.command_path(self._horizon) if self._planned else None
        velocities = self._velocities(loop, positions, now) if self._drives else None
        out: list[Send | Goal] = []
        for sink, places, names in self._sinks:
            if sink.kind == "positions":
                out.append(Send(sink.topic, Values(values[places])))
            elif sink.kind == "velocities":
                assert velocities is not None
                out.append(Send(sink.topic, Values(velocities[places])))
            elif sink.kind == "gripper_command":
                out += self._grip(sink, float(values[places[0]]), int(places[0]))
            else:
                assert path is not None
                trajectory = _trajectory(path, places, names, now.stamp_ns)
                if sink.kind == "trajectory":
                    out.append(Send(sink.topic, trajectory))
                else:
                    out.append(Goal(sink.topic, ACTION_TYPES[sink.kind], trajectory))
        return out

    def _velocities(self, loop: ControlLoop, positions: np.ndarray | None, now: Now) -> np.ndarray:
        """float64[D]. A velocity has no place: an arm that follows 95 % of it would be further off with every second,
        and is brought to its path, but not during a stop, and never faster towards a limit than it can be stopped there
        by the next command. Within the limits of velocity and acceleration, and zero once a stop is over."""
        gate, limits, period_s = loop.gate, self._limits, self._robot.period_s
        wanted, elapsed_s = gate.velocity, max(0, now.stamp_ns - self._driven_ns) / NS_PER_S
        if limits is None:
            return wanted
        if elapsed_s > MAX_PERIODS * period_s:
            self._driven, elapsed_s = np.zeros(len(wanted)), period_s  # its driver has stopped, as the gate takes it
        decision = loop.last[1]
        stops = decision is None or decision.verdict is Verdict.STOP
        if not stops and positions is not None and np.all(np.isfinite(positions)):
            most = _CATCH_UP_SHARE * limits.velocity
            wanted = wanted + np.clip(_CATCH_UP_PER_S * gate.behind(positions), -most, most)
            room = np.maximum(limits.upper - positions, 0), np.minimum(limits.lower - positions, 0)
            wanted = np.clip(wanted, room[1] / period_s, room[0] / period_s)
        change = limits.acceleration * elapsed_s
        wanted = np.clip(wanted, self._driven - change, self._driven + change)
        self._driven, self._driven_ns = np.clip(wanted, -limits.velocity, limits.velocity), now.stamp_ns
        return self._driven

    def _grip(self, sink: Output, value: float, place: int) -> Sequence[Send | Goal]:
        joint, last = self._robot.joints[place], self._grips.get(sink.topic)
        step = 0.0 if value in (joint.lower, joint.upper) else _GRIPPER_STEP * (joint.upper - joint.lower)
        if changed := last is None or (value != last and abs(value - last) >= step):
            self._grips[sink.topic] = value
        if not self._has_actions:  # again and again: what listens may have come, or come back, just now
            return (Send(sink.topic + TWIN, Values(np.array([self._grips[sink.topic]]))),)
        goal = Values(np.array([value, sink.max_effort]))
        return (Goal(sink.topic, ACTION_TYPES[sink.kind], goal),) if changed else ()


def _trajectory(path: CommandPath, places: np.ndarray, names: tuple[str, ...], stamp_ns: int) -> Trajectory:
    times = tuple(round(t * NS_PER_S) for t in path.times_s)
    columns = (path.positions[:, places], path.velocities[:, places], path.accelerations[:, places])
    return Trajectory(stamp_ns, names, columns[0], times, "", columns[1], columns[2])
