"""One demonstration: a scripted expert drives an environment through the control loop and is recorded.

Recorded at every step: the images and the proprioceptive state, the expert's action for what it sees now, and whether
something else was executed. Perturbing what is executed while recording what the expert would do (DART, Laskey et al.
2017, section 4) shows the policy how to come back from its own mistakes; here the perturbation comes in short bursts of
constant direction, so that nearly all labels of an action chunk stay what the expert did do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.control import Expert
from vla.data.lerobot import IMAGE_PREFIX
from vla.embodiment import Embodiment
from vla.policy import InferContext, InferResult
from vla.runtime.loop import control_loop, run_episode
from vla.runtime.scheduler import SequentialScheduler
from vla.types import ActionChunk, Command, ControlMode, Observation


@dataclass(frozen=True)
class Noise:
    """Bursts of perturbation.

    fraction: share of the episodes that have any. level_min, level_max: range of an episode's strength, 1 moving the
    tool by about `translation_m` per step (`normalised` for actions in [-1, 1]). gap_steps: mean number of steps from
    burst to burst. length_min, length_max: steps of a burst. Rotation and gripper are not perturbed.
    """

    fraction: float = 0.8
    level_min: float = 0.3
    level_max: float = 1.0
    translation_m: float = 0.010
    normalised: float = 0.3
    gap_steps: float = 20.0
    length_min: int = 2
    length_max: int = 5


class Perturbation:
    """Bursts of one episode: `apply` per step. Everything follows from the seed."""

    def __init__(self, noise: Noise, embodiment: Embodiment, seed: int):
        self._rng = np.random.default_rng([seed, 0xDA27])
        self._noise = noise
        active = self._rng.random() < noise.fraction
        self.level = float(self._rng.uniform(noise.level_min, noise.level_max)) if active else 0.0
        self._scale = np.array(
            [
                0.0 if name not in ("dx", "dy", "dz") else noise.translation_m if unit == "m" else noise.normalised
                for name, unit in zip(embodiment.action_names, embodiment.action_units)
            ]
        )
        self._limit_m = embodiment.max_tool_speed_m_s * embodiment.period_s
        self._metres = np.array([unit == "m" for unit in embodiment.action_units])
        self._normalised = embodiment.control_mode is ControlMode.OSC_DELTA
        self._left = 0
        self._push = np.zeros(embodiment.action_dim)

    def apply(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """float[A] -> (what is executed, whether it differs)."""
        if self.level == 0.0:
            return action, False
        if self._left == 0:
            if self._rng.random() >= 1.0 / self._noise.gap_steps:
                return action, False
            self._left = int(self._rng.integers(self._noise.length_min, self._noise.length_max + 1))
            self._push = self.level * self._scale * self._rng.standard_normal(len(self._scale))
        self._left -= 1
        pushed = action + self._push
        if self._normalised:
            return np.clip(pushed, -1.0, 1.0), True
        length = float(np.linalg.norm(pushed[self._metres]))
        if length > self._limit_m:
            pushed[self._metres] *= self._limit_m / length
        return pushed, True


class Teacher:
    """An expert as a policy that says one thing and does another: `said` is recorded, the chunk is executed."""

    def __init__(self, expert: Expert, embodiment: Embodiment, noise: Noise):
        self.embodiment, self.horizon = embodiment, 1
        self._expert, self._noise = expert, noise

    def reset(self, seed: int) -> None:
        self._expert.reset()
        self.perturbation = Perturbation(self._noise, self.embodiment, seed)

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        self.said = np.asarray(self._expert.action(), np.float32)
        executed, self.differs = self.perturbation.apply(self.said)
        chunk = ActionChunk(np.asarray(executed, np.float32)[None], contexts[0].start_ns, self.embodiment.period_s)
        return [InferResult(chunk)]


def run_expert(
    environment: Any,
    expert: Expert,
    seed: int,
    task: str,
    noise: Noise,
    render: bool = True,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """One episode through the control loop; None when the expert fails.

    Returns (arrays [T, ...] per feature, facts about the episode). Without `render` there are no images. options: of
    the environment's reset.
    """
    embodiment: Embodiment = environment.embodiment
    teacher = Teacher(expert, embodiment, noise)
    cameras = embodiment.camera_names if render else ()
    rows: dict[str, list[np.ndarray]] = {f"{IMAGE_PREFIX}{name}": [] for name in cameras}
    rows |= {"observation.state": [], "action": [], "perturbed": []}

    def record(observation: Observation, command: Command, info: Mapping[str, Any]) -> None:
        for name in cameras:
            rows[f"{IMAGE_PREFIX}{name}"].append(np.array(observation.images[name]))
        rows["observation.state"].append(np.array(observation.state, np.float32))
        rows["action"].append(teacher.said)
        rows["perturbed"].append(np.array([teacher.differs]))

    loop = control_loop(embodiment, SequentialScheduler(execute=1))
    result = run_episode(environment, teacher, loop, seed, task=task, on_step=record, options=options)
    if not result.success:
        return None
    facts = {
        "seed": seed,
        "task": task,
        "family": result.family,
        "instruction": result.instruction,
        "steps": result.steps,
        "noise_level": teacher.perturbation.level,
        "options": dict(options or {}),
    }
    return {key: np.stack(values) for key, values in rows.items()}, facts
