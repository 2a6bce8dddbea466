"""From end-effector actions to joint positions and back: forward kinematics and differential inverse kinematics.

The only module of `vla` that knows mujoco and mink; it imports without torch. Every caller of the command chain
(in-process evaluation, the ROS 2 command node, collection) goes through `Kinematics.solve`.

Actions of the space `ee_delta` are (dx, dy, dz, drx, dry, drz, gripper): a translation in metres and an axis-angle
rotation in radians, both in the base frame, applied to the tool pose of the *last commanded* configuration (so that a
servo's lag or gravity sag does not leak into the next target), and a gripper value in [-1, 1].

The inverse is the quadratic programme of mink (damped Gauss-Newton on SE(3), joint limits as constraints), iterated
until the pose error is below a tolerance; the redundant joint is settled by a weak pull towards the home posture.
"""

from __future__ import annotations

from pathlib import Path

import mink
import mujoco
import numpy as np

from vla.embodiment import Embodiment
from vla.errors import ConfigError, explain, nearest
from vla.resources import robot_model

_MAX_ITERATIONS = 4
_POSITION_TOLERANCE_M = 2e-5
_ROTATION_TOLERANCE_RAD = 1e-4
_STEP_RAD = 0.35  # largest joint change of one iteration: outside it the linear model means nothing
# The gripper closes at this share of its velocity limit, so that the gate has nothing to reshape.
_GRIPPER_SPEED_SHARE = 0.8


class Kinematics:
    """Kinematics of one embodiment with a robot model, MJCF or URDF. Holds no state between calls.

    The tool is a site, or else a body (in a URDF: a link) of the name `tool_site`. Raises ConfigError when the model
    does not load, or lacks the tool or a commanded joint.
    """

    def __init__(self, embodiment: Embodiment):
        if embodiment.action_space == "osc_delta":
            raise ConfigError(
                explain(
                    f"{embodiment.name}.action_space",
                    "ee_delta or joint_position",
                    "osc_delta",
                    "Operational-space deltas go to the environment as they are; no kinematics are needed.",
                )
            )
        self.embodiment = embodiment
        self._model = _load(robot_model(embodiment))
        self._has_gripper = len(embodiment.joints) - 1 in embodiment.gripper_joints
        arm = embodiment.joints[:-1] if self._has_gripper else embodiment.joints
        self._address = np.array([self._qpos_address(joint.name) for joint in arm])
        self._count = len(arm)
        self._lower = np.array([joint.lower for joint in embodiment.joints])
        self._upper = np.array([joint.upper for joint in embodiment.joints])
        self._max_step = np.array([joint.max_velocity for joint in embodiment.joints]) * embodiment.period_s
        self._tool, kind = self._find_tool(embodiment.tool_site)
        self._configuration = mink.Configuration(self._model)
        self._tool_task = mink.FrameTask(embodiment.tool_site, kind, position_cost=1.0, orientation_cost=0.3)
        # Weak enough to bend the tool pose by less than the tolerance, strong enough to settle the elbow.
        self._posture_task = mink.PostureTask(self._model, cost=2e-3)
        self._limits = [mink.ConfigurationLimit(self._model)]
        self._home = self._full(np.asarray(embodiment.home, np.float64))
        self._posture_task.set_target(self._home)

    # ---- forward ----
    def forward(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tool pose in the base frame: position[3] in metres, rotation[3, 3]. q: [J] or [D], gripper ignored."""
        data = self._configuration.data
        data.qpos[:] = self._full(q)
        mujoco.mj_kinematics(self._model, data)
        place, turn = (data.site_xpos, data.site_xmat) if self._is_site else (data.xpos, data.xmat)
        return place[self._tool].copy(), turn[self._tool].reshape(3, 3).copy()

    def state(self, q: np.ndarray) -> np.ndarray:
        """Proprioception float32[S] in the order of `Embodiment.state_names`, from commanded-joint positions [D]."""
        position, rotation = self.forward(q)
        rotvec = np.asarray(mink.SO3.from_matrix(rotation).log())
        values = dict(zip(("ee_x", "ee_y", "ee_z"), position))
        values.update(zip(("ee_rx", "ee_ry", "ee_rz"), rotvec))
        values.update(zip((joint.name for joint in self.embodiment.joints), np.asarray(q)))
        try:
            return np.array([values[name] for name in self.embodiment.state_names], np.float32)
        except KeyError as error:
            raise ConfigError(
                f"{self.embodiment.name}.state_names: {error.args[0]!r} cannot be computed from joint positions. "
                + nearest(str(error.args[0]), values)
            ) from error

    # ---- inverse ----
    def solve(self, action: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Joint positions float64[D] that `action` [A] asks for, starting from the commanded positions `reference` [D].

        Never NaN, always inside the joint position limits, and never further from `reference` than the joint velocity
        limits allow in one period: near a singularity or out of reach the arm goes as far along as it can.
        Raises ConfigError when a size does not fit or a value is not finite (the gate's caller brakes on it).
        """
        return self._solve(action, reference, hurry=False)

    def path(self, actions: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Joint positions float64[N, D] that actions [N, A] ask for one after the other, at whatever speed."""
        rows = []
        for action in actions:
            reference = self._solve(action, reference, hurry=True)
            rows.append(reference)
        return np.array(rows)

    def _solve(self, action: np.ndarray, reference: np.ndarray, hurry: bool) -> np.ndarray:
        reference = self._checked("reference", reference, len(self.embodiment.joints))
        action = self._checked("action", action, self.embodiment.action_dim)
        if self.embodiment.action_space == "joint_position":
            return np.clip(action, self._lower, self._upper)
        target = np.clip(reference, self._lower, self._upper)
        position, rotation = self.forward(target)
        if np.any(action[:6]):
            goal = mink.SE3.from_rotation_and_translation(
                mink.SO3.exp(action[3:6]) @ mink.SO3.from_matrix(rotation), position + action[:3]
            )
            target[: self._count] = self._inverse(goal, target)
        if self._has_gripper:
            joint = self.embodiment.joints[-1]
            closed_to_open = 0.5 * (1.0 + np.clip(action[6] * self.embodiment.gripper_open, -1.0, 1.0))
            wanted = joint.lower + closed_to_open * (joint.upper - joint.lower)
            reach = _GRIPPER_SPEED_SHARE * self._max_step[-1]
            target[-1] = np.clip(wanted, target[-1] - reach, target[-1] + reach)
        step = target - reference
        ratio = np.max(np.abs(step[: self._count]) / self._max_step[: self._count])
        if ratio > 1.0 and not hurry:
            step[: self._count] /= ratio
        return np.clip(reference + step, self._lower, self._upper)

    def locate(self, position: np.ndarray, reference: np.ndarray, iterations: int = 60) -> np.ndarray:
        """Joint positions [D] with the tool at `position` [3] in the home orientation; no speed limit (for resets)."""
        _, rotation = self.forward(np.asarray(self.embodiment.home))
        goal = mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(rotation), np.asarray(position, np.float64))
        out = np.array(reference, np.float64)
        out[: self._count] = self._inverse(goal, out, iterations)
        return out

    def _inverse(self, goal: mink.SE3, start: np.ndarray, iterations: int = _MAX_ITERATIONS) -> np.ndarray:
        configuration, task = self._configuration, self._tool_task
        configuration.update(self._full(start))
        task.set_target(goal)
        for _ in range(iterations):
            error = task.compute_error(configuration)
            if (
                np.linalg.norm(error[:3]) < _POSITION_TOLERANCE_M
                and np.linalg.norm(error[3:]) < _ROTATION_TOLERANCE_RAD
            ):
                break
            try:
                velocity = mink.solve_ik(
                    configuration, (task, self._posture_task), 1.0, "daqp", damping=1e-7, limits=self._limits
                )
            except mink.MinkError:
                break
            if not np.all(np.isfinite(velocity)):
                break
            velocity *= min(1.0, _STEP_RAD / max(1e-12, float(np.max(np.abs(velocity)))))
            configuration.integrate_inplace(velocity, 1.0)
        return configuration.q[self._address].copy()

    # ---- helpers ----
    def _full(self, q: np.ndarray) -> np.ndarray:
        full = np.zeros(self._model.nq)
        full[self._address] = np.asarray(q, np.float64)[: self._count]
        return full

    def _find_tool(self, name: str) -> tuple[int, str]:
        for kind, known in (("site", mujoco.mjtObj.mjOBJ_SITE), ("body", mujoco.mjtObj.mjOBJ_BODY)):
            index = mujoco.mj_name2id(self._model, known, name)
            if index >= 0:
                self._is_site = kind == "site"
                return int(index), kind
        sites = [self._model.site(i).name for i in range(self._model.nsite)]
        bodies = [self._model.body(i).name for i in range(1, self._model.nbody)]
        raise ConfigError(
            f"{self.embodiment.name}.tool_site: no site or body {name!r}. {nearest(name, [*sites, *bodies])}"
        )

    def _qpos_address(self, name: str) -> int:
        index = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_JOINT, name)
        if index < 0:
            known = [self._model.joint(i).name for i in range(self._model.njnt)]
            raise ConfigError(f"{self.embodiment.name}.joints: no joint {name!r} in the model. {nearest(name, known)}")
        return int(self._model.jnt_qposadr[index])

    def _checked(self, key: str, values: np.ndarray, count: int) -> np.ndarray:
        out = np.array(values, np.float64)
        if out.shape != (count,):
            raise ConfigError(explain(key, f"[{count}] values", f"shape {out.shape}", "Pass one value per name."))
        if not np.all(np.isfinite(out)):
            raise ConfigError(explain(key, "finite values", "NaN or infinity", "Brake; do not solve for it."))
        return out


def _load(path: Path) -> mujoco.MjModel:
    """The model of an MJCF or URDF file. Of a URDF only the kinematic tree is kept: meshes are neither looked for nor
    needed, and links on fixed joints stay, because a tool usually is one."""
    try:
        spec = mujoco.MjSpec.from_file(str(path))
        if path.suffix == ".urdf":
            for part in (*spec.geoms, *spec.meshes):
                spec.delete(part)
            spec.compiler.fusestatic = False
            spec.compiler.boundmass = spec.compiler.boundinertia = 1e-6  # links without inertia; nothing is simulated
            return spec.compile()
        return mujoco.MjModel.from_xml_path(str(path))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            explain("robot_model", "a model that MuJoCo loads", f"{path}: {error}", "Correct it.")
        ) from error
