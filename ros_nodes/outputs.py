"""What the command node sends, as the driver on the other side takes it: one message per output of the embodiment.

    positions                std_msgs/Float64MultiArray on TOPIC: the driver holds the last one
    velocities               the same; only with a stated driver timeout, because a velocity goes on
    trajectory               trajectory_msgs/JointTrajectory: the command, what is planned next, and the stop
    follow_joint_trajectory  the same as goal of control_msgs/action/FollowJointTrajectory
    gripper_command          goal of control_msgs/action/GripperCommand, sent when it changes; without action clients
                             the goal's position on its twin, NAME/commands, with every command

A trajectory carries its own stop: whatever happens to this process, the controller ends at rest. It reaches at most
`horizon_s` beyond the command, less than any watchdog here, and its last velocities are zero, as Jazzy's joint
trajectory controller asks for. It starts at its stamp, and its first point lies one period later, where the arm shall
be when the next trajectory takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ros_nodes.messages import Trajectory, Values
from ros_nodes.node import Endpoint, Goal, Now, Send
from vla.embodiment import Embodiment, Output
from vla.runtime.loop import CommandPath, ControlLoop
from vla.types import NS_PER_S

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
_GRIPPER_STEP = 0.02  # of its range: a new goal for less would only restart the driver's motion


class Outputs:
    """The outputs of one robot. horizon_s: how far a trajectory goes on as planned after the command, then it stops.
    actions: the shell has action clients; without them grippers are told on topics.

    twins: these topics.
    """

    def __init__(self, robot: Embodiment, horizon_s: float = 0.1, actions: bool = True) -> None:
        self._robot, self._has_actions = robot, actions
        grippers = [sink.topic + TWIN for sink in robot.sinks if sink.kind == "gripper_command"]
        self.twins: tuple[str, ...] = () if actions else tuple(grippers)
        self._horizon = int(horizon_s * robot.rate_hz + 1e-9)
        self._sinks: list[tuple[Output, np.ndarray, tuple[str, ...]]] = []
        for sink in robot.sinks:
            names = sink.joints or robot.command_names
            places = np.array([robot.command_names.index(name) for name in names])
            self._sinks.append((sink, places, sink.names or names))
        self._planned = any("trajectory" in sink.kind for sink in robot.sinks)
        self._grips: dict[str, float] = {}

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        topics = [Endpoint(s.topic, _TOPIC_TYPES[s.kind]) for s, _, _ in self._sinks if s.kind in _TOPIC_TYPES]
        return (*topics, *(Endpoint(topic, Values.type_name) for topic in self.twins))

    @property
    def actions(self) -> tuple[tuple[str, str], ...]:
        """(name, type) of the action servers that goals go to."""
        goals = [s for s, _, _ in self._sinks if s.kind in ACTION_TYPES and s.topic + TWIN not in self.twins]
        return tuple((s.topic, ACTION_TYPES[s.kind]) for s in goals)

    @property
    def arms(self) -> frozenset[str]:
        """Names of the actions that move the arm: it stops where they are not followed."""
        return frozenset(sink.topic for sink, _, _ in self._sinks if sink.kind == "follow_joint_trajectory")

    def of(self, values: np.ndarray, loop: ControlLoop, now: Now) -> list[Send | Goal]:
        """What to send for the command `values` float64[D] that the loop has just decided."""
        path = loop.command_path(self._horizon) if self._planned else None
        out: list[Send | Goal] = []
        for sink, places, names in self._sinks:
            if sink.kind == "positions":
                out.append(Send(sink.topic, Values(values[places])))
            elif sink.kind == "velocities":
                out.append(Send(sink.topic, Values(loop.gate.velocity[places])))
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
