"""Core types. numpy only.

Axes, used in every shape of this project:
B batch, V views, H W pixels, S state, L text, P prefix, D width, N heads, T horizon, A action dims, K action tokens.

Time is nanoseconds of one monotonic clock per process graph; ROS stamps are converted in ros_nodes/messages.py only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from vla.errors import ObservationError, explain

MAX_INSTRUCTION_CHARS = 1000
NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Frame:
    """One instant of sensors.

    images: {camera: uint8[H, W, 3]}, RGB, row 0 at the top. May be a lazy mapping that renders on access.
    state: float32[S], proprioception only, in the order of `Embodiment.state_names`; never object poses.
    stamp_ns: when the sensors were read.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    stamp_ns: int


@dataclass(frozen=True)
class Observation:
    """What a policy sees: the newest frame, an instruction, and older frames if the bundle asked for them.

    history: older frames, newest first; empty when the policy declares no past offsets.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str
    stamp_ns: int
    history: tuple[Frame, ...] = ()

    def check(self) -> Observation:
        """Return self, or raise ObservationError for a non-finite state or an unusable instruction."""
        if not np.all(np.isfinite(self.state)):
            bad = np.flatnonzero(~np.isfinite(np.asarray(self.state))).tolist()
            raise ObservationError(
                explain("state", "finite values", f"NaN or infinity at index {bad}", "Check the joint state source.")
            )
        check_instruction(self.instruction)
        return self


def check_instruction(text: str) -> str:
    """Return the stripped instruction, or raise ObservationError when it is empty or too long."""
    stripped = text.strip()
    if not stripped:
        raise ObservationError(
            explain(
                "instruction",
                "a sentence",
                "empty text",
                "Say what the arm should do, for example on /vla/instruction.",
            )
        )
    if len(stripped) > MAX_INSTRUCTION_CHARS:
        raise ObservationError(
            explain(
                "instruction",
                f"at most {MAX_INSTRUCTION_CHARS} characters",
                f"{len(stripped)} characters",
                "Shorten it to one sentence.",
            )
        )
    return stripped


@dataclass(frozen=True)
class ActionChunk:
    """T consecutive actions in physical units (never normalised), each with a due time.

    actions: float32[T, A] in the order of `Embodiment.action_names`.
    start_ns: due time of actions[0]. period_s: spacing of due times.
    """

    actions: np.ndarray
    start_ns: int
    period_s: float

    def __post_init__(self) -> None:
        if self.actions.ndim != 2 or len(self.actions) == 0:
            raise ObservationError(
                explain(
                    "actions", "float32[T, A] with T >= 1", f"shape {self.actions.shape}", "Return one row per step."
                )
            )

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def period_ns(self) -> int:
        return round(self.period_s * NS_PER_S)

    def due_ns(self, index: int) -> int:
        """Due time of action `index` (may lie past the end)."""
        return self.start_ns + index * self.period_ns

    @property
    def end_ns(self) -> int:
        """Time at which the last action has run its period."""
        return self.due_ns(len(self))


class ControlMode(str, Enum):
    """What the values of a Command mean."""

    JOINT_POSITION = "joint_position"  # one value per `Embodiment.command_names`, rad (or m for a sliding gripper)
    OSC_DELTA = "osc_delta"  # LIBERO/robosuite operational-space deltas in [-1, 1], taken as they are


@dataclass(frozen=True)
class Command:
    """The last thing before an actuator.

    values: float64[D] in the order of `Embodiment.command_names`. stamp_ns: when it was decided.
    """

    mode: ControlMode
    values: np.ndarray
    stamp_ns: int = 0
    note: str = field(default="", compare=False)
