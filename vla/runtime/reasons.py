"""What the Gate decides, and the words for why. Standard library only."""

from __future__ import annotations

from enum import IntEnum


class Verdict(IntEnum):
    PASS = 0
    RESHAPE = 1
    STOP = 2


class Reason(IntEnum):
    """Why. Codes are stored in traces: append, never renumber."""

    NONE = 0
    VELOCITY = 1
    ACCELERATION = 2
    POSITION = 3
    WORKSPACE = 4
    SLEW = 5
    TOOL_SPEED = 6
    JERK = 7
    TIME_SCALED = 8
    WAITING = 10
    NO_ACTION = 11
    ACTION_INVALID = 12
    ACTION_STALE = 13
    ACTION_EARLY = 14
    JOINT_STATE_INVALID = 15
    JOINT_STATE_STALE = 16
    HEARTBEAT = 17
    TRACKING = 18
    CLOCK = 19
    KINEMATICS = 20
    OPERATOR = 21
    CHUNK_TOO_FAST = 22
    EMERGENCY_STOP = 23
    DEADMAN = 24
    CAMERA = 25
    SECOND_POLICY = 26
    JOINT_STATE_JUMP = 27
    DRIVER = 28

    @property
    def text(self) -> str:
        """One line for reports and /diagnostics."""
        return _TEXT[self]


_TEXT = {
    Reason.NONE: "",
    Reason.VELOCITY: "slowed down to the joint velocity limit",
    Reason.ACCELERATION: "slowed down to the joint acceleration limit",
    Reason.POSITION: "held inside the joint position limits",
    Reason.WORKSPACE: "held inside the workspace box",
    Reason.SLEW: "change per tick limited",
    Reason.TOOL_SPEED: "slowed down to the tool speed limit",
    Reason.JERK: "slowed down to the joint jerk limit",
    Reason.TIME_SCALED: "the chunk was too fast and is slowed down as a whole",
    Reason.WAITING: "waiting for the first chunk",
    Reason.NO_ACTION: "no action is due",
    Reason.ACTION_INVALID: "the action has NaN, infinity or a wrong length",
    Reason.ACTION_STALE: "the action's due time has passed",
    Reason.ACTION_EARLY: "the action is due in the future",
    Reason.JOINT_STATE_INVALID: "joint state is missing, has NaN or a wrong length",
    Reason.JOINT_STATE_STALE: "joint state is too old, or from the future",
    Reason.HEARTBEAT: "the policy's heartbeat is silent",
    Reason.TRACKING: "the arm is far from where it was commanded",
    Reason.CLOCK: "the clock was set, or jumped back",
    Reason.KINEMATICS: "inverse kinematics or tool position failed",
    Reason.OPERATOR: "stopped by the operator",
    Reason.CHUNK_TOO_FAST: "the chunk is too fast, even slowed down as far as allowed",
    Reason.EMERGENCY_STOP: "emergency stop",
    Reason.DEADMAN: "the deadman switch is released or silent",
    Reason.CAMERA: "a camera is silent or its picture is frozen",
    Reason.SECOND_POLICY: "two policies publish chunks",
    Reason.JOINT_STATE_JUMP: "the joint states jumped",
    Reason.DRIVER: "the driver does not follow: it refused or aborted a goal, or is not there",
}
