"""Joint states, of one topic or several: read by name and put together in the robot's order. The one home of it.

Each message of a topic has all of its joints, in any order, perhaps among others. Topics are stamped on their own, and
each use says whose stamps count:

    policy             of each topic the state nearest to the first camera's picture, within the slop
    command            the newest of each, as old as the oldest of them: no topic may fall silent
    convert, replay    each topic interpolated on its own
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ros_nodes.messages import JointState
from ros_nodes.node import JOINT_STATES, STATE_VECTOR, Endpoint
from vla.embodiment import Embodiment
from vla.errors import TransportError, explain


class JointTopic:
    """One topic of joint states: J of a robot's D.

    joints: which, as the robot calls them; names: the same, as its driver does. places: int64[J], where they are in the
    robot's order. label: for messages; it has the topic where the robot has several.
    """

    def __init__(
        self, endpoint: Endpoint, joints: tuple[str, ...], names: tuple[str, ...], places: np.ndarray, label: str
    ):
        self.endpoint, self.joints, self.names = endpoint, joints, names
        self.places, self.label = places, label
        self._said: tuple[str, ...] | None = None  # names of the last message; drivers do not change theirs
        self._order = places

    @property
    def topic(self) -> str:
        return self.endpoint.topic

    def missing(self, message: JointState) -> list[str]:
        """Names that the message does not have."""
        return [name for name in self.names if name not in message.names]

    def positions(self, message: JointState, finite: bool = True) -> np.ndarray:
        """float64[J] in the order of `joints`. TransportError for a message without one of them, and for NaN or
        infinity unless `finite` is false."""
        if message.names != self._said or len(message.positions) != len(message.names):
            missing = self.missing(message)
            if missing or len(message.positions) != len(message.names):
                got = f"missing {missing}" if missing else f"{len(message.positions)} positions"
                raise TransportError(explain(self.label, f"positions of {list(self.names)}", got, "Fix the driver."))
            self._said, self._order = message.names, np.array([message.names.index(name) for name in self.names])
        values = message.positions[self._order]
        if finite and not np.all(np.isfinite(values)):
            bad = [name for name, value in zip(self.names, values) if not np.isfinite(value)]
            raise TransportError(
                explain(self.label, "finite positions", f"NaN or infinity in {bad}", "Fix the driver.")
            )
        return values

    def velocities(self, message: JointState) -> np.ndarray | None:
        """float64[J] of a message whose `positions` were read, None where it has none."""
        return message.velocities[self._order] if len(message.velocities) == len(message.names) else None


def joint_topics(robot: Embodiment, vector: bool = False) -> tuple[JointTopic, ...]:
    """Where the joints of a robot are told. vector: its state vector on /state, by the names of its state."""
    if vector:
        names = robot.state_names
        return (JointTopic(STATE_VECTOR, names, names, np.arange(len(names)), "joint states"),)
    every, found = tuple(joint.name for joint in robot.joints), []
    for source in robot.joint_sources:
        joints = source.joints or every
        label = "joint states" if len(robot.joint_sources) == 1 else f"joint states {source.topic}"
        endpoint = replace(JOINT_STATES, topic=source.topic)
        places = np.array([every.index(name) for name in joints], np.int64)
        found.append(JointTopic(endpoint, joints, source.names or joints, places, label))
    return tuple(found)


def merged(parts: Iterable[tuple[JointTopic, np.ndarray]]) -> np.ndarray:
    """float64[..., D] in the robot's order from all topics, each with its float64[..., J]."""
    topics, rows = zip(*parts)
    out = np.empty((*rows[0].shape[:-1], sum(len(topic.joints) for topic in topics)))
    for topic, row in zip(topics, rows):
        out[..., topic.places] = row
    return out
