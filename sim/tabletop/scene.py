"""The physical scene: table, arm, cameras, movable objects and flat plates, compiled once.

Every movable slot carries both a cube and a cylinder, and every plate slot a disc; a reset chooses which of them exist,
their colours and their poses by writing the model's arrays. Compiling and uploading once is what keeps a reset at
about a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mujoco
import numpy as np

from vla.types import NS_PER_S

TIMESTEP_S = 0.0025
TIMESTEP_NS = round(TIMESTEP_S * NS_PER_S)
MOVABLE_SLOTS = 4
PLATE_SLOTS = 3

SHAPES = ("cube", "cylinder")
HALF_WIDTH_M = 0.022
HALF_HEIGHT_M = {"cube": 0.022, "cylinder": 0.032}
PLATE_RADIUS_M = 0.055
PLATE_HEIGHT_M = 0.004

COLORS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.25, 0.95),
    "yellow": (0.98, 0.88, 0.05),
    "purple": (0.60, 0.15, 0.75),
    "orange": (1.00, 0.50, 0.05),
}
_TABLE_RGBA = (0.93, 0.92, 0.90, 1.0)
_OBJECT_CONTACT = {"friction": (1.0, 0.02, 0.001), "solref": (0.01, 1.0), "solimp": (0.95, 0.99, 0.001, 0.5, 2.0)}


@dataclass(frozen=True)
class Placed:
    """One thing on the table. shape: cube, cylinder or plate. x, y: metres in the base frame. yaw: radians."""

    shape: str
    color: str
    x: float
    y: float
    yaw: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @cached_property
    def xy(self) -> np.ndarray:
        return np.array([self.x, self.y])


def build(robot: Path) -> mujoco.MjModel:
    """Compile the scene around the robot of an embodiment."""
    spec = mujoco.MjSpec.from_file(str(robot))
    spec.option.timestep = TIMESTEP_S
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10.0
    visual = spec.visual
    visual.quality.offsamples = 0
    visual.quality.shadowsize = 0
    visual.headlight.ambient = [0.42, 0.42, 0.42]
    visual.headlight.diffuse = [0.20, 0.20, 0.20]
    visual.headlight.specular = [0.0, 0.0, 0.0]
    visual.map.znear = 0.005
    world = spec.worldbody
    world.add_light(
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        dir=[-0.35, 0.25, -1.0],
        diffuse=[0.40, 0.40, 0.40],
        specular=[0.0, 0.0, 0.0],
    )
    world.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[0.75, 0.75, 0.02],
        pos=[0.45, 0.0, -0.02],
        rgba=_TABLE_RGBA,
        friction=[0.8, 0.02, 0.001],
    )
    # From the front and high above, facing the arm: +y is to the right, away from the base is towards the viewer.
    world.add_camera(name="agentview", pos=[1.06, 0.0, 0.86], xyaxes=[0, 1, 0, -0.81, 0, 0.586], fovy=29.0)
    for index in range(PLATE_SLOTS):
        body = world.add_body(name=f"plate{index}", mocap=True, pos=[0, 0, -1])
        body.add_geom(
            name=f"plate{index}",
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            size=[PLATE_RADIUS_M, PLATE_HEIGHT_M / 2, 0],
            friction=[1.0, 0.02, 0.001],
        )
    for index in range(MOVABLE_SLOTS):
        body = world.add_body(name=f"object{index}", pos=[0, 0, -1 - index])
        body.add_freejoint(name=f"object{index}")
        body.mass, body.inertia = 0.08, [3e-5, 3e-5, 3e-5]
        body.ipos, body.explicitinertial = [0, 0, 0], True
        for shape, kind in (("cube", mujoco.mjtGeom.mjGEOM_BOX), ("cylinder", mujoco.mjtGeom.mjGEOM_CYLINDER)):
            half = HALF_HEIGHT_M[shape]
            size = [HALF_WIDTH_M, HALF_WIDTH_M, half] if shape == "cube" else [HALF_WIDTH_M, half, 0]
            body.add_geom(name=f"object{index}_{shape}", type=kind, size=size, condim=4, **_OBJECT_CONTACT)
    return spec.compile()


class Scene:
    """The compiled model, its data, and what lies on the table right now."""

    def __init__(self, robot: Path, joint_names: tuple[str, ...]):
        self.model = build(robot)
        self.data = mujoco.MjData(self.model)
        self.movable: tuple[Placed, ...] = ()
        self.plates: tuple[Placed, ...] = ()
        model = self.model
        arm = joint_names[:-1]
        self._arm_qpos = np.array([model.joint(name).qposadr[0] for name in arm])
        self._arm_dof = np.array([model.joint(name).dofadr[0] for name in arm])
        self._finger_qpos = np.array([model.joint(f"finger_{side}").qposadr[0] for side in ("left", "right")])
        self._finger_dof = np.array([model.joint(f"finger_{side}").dofadr[0] for side in ("left", "right")])
        self._actuators = np.array([model.actuator(name).id for name in joint_names])
        self._object_qpos = np.array([model.joint(f"object{i}").qposadr[0] for i in range(MOVABLE_SLOTS)])
        self._object_dof = np.array([model.joint(f"object{i}").dofadr[0] for i in range(MOVABLE_SLOTS)])
        self._fingers = {model.body(f"finger_{side}").id for side in ("left", "right")}
        self._object_body = [model.body(f"object{i}").id for i in range(MOVABLE_SLOTS)]

    # ---- layout ----
    def arrange(self, movable: tuple[Placed, ...], plates: tuple[Placed, ...], joints: np.ndarray) -> None:
        """Put exactly these things on the table, the arm at `joints` [D] and at rest; slots left over are hidden."""
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)
        self.movable, self.plates = movable, plates
        for index in range(PLATE_SLOTS):
            geom, mocap = model.geom(f"plate{index}"), model.body(f"plate{index}").mocapid[0]
            placed = plates[index] if index < len(plates) else None
            self._show(geom.id, placed)
            data.mocap_pos[mocap] = (0, 0, -1) if placed is None else (placed.x, placed.y, PLATE_HEIGHT_M / 2)
        for index in range(MOVABLE_SLOTS):
            placed = movable[index] if index < len(movable) else None
            for shape in SHAPES:
                geom = model.geom(f"object{index}_{shape}").id
                self._show(geom, placed if placed is not None and placed.shape == shape else None)
            # A hidden object floats where nothing is; without weight it stays there.
            model.body_gravcomp[self._object_body[index]] = 1.0 if placed is None else 0.0
            start = self._object_qpos[index]
            if placed is None:
                data.qpos[start : start + 3] = (0, 0, -1 - index)
            else:
                data.qpos[start : start + 3] = (placed.x, placed.y, HALF_HEIGHT_M[placed.shape])
                data.qpos[start + 3 : start + 7] = (np.cos(placed.yaw / 2), 0, 0, np.sin(placed.yaw / 2))
        data.qpos[self._arm_qpos] = joints[:-1]
        data.qpos[self._finger_qpos] = joints[-1] / 2
        data.ctrl[self._actuators] = joints
        mujoco.mj_forward(model, data)

    def _show(self, geom: int, placed: Placed | None) -> None:
        self.model.geom_rgba[geom] = (0, 0, 0, 0) if placed is None else (*COLORS[placed.color], 1.0)
        self.model.geom_contype[geom] = 0 if placed is None else 1
        self.model.geom_conaffinity[geom] = 0 if placed is None else 3

    # ---- reading ----
    def joint_positions(self) -> np.ndarray:
        """float64[D] in command order; the gripper is one opening in metres."""
        qpos = self.data.qpos
        return np.append(qpos[self._arm_qpos], qpos[self._finger_qpos].sum())

    def joint_velocities(self) -> np.ndarray:
        qvel = self.data.qvel
        return np.append(qvel[self._arm_dof], qvel[self._finger_dof].sum())

    def object_position(self, index: int) -> np.ndarray:
        """Centre [3] of movable `index`, metres in the base frame."""
        return self.data.qpos[self._object_qpos[index] : self._object_qpos[index] + 3].copy()

    def object_speed(self, index: int) -> float:
        start = self._object_dof[index]
        return float(np.linalg.norm(self.data.qvel[start : start + 3]))

    def upright(self, index: int) -> bool:
        """Whether a movable object stands on a face it may stand on: a cylinder on its base, a cube on any side."""
        vertical = np.abs(self.data.xmat[self._object_body[index]][6:9])  # of the object's own three axes
        return bool((vertical.max() if self.movable[index].shape == "cube" else vertical[2]) > 0.95)

    def touched(self, index: int) -> bool:
        """Whether a finger touches movable `index`."""
        body, geoms, bodies = self._object_body[index], self.data.contact.geom, self.model.geom_bodyid
        for first, second in bodies[geoms]:
            if (first == body and second in self._fingers) or (second == body and first in self._fingers):
                return True
        return False

    # ---- acting ----
    def advance(self, targets: np.ndarray, steps: int) -> None:
        """Run `steps` physics steps; targets: float64[steps, D], actuator set-points of each."""
        for row in targets[:steps]:
            self.data.ctrl[self._actuators] = row
            mujoco.mj_step(self.model, self.data)
