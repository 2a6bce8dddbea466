"""What LIBERO and robosuite environments share: one Panda under operational-space control behind the one contract.

robosuite renders every camera inside its step, draws from numpy's global generator and recompiles the scene at each
reset. Here cameras render only when somebody looks, the global generator is seeded around a reset and put back after
it, and the compiled scene stays: an episode depends on (task, seed, options) and on nothing that happened before.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gymnasium
import mujoco
import numpy as np

from sim.environment import LazyImages
from sim.fast_render import thin_visual_meshes
from sim.tabletop.rendering import OffscreenRenderer
from vla.embodiment import Embodiment
from vla.errors import ConfigError, SimulationError, explain, nearest
from vla.resources import load_embodiment
from vla.types import NS_PER_S, Command, ControlMode, Observation, check_instruction

SETTLE_STEPS = 10  # objects start a little above their support; the public evaluations wait as long
CAMERA_NAMES = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
COLLISION_GROUP = 0  # robosuite puts collision geoms into group 0, visual ones into group 1


class RobosuiteArm(gymnasium.Env[Any, Any], ABC):
    """A single-arm robosuite scene that fulfils `sim.environment.Environment`.

    image_size: pixels of both cameras, square. Images are turned by 180 degrees from OpenGL's order, as the public
    LIBERO data are: upright, but mirrored left to right against the true view.
    fast_render: thin purely visual meshes and switch anti-aliasing off: six times faster in software, PSNR 31 dB
    against the full picture, physics unchanged (see sim/fast_render.py).
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium declares it so)
    max_steps: int

    def __init__(self, task: int | str, *, image_size: int = 128, fast_render: bool = False):
        if not 16 <= image_size <= 1024:
            raise ConfigError(explain("image_size", "16 to 1024 pixels", image_size, "128 and 256 are usual."))
        shipped = load_embodiment("libero")
        self.embodiment: Embodiment = replace(
            shipped, cameras=tuple(replace(camera, height=image_size, width=image_size) for camera in shipped.cameras)
        )
        self._image_size, self._fast_render = image_size, fast_render
        self._robosuite: Any = None
        self._renderer: OffscreenRenderer | None = None
        self._images: LazyImages | None = None
        self._steps: int | None = None  # None until the first reset: stepping is refused
        self._success = False
        self._override = ""
        size = self.embodiment.action_dim
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (size,), np.float64)
        image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space: gymnasium.Space[Any] = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict({name: image for name in self.embodiment.camera_names}),
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (self.embodiment.state_dim,), np.float32),
            }
        )
        self._task = self._task_index(task)

    # ---- what a family of scenes adds ----
    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """Task names; a task is chosen by name or by index."""

    @property
    @abstractmethod
    def family(self) -> str: ...

    @abstractmethod
    def _build(self, task: int) -> Any:
        """A robosuite environment of one task: no renderer, soft resets, never done by itself."""

    @abstractmethod
    def _task_instruction(self, task: int) -> str: ...

    def _place(self, seed: int, options: dict[str, Any]) -> dict[str, Any]:
        """After robosuite's own reset: put objects elsewhere if the family wants to; returns additions to `info`."""
        return {}

    _option_names: tuple[str, ...] = ("task", "instruction")

    # ---- the contract ----
    @property
    def instruction(self) -> str:
        return self._override or self._task_instruction(self._task)

    @property
    def task(self) -> str:
        return self.tasks[self._task]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """options: {"task": name or index, "instruction": text} and what the family adds."""
        super().reset(seed=seed)
        options = dict(options or {})
        for key in options:
            if key not in self._option_names:
                raise ConfigError(f"reset option {key!r} is unknown. {nearest(key, self._option_names)}")
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._override = check_instruction(options["instruction"]) if options.get("instruction") else ""
        self._use_task(self._task_index(options.get("task", self._task)))
        self._reset_scene(seed)
        additions = self._place(seed, options)
        settle = np.zeros(self.embodiment.action_dim)
        settle[-1] = self.embodiment.gripper_open
        for _ in range(SETTLE_STEPS):
            self._robosuite.step(settle)
        self._steps, self._success = 0, bool(self._robosuite._check_success())
        return self._observe(), {**self._info(), "seed": seed, **additions}

    def step(self, command: Command) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Hold `command` for one control period. Terminates on success, truncates after `max_steps`."""
        if self._steps is None:
            raise SimulationError(_unreset("step"))
        values = np.asarray(command.values, np.float64)
        if command.mode is not ControlMode.OSC_DELTA or values.shape != (self.embodiment.action_dim,):
            raise SimulationError(
                explain(
                    "command",
                    f"{ControlMode.OSC_DELTA.value} with {self.embodiment.action_dim} values",
                    f"{command.mode.value} with shape {values.shape}",
                    "Use the embodiment of this environment.",
                )
            )
        if not np.all(np.isfinite(values)):
            raise SimulationError(
                explain("command", "finite values", values.tolist(), "The gate should have stopped it.")
            )
        self._robosuite.step(np.clip(values, -1.0, 1.0))
        self._steps += 1
        self._success = bool(self._robosuite._check_success())
        truncated = self._steps >= self.max_steps and not self._success
        return self._observe(), float(self._success), self._success, truncated, self._info()

    def joint_state(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Names, positions float64[9], velocities float64[9]: seven joints (rad) and two fingers (m)."""
        robot, data = self._robot, self._robosuite.sim.data
        where = [*robot._ref_joint_pos_indexes, *robot._ref_gripper_joint_pos_indexes]
        rates = [*robot._ref_joint_vel_indexes, *robot._ref_gripper_joint_vel_indexes]
        names = tuple(joint.name for joint in self.embodiment.joints)
        return names, np.array(data.qpos[where], np.float64), np.array(data.qvel[rates], np.float64)

    def close(self) -> None:
        """Free the scene and the GL context. Idempotent."""
        if self._images is not None:
            self._images.expire()
        self._close_renderer()
        if self._robosuite is not None:
            self._robosuite.close()
            self._robosuite = None
        self._steps = None

    # ---- for the scripted expert ----
    @property
    def scene(self) -> Any:
        """The robosuite environment: simulator state, for scripted experts only, never for a policy."""
        if self._steps is None:
            raise SimulationError(_unreset("scene"))
        return self._robosuite

    # ---- inside ----
    @property
    def _robot(self) -> Any:
        return self._robosuite.robots[0]

    def _task_index(self, task: int | str) -> int:
        if isinstance(task, str) and task.isdecimal():
            task = int(task)
        if isinstance(task, str):
            if task not in self.tasks:
                raise ConfigError(f"task: {task!r} is unknown in {self.family}. {nearest(task, self.tasks)}")
            return self.tasks.index(task)
        if not 0 <= task < len(self.tasks):
            raise ConfigError(
                explain("task", f"0 to {len(self.tasks) - 1} or a name", task, nearest(str(task), self.tasks))
            )
        return int(task)

    def _use_task(self, task: int) -> None:
        if self._robosuite is not None and task == self._task:
            return
        self.close()
        self._task = task
        with _numpy_seeded(0):  # some scenes draw sizes while they are built
            self._robosuite = self._build(task)
        self._built_poses = self._model.body_pos.copy(), self._model.body_quat.copy()
        if self._fast_render:
            thin_visual_meshes(self._model)

    def _reset_scene(self, seed: int) -> None:
        """robosuite's reset from a state that nothing before has touched, twice when it moves fixtures: it places what
        stands on or in a fixture by where that fixture was before the reset, and moves the fixture afterwards."""
        self._model.body_pos[:], self._model.body_quat[:] = self._built_poses
        self._draw_scene(seed)
        if not np.array_equal(self._model.body_pos, self._built_poses[0]):
            self._draw_scene(seed)
        # State is read from the simulator below; robosuite would update a dozen sensors at each of its 25 substeps.
        for observable in self._robosuite._observables.values():
            observable.set_enabled(False)

    def _draw_scene(self, seed: int) -> None:
        from robosuite.utils.errors import RandomizationError

        with _numpy_seeded(seed):
            for _ in range(20):
                try:
                    self._robosuite.reset()
                    return
                except RandomizationError:
                    continue
        raise SimulationError(
            f"{self.family}/{self.task}: no free places for all objects in 20 draws. Use another seed."
        )

    @property
    def _model(self) -> mujoco.MjModel:
        return self._robosuite.sim.model._model

    @property
    def _data(self) -> mujoco.MjData:
        return self._robosuite.sim.data._data

    def _observe(self) -> Observation:
        if self._images is not None:
            self._images.expire()
        self._images = LazyImages(self.embodiment.camera_names, self._render)
        return Observation(self._images, self._state(), self.instruction, self._stamp_ns())

    def _info(self) -> dict[str, Any]:
        return {"success": self._success, "stamp_ns": self._stamp_ns(), "task": self.task, "family": self.family}

    def _stamp_ns(self) -> int:
        return round((self._steps or 0) * NS_PER_S / self.embodiment.rate_hz)

    def _state(self) -> np.ndarray:
        """float32[8]: position (m), axis-angle (rad) of the hand in the world, finger positions (m)."""
        data, robot = self._robosuite.sim.data, self._robot
        return np.concatenate(
            [
                data.site_xpos[robot.eef_site_id],
                axis_angle(data.get_body_xquat(robot.robot_model.eef_name)),
                data.qpos[robot._ref_gripper_joint_pos_indexes],
            ]
        ).astype(np.float32)

    def _render(self, camera: str) -> np.ndarray:
        """uint8[H, W, 3]."""
        if self._renderer is None:
            if self._fast_render:
                self._model.vis.quality.offsamples = 0
            self._renderer = OffscreenRenderer(
                self._model,
                self._image_size,
                self._image_size,
                full=True,
                hidden_groups=(COLLISION_GROUP,),
                max_geoms=2000,
            )
        return np.ascontiguousarray(self._renderer.render(self._data, CAMERA_NAMES[camera])[:, ::-1])

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _unreset(what: str) -> str:
    return explain(what, "an environment that was reset", "no reset yet", "Call reset(seed=...) first.")


def axis_angle(quaternion_wxyz: np.ndarray) -> np.ndarray:
    """float64[3], angle in [0, 2 pi): robosuite's convention, which does not choose the shorter way round.

    The hand points down, near half a turn: the shorter way would jump between +pi and -pi from frame to frame.
    """
    w, vector = float(np.clip(quaternion_wxyz[0], -1.0, 1.0)), np.asarray(quaternion_wxyz[1:], np.float64)
    length = np.sqrt(1.0 - w * w)
    return np.zeros(3) if length < 1e-8 else vector * (2.0 * np.arccos(w) / length)


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """numpy's global generator seeded inside, and as it was before outside: robosuite knows no other generator."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
