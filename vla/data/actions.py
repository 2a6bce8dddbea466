"""Commands as they were sent, in the action space of an embodiment: what a policy would have had to say.

    joint_position   the commanded positions themselves, one action per joint in their order, as the control loop has it
    osc_delta        the commands themselves
    ee_delta         joint positions were sent: the motion of the tool between two of them, and what the gripper was
                     told. It needs the kinematic model, and inverts `Kinematics.solve`: what the cartesian limits or
                     the gate had changed comes back as it was executed, not as it was asked for.

Twist, pose and gripper-width commands of other controllers are not supported: there is no embodiment that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from vla.embodiment import Embodiment
from vla.errors import ConfigError, explain

# A gripper that moves at this share of the most that one period allows is on its way to the end of its travel.
FULL_SPEED_SHARE = 0.7
Forward = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sent:
    """One command. sent_ns: when. times_ns: int64[P] and positions: float64[P, D], the way; one point is a step."""

    sent_ns: int
    times_ns: np.ndarray
    positions: np.ndarray


class Commands:
    """A stream of commands, sorted by `sent_ns`; each is in force from the moment it was sent until the next one."""

    def __init__(self, sent: Sequence[Sent]) -> None:
        self._sent = sorted(sent, key=lambda command: command.sent_ns)
        self.stamps = np.array([command.sent_ns for command in self._sent], np.int64)

    def __len__(self) -> int:
        return len(self._sent)

    def since(self, start_ns: int) -> Commands:
        """Only those sent from start_ns on."""
        return Commands([command for command in self._sent if command.sent_ns >= start_ns])

    def before(self, times: np.ndarray) -> np.ndarray:
        """float64[T, D]: what was in force up to each time (what is sent at that very time is not yet). Not to be
        asked for times before the first command."""
        if not len(times):
            return np.empty((0, self._sent[0].positions.shape[1] if self._sent else 0))
        places = np.searchsorted(self.stamps, times, side="left") - 1
        return np.stack([self._at(self._sent[place], int(time)) for place, time in zip(places, times)])

    @staticmethod
    def _at(command: Sent, time_ns: int) -> np.ndarray:
        if len(command.times_ns) == 1:
            return command.positions[0]
        # Differences first: nanoseconds since the epoch do not fit the 53 bits of a float.
        at, points = float(time_ns - command.sent_ns), (command.times_ns - command.sent_ns).astype(np.float64)
        return np.array([np.interp(at, points, column) for column in command.positions.T])


class CommandSet:
    """Streams that each command some of the joints: (places in the command order, stream). width: D, of all joints."""

    def __init__(self, streams: Sequence[tuple[np.ndarray, Commands]], width: int) -> None:
        self.streams, self.width = list(streams), width

    @property
    def commanded(self) -> np.ndarray:
        """bool[D]: joints that a stream commands."""
        out = np.zeros(self.width, bool)
        for places, _ in self.streams:
            out[places] = True
        return out

    def since(self, start_ns: int) -> CommandSet:
        return CommandSet([(places, commands.since(start_ns)) for places, commands in self.streams], self.width)

    @property
    def complete_ns(self) -> int | None:
        """When the last of the streams sent its first command; None when one never did."""
        if any(not len(commands) for _, commands in self.streams):
            return None
        return max((int(commands.stamps[0]) for _, commands in self.streams), default=0)

    def before(self, times: np.ndarray) -> np.ndarray:
        """float64[T, D], see Commands.before; NaN for joints that no stream commands."""
        out = np.full((len(times), self.width), np.nan)
        for places, commands in self.streams:
            out[:, places] = commands.before(times)
        return out


def actions_of(robot: Embodiment, before: np.ndarray, after: np.ndarray, forward: Forward | None = None) -> np.ndarray:
    """float32[T, A] of what was commanded before and at the end of each period, both float64[T, D] in command order.

    forward: joint positions [D] to tool position [3] and rotation [3, 3], for ee_delta. ConfigError when the action
    space cannot be told from commands of this embodiment.
    """
    if robot.action_space != "ee_delta":
        if robot.action_dim != len(robot.command_names):
            raise ConfigError(
                explain(f"{robot.name}.action_names", f"{len(robot.command_names)}, one per command",
                        robot.action_dim, "Name an action for every commanded joint, in their order.")
            )  # fmt: skip
        return after.astype(np.float32)
    gripper = robot.joints[-1] if robot.joints[-1].name == "gripper" else None
    if forward is None or robot.action_dim != 6 + (gripper is not None) or robot.rotation_format != "axis_angle":
        raise ConfigError(
            explain(f"{robot.name}.action_space", "ee_delta of six axis-angle deltas and a gripper, with a model",
                    f"{robot.action_dim} actions, {robot.rotation_format}", "See configs/embodiment/tabletop.yaml.")
        )  # fmt: skip
    out = np.zeros((len(after), robot.action_dim))
    for row, (start, end) in enumerate(zip(before, after)):
        position, rotation = forward(start)
        there, turned = forward(end)
        out[row, :3] = there - position
        out[row, 3:6] = Rotation.from_matrix(turned @ rotation.T).as_rotvec()
    if gripper is not None:
        moved = after[:, -1] - before[:, -1]
        level = 2 * (after[:, -1] - gripper.lower) / (gripper.upper - gripper.lower) - 1
        fast = np.abs(moved) >= FULL_SPEED_SHARE * gripper.max_velocity * robot.period_s
        out[:, 6] = robot.gripper_open * np.clip(np.where(fast, np.sign(moved), level), -1, 1)
    return out.astype(np.float32)
