"""The tabletop as an environment of the contract in sim/environment.py.

`step` runs one control period. `advance` and `observe` are the same thing in slices, for the simulator node, which
runs on wall time. A command's set-points are approached linearly over one control period, as robot controllers do, so
that the same physics comes out at every rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np

from sim.environment import LazyImages
from sim.tabletop import tasks
from sim.tabletop.rendering import OffscreenRenderer
from sim.tabletop.scene import TIMESTEP_NS, TIMESTEP_S, Scene
from vla.errors import ConfigError, SimulationError, explain, nearest
from vla.resources import load_embodiment, robot_model
from vla.runtime.kinematics import Kinematics
from vla.types import NS_PER_S, Command, Observation, check_instruction

MAX_EPISODE_S = 8.0
# How long a carried object must rest in place, let go, before it counts.
REST_S = 0.2
# Below this an object counts as not moved.
_MOVED_M = 0.015
_HOME_JITTER_M = np.array([0.03, 0.05, 0.02])


class TabletopEnvironment(gymnasium.Env):
    """Seven-joint arm over coloured objects.

    task: one family of `tasks.FAMILIES`, or "all" to draw one of `families` per seed. rate_hz: another control rate
    than the embodiment's (token benchmarks run the expert at several). Raises ConfigError for an unknown task.

    reset options: {"task": name}; {"swap": True} asks for another object in the very same scene;
    {"goal": "red cube"} asks for that object; {"instruction": text} replaces the words and nothing else.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (gymnasium's own name and form)

    def __init__(
        self, task: str = "all", families: Sequence[str] = tasks.FAMILIES, rate_hz: float | None = None, **_: Any
    ):
        embodiment = load_embodiment("tabletop")
        self.embodiment = embodiment if rate_hz is None else replace(embodiment, rate_hz=float(rate_hz))
        for family in families:
            self._check_task(family)
        self._check_task(task)
        self.families, self._task = tuple(families), task
        self.kinematics = Kinematics(self.embodiment)
        self.scene = Scene(robot_model(self.embodiment), tuple(joint.name for joint in self.embodiment.joints))
        self.max_steps = round(MAX_EPISODE_S * self.embodiment.rate_hz)
        self._lower = np.array([joint.lower for joint in self.embodiment.joints])
        self._upper = np.array([joint.upper for joint in self.embodiment.joints])
        self.action_space = gymnasium.spaces.Box(self._lower, self._upper, dtype=np.float64)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict(
                    {
                        camera.name: gymnasium.spaces.Box(0, 255, (camera.height, camera.width, 3), np.uint8)
                        for camera in self.embodiment.cameras
                    }
                ),
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (self.embodiment.state_dim,), np.float32),
            }
        )
        self._renderer: OffscreenRenderer | None = None
        self._images: LazyImages | None = None
        self._seeds = np.random.default_rng()
        self.layout: tasks.Layout | None = None
        self._instruction = ""

    # ---- contract ----
    @property
    def tasks(self) -> tuple[str, ...]:
        return (*tasks.FAMILIES, "all")

    @property
    def instruction(self) -> str:
        return self._instruction

    @property
    def commanded(self) -> np.ndarray:
        """float64[D], joint positions of the newest command (the start pose before the first)."""
        self._require_reset()
        return self._target.copy()

    @property
    def stamp_ns(self) -> int:
        """Simulated time since the reset."""
        return self._physics_steps * TIMESTEP_NS

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        options = dict(options or {})
        task = options.pop("task", self._task)
        self._check_task(task)
        swap, wanted, text = options.pop("swap", False), options.pop("goal", None), options.pop("instruction", None)
        for key in options:
            raise ConfigError(
                f"reset options: unknown key {key!r}. {nearest(key, ('task', 'swap', 'goal', 'instruction'))}"
            )
        super().reset(seed=seed)
        rng = np.random.default_rng(int(self._seeds.integers(2**62)) if seed is None else seed)
        family = task if task != "all" else self.families[int(rng.integers(len(self.families)))]
        layout = tasks.sample(family, rng)
        goal = layout.swapped() if swap else layout.goals[0]
        if wanted is not None:
            goal = layout.goal_for(wanted)
        instruction = check_instruction(text) if text is not None else layout.instruction(goal)
        # All at once: a reset that is refused leaves the scene as it was.
        self.layout, self.goal, self._instruction = layout, goal, instruction
        home = np.array(self.embodiment.home)
        start = self.kinematics.forward(home)[0] + rng.uniform(-_HOME_JITTER_M, _HOME_JITTER_M)
        self._target = self.kinematics.locate(start, home)
        self._ramp_from, self._ramp_done = self._target.copy(), 0
        self._physics_steps, self._clock_ns, self._success_since = 0, 0, -1
        self.scene.arrange(self.layout.movable, self.layout.plates, self._target)
        return self.observe(), self.info()

    def step(self, command: Command) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self.advance(command, self.embodiment.period_s)
        info = self.info()
        truncated = self.stamp_ns >= round(MAX_EPISODE_S * NS_PER_S) and not info["success"]
        return self.observe(), float(info["success"]), bool(info["success"]), truncated, info

    def joint_state(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        self._require_reset()
        return self.embodiment.command_names, self.scene.joint_positions(), self.scene.joint_velocities()

    def close(self) -> None:
        if self._images is not None:
            self._images.expire()
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # ---- in slices, for the simulator node ----
    def advance(self, command: Command | None, seconds: float) -> None:
        """Simulate `seconds` with `command` as the newest one (None: none came, the last one stands)."""
        self._require_reset()
        if command is not None:
            self._accept(command)
        if self._images is not None:
            self._images.expire()
        self._clock_ns += round(seconds * NS_PER_S)
        steps = round(self._clock_ns / TIMESTEP_NS) - self._physics_steps
        ramp = max(1, round(self.embodiment.period_s / TIMESTEP_S))
        share = np.minimum(1.0, (self._ramp_done + 1 + np.arange(steps)) / ramp)[:, None]
        self.scene.advance(self._ramp_from + share * (self._target - self._ramp_from), steps)
        self._ramp_done += steps
        self._physics_steps += steps
        if not tasks.achieved(self.scene, self.goal):
            self._success_since = -1
        elif self._success_since < 0:
            self._success_since = self.stamp_ns

    def observe(self) -> Observation:
        """Sensors now. Images render on first access and only until the next advance."""
        self._require_reset()
        if self._images is not None:
            self._images.expire()
        self._images = LazyImages(self.embodiment.camera_names, self._render)
        state = self.kinematics.state(self.scene.joint_positions())
        return Observation(self._images, state, self._instruction, self.stamp_ns)

    def info(self) -> dict[str, Any]:
        """success, stamp_ns, task, family; object: what the goal moves; moved: what was displaced most, or None."""
        assert self.layout is not None
        needed_ns = 0 if self.goal.family == "push" else round(REST_S * NS_PER_S)
        shifts = [float(np.linalg.norm(tasks.displacement(self.scene, i))) for i in range(len(self.layout.movable))]
        most = int(np.argmax(shifts))
        return {
            "success": self._success_since >= 0 and self.stamp_ns - self._success_since >= needed_ns,
            "stamp_ns": self.stamp_ns,
            "task": self.goal.family,
            "family": self.goal.family,
            "object": self.layout.movable[self.goal.object].name,
            "moved": self.layout.movable[most].name if shifts[most] > _MOVED_M else None,
        }

    # ---- helpers ----
    def _accept(self, command: Command) -> None:
        values = np.asarray(command.values, np.float64)
        if command.mode is not self.embodiment.control_mode or values.shape != self._target.shape:
            raise SimulationError(
                explain(
                    "command",
                    f"{self.embodiment.control_mode.value} with {len(self._target)} values",
                    f"{command.mode.value} with shape {values.shape}",
                    "Build it with the tabletop embodiment.",
                )
            )
        if not np.all(np.isfinite(values)):
            raise SimulationError(explain("command", "finite values", "NaN or infinity", "Send it through the gate."))
        values = np.clip(values, self._lower, self._upper)
        if not np.array_equal(values, self._target):
            ramp = max(1, round(self.embodiment.period_s / TIMESTEP_S))
            share = min(1.0, self._ramp_done / ramp)
            self._ramp_from = self._ramp_from + share * (self._target - self._ramp_from)
            self._target, self._ramp_done = values, 0

    def _render(self, camera: str) -> np.ndarray:
        if self._renderer is None:
            first = self.embodiment.cameras[0]
            self._renderer = OffscreenRenderer(self.scene.model, first.width, first.height)
        return self._renderer.render(self.scene.data, camera)

    def _check_task(self, task: str) -> None:
        if task not in (*tasks.FAMILIES, "all"):
            raise ConfigError(f"task: unknown tabletop task {task!r}. {nearest(task, (*tasks.FAMILIES, 'all'))}")

    def _require_reset(self) -> None:
        if self.layout is None:
            raise SimulationError(explain("environment", "reset() first", "no episode", "Call reset(seed=...)."))
