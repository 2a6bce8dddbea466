"""Action reuse: may what is left of the last chunk stand, instead of a forward pass? (FlashVLA, arXiv 2505.21200.)

The published trigger looks at the last two steps: reuse when the angle between their actions is small and most of the
visual tokens that were important then were important again. (Its equation 6 prints "larger than" for the angle, its
text says "smaller"; the text is meant.) Taken literally it never lets go: a reused action equals the one before, so the
angle is 0, no forward pass ran, so the overlap is 1, and the arm follows one chunk blindly. Here the memory holds real
forwards only, reuses in a row are capped, and a gripper that moves, or an arm that stands, always asks the model: the
rule cannot see contact, and those are the moments around it. numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vla.embodiment import Embodiment
from vla.errors import ConfigError, explain

STILL = 1e-6  # a mean action shorter than this, m or rad per step, has no direction


@dataclass(frozen=True)
class Forward:
    """What one real forward leaves behind. motion: float64[M], where its chunk moves, without the gripper.

    gripper: bool[T, G], which side of the middle each gripper action is on. tokens: int64[k], important visual tokens,
    each once.
    """

    motion: np.ndarray
    gripper: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, actions: np.ndarray, tokens: np.ndarray, embodiment: Embodiment) -> Forward:
        """actions: float32[T, A] of a chunk, physical units.

        The paper's policy gives one action per step; what stands for it here is the mean action of the chunk, its
        direction of travel: the first action of a chunk alone is mostly noise. Absolute goals have no direction, so
        for joint positions it is the way from the first to the last.
        """
        grippers, absolute = list(embodiment.grippers), embodiment.action_space == "joint_position"
        moves = np.delete(np.asarray(actions, np.float64), grippers, axis=1)
        motion = (moves[-1] - moves[0]) / max(1, len(moves) - 1) if absolute else moves.mean(axis=0)
        return cls(motion, embodiment.gripper_sides(actions), np.asarray(tokens))


def angle_deg(before: Forward, last: Forward) -> float | None:
    """Between the two motions, 0..180; None when one of them stands."""
    a, b = np.linalg.norm(before.motion), np.linalg.norm(last.motion)
    if min(a, b) < STILL:
        return None
    return math.degrees(math.acos(np.clip(before.motion @ last.motion / (a * b), -1.0, 1.0)))


def overlap(before: Forward, last: Forward) -> float:
    """Share of the last forward's important tokens that were important before, 0..1; 0 when it had none."""
    return len(np.intersect1d(before.tokens, last.tokens)) / max(1, len(last.tokens))


def gripper_moves(before: Forward, last: Forward, now: int = 0, until: int | None = None) -> bool:
    """Whether a gripper changes sides anywhere in the two chunks or between them; with `until`, only from the action
    before number `now` of the last chunk up to number `until`, not included."""
    both = np.concatenate((before.gripper, last.gripper))
    sides = both if until is None else last.gripper[max(0, now - 1) : until]
    return bool((sides != sides[:1]).any())


@dataclass(frozen=True)
class ReuseRule:
    """angle_deg: reuse below this angle. overlap: and above this share of common tokens. The paper's thresholds could
    not be verified, so measure yours; sets that have nothing to do with each other already overlap by the share of
    tokens that is kept. most: reuses in a row. least: actions that must be left behind the committed ones, and always
    one more than those: one action runs before the next request, and as many as now while it is answered. ahead: no
    gripper may change sides in so many actions behind the committed ones, 0 for anywhere in the last two chunks. A
    policy that is asked every few actions needs no more than those until its next answer, or it is hardly ever reused:
    a chunk that reaches further nearly always has a grasp in it. `most` reuses in a row are each asked anew.
    """

    angle_deg: float = 10.0
    overlap: float = 0.7
    most: int = 1
    least: int = 4
    ahead: int = 0

    def __post_init__(self) -> None:
        for key, good, expected in (
            ("angle_deg", 0 < self.angle_deg <= 180, "above 0, up to 180"),
            ("overlap", 0 <= self.overlap < 1, "0 or more, below 1"),
            ("most", self.most >= 1, "at least 1"),
            ("least", self.least >= 1, "at least 1"),
            ("ahead", self.ahead >= 0, "0 or more"),
        ):
            if not good:
                raise ConfigError(explain(f"reuse.{key}", expected, getattr(self, key), "1 reuse in a row is safest."))

    def similar(self, before: Forward, last: Forward, now: int = 0, committed: int = 0) -> str:
        """The published trigger with the gripper gate: the reason for a reuse, "" for none. now: number of the last
        chunk's action that is due next."""
        if gripper_moves(before, last, now, now + committed + self.ahead if self.ahead else None):
            return ""
        angle, common = angle_deg(before, last), overlap(before, last)
        if angle is None or not (angle < self.angle_deg and common > self.overlap):
            return ""
        return f"angle {angle:.1f} deg below {self.angle_deg:g}, overlap {common:.2f} above {self.overlap:g}"


class ReuseMemory:
    """The last two real forwards of one robot, and the reuses since."""

    def __init__(self, rule: ReuseRule):
        self.rule = rule
        self._forwards: list[Forward] = []
        self.reuses = 0

    def reason(self, left: int, committed: int = 0) -> str:
        """Why the last chunk may stand now, "" when the model has to run. left: its actions that were not executed.
        committed: those of them that run while an inference does."""
        enough = left - committed >= max(self.rule.least, committed + 1)
        if len(self._forwards) < 2 or self.reuses >= self.rule.most or not enough:
            return ""
        return self.rule.similar(*self._forwards, len(self._forwards[-1].gripper) - left, committed)

    def reused(self) -> None:
        self.reuses += 1

    def ran(self, forward: Forward) -> None:
        """A real forward: the only thing that refreshes the memory."""
        self._forwards = [*self._forwards[-1:], forward]
        self.reuses = 0
