"""A three-joint arm made of numbers, for tests of the runtime: perfect servo, simulated 20 Hz clock."""

from __future__ import annotations

import numpy as np

from vla.embodiment import Camera, Embodiment, Joint
from vla.types import Command, ControlMode, Observation

PERIOD_NS = 50_000_000
JOINTS = (
    Joint("joint1", -1.0, 1.0, 1.0, 4.0),
    Joint("joint2", -2.0, 0.5, 2.0, 10.0),
    Joint("joint3", 0.0, 3.0, 0.5, 1.0),
    Joint("gripper", 0.0, 0.08, 0.2, 2.0),
)


def arm(action_space: str = "ee_delta", **changes) -> Embodiment:
    """Actions are (x, y, z metres, gripper) for ee_delta, one value per joint for joint_position."""
    if action_space == "ee_delta":
        names, units = ("dx", "dy", "dz", "gripper"), ("m", "m", "m", "1")
    elif action_space == "osc_delta":
        names, units = ("x", "y", "z", "gripper"), ("1", "1", "1", "1")
    else:
        names, units = tuple(j.name for j in JOINTS), ("rad", "rad", "rad", "m")
    values = {
        "name": "numbers",
        "rate_hz": 20.0,
        "action_space": action_space,
        "action_names": names,
        "action_units": units,
        "state_names": tuple(j.name for j in JOINTS),
        "rotation_format": "none",
        "gripper_open": 1,
        "control_mode": ControlMode.OSC_DELTA if action_space == "osc_delta" else ControlMode.JOINT_POSITION,
        "cameras": (Camera("agentview", 8, 8),),
        "joints": () if action_space == "osc_delta" else JOINTS,
        **changes,
    }
    return Embodiment(**values)


class DeltaSolver:
    """Inverse kinematics of an arm whose joint values are its tool coordinates."""

    def solve(self, action: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return np.array([*(reference[:3] + action[:3]), 0.04 * (1 + action[3])])


class NumberArm:
    """An Environment: joints follow commands exactly; success is joint1 beyond 0.3."""

    max_steps = 40
    instruction = "move joint 1 to the left"

    def __init__(self, embodiment: Embodiment, start=(0.0, 0.0, 1.0, 0.04)) -> None:
        self.embodiment, self._start = embodiment, np.array(start)
        self.commands: list[np.ndarray] = []

    def reset(self, *, seed=None, options=None):
        self._q, self._v, self._now = self._start.copy(), np.zeros(4), 0
        self._task = (options or {}).get("task", "left")
        self.commands = []
        return self._observe()

    def step(self, command: Command):
        self.commands.append(command.values.copy())
        if self.embodiment.control_mode is ControlMode.JOINT_POSITION:
            self._v = (command.values - self._q) / (PERIOD_NS * 1e-9)
            self._q = command.values.copy()
        else:
            self._q = self._q + 0.05 * command.values
        self._now += PERIOD_NS
        observation, info = self._observe()
        return observation, 0.0, info["success"], False, info

    def joint_state(self):
        return tuple(j.name for j in JOINTS), self._q.copy(), self._v.copy()

    def _observe(self):
        images = {"agentview": np.zeros((8, 8, 3), np.uint8)}
        observation = Observation(images, self._q.astype(np.float32), self.instruction, self._now)
        return observation, {
            "success": bool(self._q[0] > 0.3), "stamp_ns": self._now, "task": self._task, "family": "numbers",
            "moved": "joint1",
        }  # fmt: skip
