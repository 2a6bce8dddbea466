"""Where a parallel gripper can take an object from above, from samples of the collision geometry.

Everything is metres in the world frame. The hand points down; its closing axis lies in the horizontal plane at `yaw`
from the world's y axis. A candidate is kept when the fingers close on something, and neither fingers nor palm touch
the object or its neighbours on the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mujoco
import numpy as np

SPACING_M = 0.006  # of samples on primitive geoms
MESH_SAMPLES = 1500

# The Panda hand as robosuite models it, fingers open: what has to be free, measured from the grip point.
HALF_OPENING_M = 0.038
FINGER_THICKNESS_M = 0.014
FINGER_HALF_WIDTH_M = 0.011
FINGER_LENGTH_M = 0.034  # from the finger tip up to the palm
PALM_HALF_LENGTH_M = 0.100  # along the closing axis
PALM_HALF_WIDTH_M = 0.030
MAX_WIDTH_M = 0.070  # of what is taken between the fingers
OBSTACLE_MARGIN_M = 0.002
PAD_HEIGHT_M = 0.016
PAD_HALF_WIDTH_M = 0.008
DEPTHS_M = (0.012, 0.018, 0.024, 0.030)  # of the finger tips below the top of the object
YAWS = np.linspace(-np.pi / 2, np.pi / 2, 16, endpoint=False)
STEP_M = 0.006


@dataclass(frozen=True)
class Grasp:
    """tip: float64[3], where the middle of the finger tips goes. yaw: rad. width: metres between the fingers."""

    tip: np.ndarray
    yaw: float
    width: float
    cost: float


class CollisionPoints:
    """Samples of the collidable geoms of bodies; sampled once in each geom's frame, posed on demand."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData):
        self._model, self._data = model, data
        self._samples: dict[int, np.ndarray] = {}

    def subtree(self, body: int) -> set[int]:
        """The body and everything attached below it."""
        found = {body}
        for child in range(body + 1, self._model.nbody):  # parents have smaller numbers than their children
            if int(self._model.body_parentid[child]) in found:
                found.add(child)
        return found

    def of(self, bodies: Iterable[int]) -> np.ndarray:
        """float64[N, 3] in the world."""
        chosen = set(bodies)
        return self._posed(g for g in range(self._model.ngeom) if int(self._model.geom_bodyid[g]) in chosen)

    def around(self, center: np.ndarray, radius: float, without: Iterable[int]) -> np.ndarray:
        """float64[N, 3] of movable and fixed things near `center`, without some bodies, the robot and the ground."""
        skipped = set(without)
        for body in range(self._model.nbody):
            name = self._model.body(body).name
            if body == 0 or name.startswith(("robot0", "gripper0", "mount0")) or "table" in name or "floor" in name:
                skipped.add(body)
        points = self._posed(g for g in range(self._model.ngeom) if int(self._model.geom_bodyid[g]) not in skipped)
        return points[np.linalg.norm(points[:, :2] - center[:2], axis=1) < radius]

    def _posed(self, geoms: Iterable[int]) -> np.ndarray:
        posed = [np.zeros((0, 3))]
        for geom in geoms:
            if self._model.geom_contype[geom] or self._model.geom_conaffinity[geom]:
                rotation = self._data.geom_xmat[geom].reshape(3, 3)
                posed.append(self._local(geom) @ rotation.T + self._data.geom_xpos[geom])
        return np.concatenate(posed)

    def _local(self, geom: int) -> np.ndarray:
        if geom not in self._samples:
            self._samples[geom] = _sample(self._model, geom)
        return self._samples[geom]


def _sample(model: mujoco.MjModel, geom: int) -> np.ndarray:
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        axes = np.meshgrid(*[_line(half) for half in size], indexing="ij")
        points = np.stack(axes, axis=-1).reshape(-1, 3)
        surface = np.any(np.abs(np.abs(points) - size) < 1e-9, axis=1)
        return points[surface]
    if kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * size[0]
        heights = _line(size[1])
        rings = [(ring, z) for z in heights] + [(0.5 * ring, z) for z in (heights[0], heights[-1])]
        return np.concatenate([np.column_stack([xy, np.full(len(xy), z)]) for xy, z in rings])
    if kind in (mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_ELLIPSOID):
        directions = np.random.default_rng(0).normal(size=(200, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return directions * (size if kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID else size[0])
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        faces = model.mesh_face[model.mesh_faceadr[mesh] :][: model.mesh_facenum[mesh]]
        points = np.concatenate([vertices, vertices[faces].mean(axis=1)])
        if len(points) > MESH_SAMPLES:
            points = np.random.default_rng(0).choice(points, MESH_SAMPLES, replace=False)
        return np.asarray(points, np.float64)
    return np.zeros((0, 3))  # planes and height fields are ground


def _line(half: float) -> np.ndarray:
    return np.linspace(-half, half, int(np.clip(2 * half / SPACING_M, 2, 40)))


def find_grasps(points: np.ndarray, obstacles: np.ndarray) -> list[Grasp]:
    """All free grasps of an object, cheapest first: near its middle, narrow, well centred, deep.

    points: float64[N, 3] on the object. obstacles: float64[M, 3] on what stands around it.
    """
    center = (points.max(0) + points.min(0)) / 2
    top, bottom = points[:, 2].max(), points[:, 2].min()
    reach = np.ptp(points[:, :2], axis=0).max() / 2 + 0.01
    offsets = np.arange(-0.09, 0.0901, STEP_M)
    offsets = offsets[np.abs(offsets) < reach]
    tips = sorted({max(top - depth, bottom + 0.003) for depth in DEPTHS_M}, reverse=True)
    found: list[Grasp] = []
    for yaw in YAWS:
        closing = np.array([-np.sin(yaw), np.cos(yaw)])
        across = np.array([np.cos(yaw), np.sin(yaw)])
        own, other = _hand_frame(points, center, closing, across), _hand_frame(obstacles, center, closing, across)
        for tip in tips:
            for shift in offsets:
                for along, width, slack in _closings(own, other, tip, shift, offsets):
                    cost = np.hypot(along, shift) + 0.6 * width + 3.0 * slack + 0.012 * abs(yaw)
                    cost -= 0.8 * min(top - tip, 0.04)
                    place = center[:2] + along * closing + shift * across
                    found.append(Grasp(np.append(place, tip), float(yaw), width, float(cost)))
    return sorted(found, key=lambda grasp: grasp.cost)


def _hand_frame(points: np.ndarray, center: np.ndarray, closing: np.ndarray, across: np.ndarray) -> np.ndarray:
    """float64[N, 3]: along the closing axis, across it, height in the world."""
    flat = points[:, :2] - center[:2]
    return np.column_stack([flat @ closing, flat @ across, points[:, 2]])


def _closings(
    own: np.ndarray, other: np.ndarray, tip: float, shift: float, offsets: np.ndarray
) -> list[tuple[float, float, float]]:
    """(offset along the closing axis, width between the fingers, off-centre distance) of each free grasp."""
    aside = np.abs(own[:, 1] - shift)
    pads = own[(aside < PAD_HALF_WIDTH_M) & (own[:, 2] > tip) & (own[:, 2] < tip + PAD_HEIGHT_M), 0]
    if len(pads) < 3:
        return []
    away = pads[None, :] - offsets[:, None]  # [offsets, pads]
    between = np.abs(away) < HALF_OPENING_M
    low = np.where(between, away, np.inf).min(axis=1)
    high = np.where(between, away, -np.inf).max(axis=1)
    free = (between.sum(axis=1) >= 3) & (high - low <= MAX_WIDTH_M)
    outer = HALF_OPENING_M + FINGER_THICKNESS_M
    body = own[(aside < FINGER_HALF_WIDTH_M) & _beside_fingers(own, tip), 0]
    distance = np.abs(body[None, :] - offsets[:, None])
    free &= ~np.any((distance > HALF_OPENING_M - 0.001) & (distance < outer), axis=1)
    other_aside = np.abs(other[:, 1] - shift)
    near = other[(other_aside < FINGER_HALF_WIDTH_M + OBSTACLE_MARGIN_M) & _beside_fingers(other, tip), 0]
    free &= ~_within(near, offsets, outer + OBSTACLE_MARGIN_M)
    palm = tip + FINGER_LENGTH_M
    free &= ~_within(own[(own[:, 2] > palm) & (aside < PALM_HALF_WIDTH_M), 0], offsets, PALM_HALF_LENGTH_M)
    above = other[(other[:, 2] > palm) & (other_aside < PALM_HALF_WIDTH_M + 0.005), 0]
    free &= ~_within(above, offsets, PALM_HALF_LENGTH_M + 0.005)
    return [
        (float(offsets[i]), float(high[i] - low[i]), float(abs(low[i] + high[i]) / 2)) for i in np.flatnonzero(free)
    ]


def _beside_fingers(points: np.ndarray, tip: float) -> np.ndarray:
    return (points[:, 2] > tip - 0.002) & (points[:, 2] < tip + FINGER_LENGTH_M)


def _within(positions: np.ndarray, offsets: np.ndarray, half: float) -> np.ndarray:
    """bool[offsets]: whether any position lies within `half` of the offset."""
    return np.any(np.abs(positions[None, :] - offsets[:, None]) < half, axis=1)
