"""A chunk that is too fast is slowed down as a whole: the same path, its time axis stretched by one factor. numpy only.

Actions are knots of a natural cubic spline over their index; a stretched chunk samples it at steps of 1 / factor. The
factor is the smallest for which the joint path, sampled so, keeps the limits of velocity, acceleration and jerk. What
lies between the arm and the first action is no part of the chunk's shape: only its speed counts, the rest is for the
Gate to blend. Uniform scaling divides velocity by the factor, acceleration by its square, jerk by its cube.
"""

from __future__ import annotations

import math

import numpy as np

from vla.embodiment import Embodiment
from vla.runtime.limits import JointLimits

_ROUNDS = 8  # of correcting the factor: sampled differences are not exactly those of the scaled spline
_TOLERANCE = 1e-6  # float32 actions at exactly a limit are within it


def factor_for(path: np.ndarray, embodiment: Embodiment, limits: JointLimits) -> float:
    """By how much the time axis of `path` must be stretched; 1.0 when it keeps all limits as it is.

    path: float64[N + 1, D], the last command and then the joint positions of the N actions, one period apart. Grippers
    are left out: the Gate moves them apart from the arm. Above embodiment.max_time_scale the value only says so. It is
    a whole number of periods for the N actions, so that the last one ends with a whole step.
    """
    arm = np.setdiff1d(np.arange(path.shape[1]), embodiment.gripper_joints)
    count = rows = len(path) - 1
    for _ in range(_ROUNDS):
        ratio = _excess(_sampled_path(path[:, arm], rows), rows / count, arm, limits, embodiment.period_s)
        if ratio <= 1.0 + _TOLERANCE or rows > 4 * embodiment.max_time_scale * count:
            break
        rows = max(rows + 1, math.ceil(rows * ratio - _TOLERANCE))
    return rows / count


def stretched(actions: np.ndarray, command: np.ndarray | None, embodiment: Embodiment, factor: float) -> np.ndarray:
    """float32[M, A], M = factor * N (a whole number): the path of `actions` float[N, A], one row per period.

    Deltas are added up, sampled and differenced (rotations of one action are small); absolute joint positions are
    sampled between `command` float[A] and the actions. Grippers hold the value of the action that is being executed.
    """
    actions = np.asarray(actions, np.float64)
    count = math.ceil(factor * len(actions) - 1e-9)
    steps = np.arange(1, count + 1) * (len(actions) / count)
    rows = actions[np.minimum(np.ceil(steps - 1e-9).astype(int), len(actions)) - 1]
    moving = np.setdiff1d(np.arange(actions.shape[1]), embodiment.grippers)
    if embodiment.action_space == "joint_position":
        assert command is not None
        rows[:, moving] = _sampled_path(np.vstack([command, actions])[:, moving], count)[1:]
    else:
        travelled = np.vstack([np.zeros(len(moving)), np.cumsum(actions[:, moving], axis=0)])
        rows[:, moving] = np.diff(_spline(travelled, np.concatenate([[0.0], steps])), axis=0)
    return rows.astype(np.float32)


def tool_factor(actions: np.ndarray, embodiment: Embodiment) -> float:
    """Factor that the tool speed limits ask for, from end-effector deltas float[N, A]."""
    factor = 1.0
    for unit, limit in (("m", embodiment.max_tool_speed_m_s), ("rad", embodiment.max_tool_speed_rad_s)):
        part = np.array([u == unit for u in embodiment.action_units])
        longest = float(np.max(np.linalg.norm(np.asarray(actions, np.float64)[:, part], axis=1), initial=0.0))
        factor = max(factor, longest / (limit * embodiment.period_s))
    return factor if factor > 1.0 + _TOLERANCE else 1.0


def _sampled_path(path: np.ndarray, rows: int) -> np.ndarray:
    """float64[rows + 1, D], even steps along knots float64[N + 1, D]: straight to the first action, then a spline."""
    steps = np.arange(rows + 1) * ((len(path) - 1) / rows)
    entry = path[0] + np.minimum(steps, 1.0)[:, None] * (path[1] - path[0])
    return np.where((steps < 1.0)[:, None], entry, _spline(path[1:], np.maximum(steps - 1.0, 0.0)))


def _excess(rows: np.ndarray, factor: float, arm: np.ndarray, limits: JointLimits, period_s: float) -> float:
    """Largest factor still missing in `rows` float64[M + 1, D], which are one period apart."""
    velocity = np.diff(rows, axis=0) / period_s
    worst = float(np.max(np.abs(velocity) / limits.velocity[arm], initial=0.0))
    inside = velocity[math.ceil(factor - 1e-9) :]  # from the first action on
    change = np.diff(inside, axis=0) / period_s
    worst = max(worst, float(np.max(np.abs(change) / limits.acceleration[arm], initial=0.0)) ** 0.5)
    if limits.jerk is not None:
        jerk = np.diff(change, axis=0) / period_s
        worst = max(worst, float(np.max(np.abs(jerk) / limits.jerk[arm], initial=0.0)) ** (1 / 3))
    return worst


def _spline(knots: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Natural cubic spline through knots float64[N, D] at 0, 1, ..., N - 1, sampled at float64[M]."""
    count = len(knots)
    bend = np.zeros_like(knots)  # second derivatives, 0 at both ends
    if count > 2:
        system = 4.0 * np.eye(count - 2) + np.eye(count - 2, k=1) + np.eye(count - 2, k=-1)
        bend[1:-1] = np.linalg.solve(system, 6.0 * (knots[2:] - 2.0 * knots[1:-1] + knots[:-2]))
    low = np.clip(np.floor(at).astype(int), 0, max(count - 2, 0))
    high = np.minimum(low + 1, count - 1)
    s = (at - low)[:, None]
    r = 1.0 - s
    return r * knots[low] + s * knots[high] + ((r**3 - r) * bend[low] + (s**3 - s) * bend[high]) / 6.0
