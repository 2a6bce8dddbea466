"""A scripted expert with privileged knowledge of object poses, for collecting demonstrations.

It reads the phase off the present state (gripper opening, what is between the fingers, where the object is) instead of
counting steps, so a policy cloned from single observations can follow it and can recover. Motions are proportional
with a speed cap and an acceleration limit, which keeps the action chunks smooth. Heights follow *funnels*: the tool
may be low only where it is horizontally aligned, which turns "hover, then descend" into one continuous function.
All speeds are in metres per second, so that the expert runs at any control rate.
"""

from __future__ import annotations

import numpy as np

from sim.tabletop import tasks
from sim.tabletop.environment import TabletopEnvironment
from sim.tabletop.scene import HALF_HEIGHT_M, HALF_WIDTH_M

CRUISE_M_S = 0.42
PUSH_M_S = 0.26
_ACCELERATION_S = 0.15  # from rest to cruise
_TIME_CONSTANT_S = 0.10
_OPEN_M = 0.066
_HELD_M = 2 * HALF_WIDTH_M + 0.006
_CARRY_M = 0.109  # height of a carried object's centre: its bottom passes over the tallest neighbour
_FUNNEL_SLOPE = 2.2
_UPRIGHT_DEADBAND_RAD = 0.05
_BEHIND_M = 0.072  # tool to object centre, before a push
_PUSH_HEIGHT_M = 0.027
_GRASP_ABOVE_M = 0.005  # tool over the object's centre when grasping: the finger tips stay clear of the table


class Expert:
    """`action()` for the present state of `environment`; deterministic, restarted by `reset()` after each reset.

    pace: share of the usual speed; everything takes 1 / pace as long. step_cap: float32[7], the largest clean action
    per step; zero where the expert is not to be disturbed.
    """

    def __init__(self, environment: TabletopEnvironment, pace: float = 1.0):
        self.environment = environment
        period = environment.embodiment.period_s
        self._period = period
        self._pace = pace
        self._gain = 1.0 - float(np.exp(-period * pace / _TIME_CONSTANT_S))
        self._open = environment.embodiment.gripper_open
        cap = CRUISE_M_S * pace * period
        self.step_cap = np.array([cap, cap, cap, 0, 0, 0, 0], np.float32)
        self.reset()

    def reset(self) -> None:
        self._last = np.zeros(3)

    def noise(self, rng: np.random.Generator, level: float = 0.3) -> np.ndarray:
        """Disturbance float32[7] to execute on top of a clean action (DART, Laskey et al. 2017, arXiv:1703.09327).

        Gaussian, `level` of the step cap while cruising and a quarter of that where the arm works slowly: an error
        model of a cloned policy errs in proportion to what it does.
        """
        share = 0.25 + 0.75 * min(1.0, float(np.linalg.norm(self._last)) / float(self.step_cap[0]))
        return (rng.standard_normal(7) * level * share * self.step_cap).astype(np.float32)

    def action(self) -> np.ndarray:
        """float32[A]: (dx, dy, dz, drx, dry, drz, gripper) in the base frame, for one control period."""
        environment = self.environment
        positions = environment.scene.joint_positions()
        tool = environment.kinematics.forward(positions)[0]
        # Judged by what was commanded: a servo's lag in mid-motion is not a tilt to correct.
        rotation = environment.kinematics.state(environment.commanded)[3:6].astype(np.float64)
        plan = self._push if environment.goal.family == "push" else self._carry
        error, gripper, speed = plan(tool, float(positions[-1]))
        move = self._gain * error
        move *= min(1.0, speed * self._pace * self._period / max(1e-9, float(np.linalg.norm(move))))
        change = move - self._last
        limit = CRUISE_M_S * self._pace * self._period * min(1.0, self._period * self._pace / _ACCELERATION_S)
        if np.linalg.norm(move) < np.linalg.norm(self._last):
            limit *= 2.0  # braking harder than starting keeps the tool from overshooting into the table
        move = self._last + change * min(1.0, limit / max(1e-9, float(np.linalg.norm(change))))
        self._last = move
        # Exactly zero while upright: a dimension that never moves costs the tokenizer nothing.
        turn = np.zeros(3) if np.linalg.norm(rotation) < _UPRIGHT_DEADBAND_RAD else -0.3 * rotation
        return np.concatenate([move, turn, [gripper * self._open]]).astype(np.float32)

    # ---- pick_place and stack ----
    def _carry(self, tool: np.ndarray, opening: float) -> tuple[np.ndarray, float, float]:
        scene, goal = self.environment.scene, self.environment.goal
        thing = scene.object_position(goal.object)
        place = tasks.destination(scene, goal)
        grasp = thing + np.array([0.0, 0.0, _GRASP_ABOVE_M])
        offset = tool - grasp
        between = abs(offset[1]) < 0.02 and abs(offset[0]) < 0.018 and abs(offset[2]) < 0.025
        held = between and opening < _HELD_M

        # Stricter about letting go than about leaving it there, so that small disturbances do not start over.
        if tasks.at_destination(scene, goal, slack=0.5 if held else 0.9) and (not held or thing[2] - place[2] < 0.005):
            # Let go, and rise once the fingers are clear.
            clear = np.clip((opening - _HELD_M - 0.006) / 0.012, 0.0, 1.0) if between else 1.0
            return np.array([0.0, 0.0, clear * max(0.0, place[2] + 0.12 - tool[2])]), 1.0, CRUISE_M_S
        if held:
            return self._bring(thing, place), -1.0, CRUISE_M_S
        # Reach for it.
        error = grasp - tool
        aside = float(np.linalg.norm(error[:2]))
        aligned = abs(error[0]) < 0.010 and abs(error[1]) < 0.012 and abs(error[2]) < 0.012
        if aligned or (between and opening < _OPEN_M and abs(offset[2]) < 0.012):
            return error, -1.0, 0.1 * CRUISE_M_S
        top = HALF_HEIGHT_M[scene.movable[goal.object].shape]
        height = np.clip(_FUNNEL_SLOPE * (aside - 0.008), 0.0, top + 0.045)
        if opening < _OPEN_M:
            height = max(height, min(top + 0.045, 0.06))
        error[2] += height
        return _level_first(error, top + 0.03), 1.0, CRUISE_M_S

    def _bring(self, thing: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Error of the tool that lifts, carries and lowers the held object to `place`."""
        error = place - thing
        aside = float(np.linalg.norm(error[:2]))
        error[2] += np.clip(_FUNNEL_SLOPE * (aside - 0.006), 0.0, max(0.02, _CARRY_M - place[2]))
        return _level_first(error, _CARRY_M - 0.022)

    # ---- push ----
    def _push(self, tool: np.ndarray, opening: float) -> tuple[np.ndarray, float, float]:
        scene, goal = self.environment.scene, self.environment.goal
        direction = np.append(np.array(tasks.DIRECTIONS[str(goal.target)]), 0.0)
        thing = scene.object_position(goal.object)
        thing[2] = _PUSH_HEIGHT_M
        offset = tool - thing
        along = float(offset @ direction)
        across = offset - along * direction
        lateral = float(np.linalg.norm(across[:2]))
        low = offset[2] < 0.02
        if low and -0.11 < along < -0.012 and lateral < 0.014 and opening < 0.02:
            error = 0.08 * direction - across
            return error, -1.0, PUSH_M_S
        start = thing - _BEHIND_M * direction
        error = start - tool
        aside = float(np.linalg.norm(error[:2]))
        height = np.clip(_FUNNEL_SLOPE * (aside - 0.010), 0.0, 0.085)
        error[2] += height
        return _level_first(error, 0.07), -1.0, CRUISE_M_S


def _level_first(error: np.ndarray, needed: float) -> np.ndarray:
    """Hold back sideways motion while the tool still has to rise, so that nothing is swept along.

    error: [3], metres. needed: the rise from which on it does not move sideways at all.
    """
    missing = np.clip(error[2] / max(1e-6, needed), 0.0, 1.0)
    out = error.copy()
    out[:2] *= (1.0 - missing) ** 2
    return out
