"""A scripted expert for LIBERO's pick-and-place tasks: the goal of a task becomes skills, skills become actions.

    expert = LiberoExpert(environment)
    environment.reset(seed=7)
    expert.reset()
    command = Command(ControlMode.OSC_DELTA, expert.action())

It reads simulator state, which no policy may. Goals made of `In` and `On` are worked on: LIBERO-Object, where it
succeeds on all of the initial states 20-29; LIBERO-Spatial, where some scenes take longer than the step limit (26 of
30 on states 20-22); and those tasks of the other two suites that open, close and turn nothing. For other goals
`reset` raises SimulationError with the predicate's name.
"""

from __future__ import annotations

from collections.abc import Generator

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from sim.libero.grasp import CollisionPoints, Grasp, find_grasps
from sim.robosuite_base import RobosuiteArm
from vla.errors import SimulationError, explain

OPEN, CLOSE = -1.0, 1.0
METRES_PER_UNIT, RADIANS_PER_UNIT = 0.05, 0.5  # of robosuite's OSC_POSE actions
POSITION_GAIN, ROTATION_GAIN = 2.0, 1.5  # the controller reaches about half of a commanded delta within one period
STALL_STEPS, STALL_PROGRESS_M = 12, 0.001
GRASP_TRIES = 4
SOLVED_PREDICATES = ("in", "on")

# A skill yields actions float32[7], and returns whether it reached its end.
Skill = Generator[np.ndarray, None, bool]


class LiberoExpert:
    """Closed loop: every action is computed from where the hand is now, so that perturbations are corrected."""

    def __init__(self, environment: RobosuiteArm):
        self._environment = environment
        self._skill: Skill | None = None
        self.failure = ""  # why the expert gave up, "" while it has not

    def reset(self) -> None:
        """Read the goal of the scene as it stands. Raises SimulationError for a goal that has no skill."""
        scene = self._environment.scene
        self._scene = scene
        self._model: mujoco.MjModel = scene.sim.model._model
        self._data: mujoco.MjData = scene.sim.data._data
        self._goals: list[list[str]] = [list(goal) for goal in scene.parsed_problem["goal_state"]]
        for goal in self._goals:
            self._refuse_unsolved(goal)
        self._points = CollisionPoints(self._model, self._data)
        self._site = scene.robots[0].eef_site_id
        self._tip_m = self._tip_below_site()
        self._gripper, self.failure = OPEN, ""
        self._skill = self._solve()

    def action(self) -> np.ndarray:
        """float32[7]: the action for the scene as it is now. After the last skill: hold still, hand open."""
        if self._skill is None:
            raise SimulationError(explain("expert", "reset() after the environment's", "no reset yet", "Call reset()."))
        action = next(self._skill, None)
        return self._units(np.zeros(3), np.zeros(3), OPEN) if action is None else action

    # ---- goals ----
    def _refuse_unsolved(self, goal: list[str]) -> None:
        remedy = "Choose a task of libero_object or libero_spatial."
        if goal[0] not in SOLVED_PREDICATES:
            raise SimulationError(
                explain(
                    f"expert for {self._environment.task}",
                    f"goals of {list(SOLVED_PREDICATES)}",
                    f"({' '.join(goal)}): there is no skill for {goal[0]!r}",
                    remedy,
                )
            )
        target = self._scene.object_states_dict[goal[2]]
        if getattr(self._scene.object_sites_dict.get(goal[2]), "joints", None) and not target.is_open():
            raise SimulationError(
                explain(f"expert for {self._environment.task}", "an open target", f"{goal[2]} is closed", remedy)
            )

    def _solve(self) -> Skill:
        for _ in range(2):  # what fell out of place gets a second chance
            for goal in self._goals:
                if not self._scene._eval_predicate(goal) and not (yield from self._put(goal[1], goal[2])):
                    return False
            yield from self._wait(10, OPEN)
        return True

    def _put(self, item: str, target: str) -> Skill:
        if not (yield from self._pick(item)):
            self.failure = self.failure or f"{item} slipped {GRASP_TRIES} times"
            return False
        if target not in self._scene.object_sites_dict:
            xy = self._data.xpos[self._body(target)][:2].copy()
            on = self._object_points(target)
            near = on[np.linalg.norm(on[:, :2] - xy, axis=1) < 0.03]
            support = float((near if len(near) else on)[:, 2].max())
            return (yield from self._release_at(item, xy, support, carry=float(on[:, 2].max()) + 0.04))
        site = self._model.site(target).id
        center = self._data.site_xpos[site].copy()
        half = np.abs(self._data.site_xmat[site].reshape(3, 3)) @ self._model.site_size[site]
        if "contain_region" in target or "heating_region" in target:  # something with a rim
            rim = float(center[2] + half[2])
            floor = rim - 0.045 if "basket" in target else float(center[2] - half[2]) + 0.02
            return (yield from self._release_at(item, center[:2], floor, carry=rim + 0.03, tolerance=0.010))
        floor = float(center[2] - half[2]) if half[2] > 0.01 else float(center[2])
        return (yield from self._release_at(item, center[:2], floor, carry=float(center[2]) + 0.06))

    # ---- pick and place ----
    def _pick(self, item: str) -> Skill:
        tried: list[Grasp] = []
        for _ in range(GRASP_TRIES):
            grasp = self._choose_grasp(item, tried)
            if grasp is None:
                self.failure = f"no free grasp of {item}"
                return False
            tried.append(grasp)
            rotation = _hand_rotation(grasp.yaw)
            place = grasp.tip + _up(self._tip_m)
            before = self._lowest(item)
            if np.linalg.norm(self._position[:2] - place[:2]) > 0.03:
                above = np.append(place[:2], max(place[2] + 0.10, self._position[2]))
                yield from self._move(above, rotation, OPEN, tolerance=0.02, angle=0.15)
            yield from self._move(place + _up(0.04), rotation, OPEN, tolerance=0.008, angle=0.05)
            yield from self._move(place, rotation, OPEN, tolerance=0.005, speed=0.5, limit=40)
            yield from self._wait(8, CLOSE)
            yield from self._move(place + _up(0.10), self._rotation, CLOSE, tolerance=0.015, speed=0.8)
            if self._lowest(item) > before + 0.04:
                return True
            yield from self._move(self._position + _up(0.08), self._rotation, OPEN, tolerance=0.02)
            yield from self._wait(2, OPEN)
        return False

    def _release_at(self, item: str, xy: np.ndarray, floor: float, *, carry: float, tolerance: float = 0.006) -> Skill:
        """Carry with the item's lowest point at height `carry`, lower it to `floor`, let go, back off. Heights in
        metres in the world; `xy` is where the item's own origin goes."""
        rotation = self._rotation
        height = self._position[2] + max(0.0, carry - self._lowest(item))
        yield from self._move(np.append(self._position[:2], height), rotation, CLOSE, tolerance=0.03)
        yield from self._move(
            np.append(xy - self._held_offset(item), height), rotation, CLOSE, tolerance=0.012, limit=120
        )
        for _ in range(2):  # the item sags and turns in the hand while it moves: aim twice
            lowered = self._position[2] + floor + 0.006 - self._lowest(item)
            goal = np.append(xy - self._held_offset(item), lowered)
            yield from self._move(goal, rotation, CLOSE, tolerance=tolerance, speed=0.5, stall=8)
        yield from self._wait(6, OPEN)
        yield from self._move(self._position + _up(0.10), rotation, OPEN, tolerance=0.02)
        yield from self._wait(5, OPEN)
        return True

    def _choose_grasp(self, item: str, tried: list[Grasp]) -> Grasp | None:
        own = self._points.subtree(self._body(item))
        points = self._points.of(own)
        center = (points.max(0) + points.min(0)) / 2
        grasps = find_grasps(points, self._points.around(center, 0.2, without=own))

        def cost(grasp: Grasp) -> float:
            repeats = sum(
                np.linalg.norm(other.tip[:2] - grasp.tip[:2]) < 0.02 and abs(other.yaw - grasp.yaw) < 0.3
                for other in tried
            )
            return grasp.cost + 0.05 * repeats

        return min(grasps, key=cost, default=None)

    # ---- motion ----
    def _move(
        self,
        position: np.ndarray,
        rotation: np.ndarray,
        gripper: float,
        *,
        tolerance: float,
        angle: float = 0.06,
        speed: float = 1.0,
        limit: int = 80,
        stall: int = STALL_STEPS,
    ) -> Skill:
        """Straight to a pose. position: float64[3] of the grip point. tolerance: metres; angle: rad; speed: part of
        full speed. Returns False when it stalls or takes longer than `limit` steps."""
        best, waited = np.inf, 0
        for _ in range(limit):
            shift, turn = position - self._position, _rotation_vector(rotation @ self._rotation.T)
            if np.linalg.norm(shift) < tolerance and np.linalg.norm(turn) < angle:
                return True
            distance = float(np.linalg.norm(shift) + 0.1 * np.linalg.norm(turn))
            best, waited = (distance, 0) if distance < best - STALL_PROGRESS_M else (best, waited + 1)
            if waited > stall:
                return False
            step = POSITION_GAIN * shift
            longest, allowed = np.abs(step).max(), METRES_PER_UNIT * speed
            yield self._units(step * min(1.0, allowed / longest) if longest else step, ROTATION_GAIN * turn, gripper)
        return False

    def _wait(self, steps: int, gripper: float) -> Skill:
        position, rotation = self._position, self._rotation
        for _ in range(steps):
            turn = _rotation_vector(rotation @ self._rotation.T)
            yield self._units(POSITION_GAIN * (position - self._position), turn, gripper)
        return True

    def _units(self, shift: np.ndarray, turn: np.ndarray, gripper: float) -> np.ndarray:
        motion = np.concatenate([shift / METRES_PER_UNIT, turn / RADIANS_PER_UNIT])
        return np.append(np.clip(motion, -1.0, 1.0), gripper).astype(np.float32)

    # ---- simulator state ----
    @property
    def _position(self) -> np.ndarray:
        return np.array(self._data.site_xpos[self._site])

    @property
    def _rotation(self) -> np.ndarray:
        return np.array(self._data.site_xmat[self._site]).reshape(3, 3)

    def _body(self, name: str) -> int:
        return int(self._scene.obj_body_id[name])

    def _object_points(self, name: str) -> np.ndarray:
        return self._points.of(self._points.subtree(self._body(name)))

    def _lowest(self, name: str) -> float:
        return float(self._object_points(name)[:, 2].min())

    def _held_offset(self, item: str) -> np.ndarray:
        return np.asarray(self._data.xpos[self._body(item)] - self._position)[:2]

    def _tip_below_site(self) -> float:
        """Metres from the grip point to the finger tips along the hand."""
        fingers = {
            int(self._model.geom_bodyid[geom])
            for geom in range(self._model.ngeom)
            if self._model.geom(geom).name.startswith("gripper0_finger")
        }
        return float(((self._points.of(fingers) - self._position) @ self._rotation)[:, 2].max())


def _hand_rotation(yaw: float) -> np.ndarray:
    """float64[3, 3]: the hand straight down, its closing axis (x of the grip site) at `yaw` from the world's y axis."""
    down = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    return np.asarray(Rotation.from_euler("z", yaw).as_matrix() @ down)


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    return np.asarray(Rotation.from_matrix(rotation).as_rotvec())


def _up(metres: float) -> np.ndarray:
    return np.array([0.0, 0.0, metres])
