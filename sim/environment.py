"""The one contract of every simulated arm: a gymnasium interface whose step takes a Command.

    env = make("tabletop", task="pick_place")
    observation, info = env.reset(seed=7)
    observation, reward, terminated, truncated, info = env.step(command)

`info` has: success (bool), stamp_ns (simulated time, monotonic within an episode), task (str), family (str).
Rendering is lazy: `observation.images[camera]` renders on first access, and only while the observation is current.
Episodes repeat bit for bit under the same (task, seed), fixtures included. A fresh seed may choose the instruction,
object poses, colours and distractors of the task family.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import gymnasium
import numpy as np

from vla.embodiment import Embodiment
from vla.errors import ConfigError, SimulationError, nearest
from vla.types import Command, Observation

# Seeds below this bound are for collecting demonstrations, seeds from it on for evaluation: never the same scene.
EVAL_SEED_START = 1_000_000


class Environment(Protocol):
    """What collect, evaluation and the simulator node rely on (a gymnasium.Env with these members)."""

    embodiment: Embodiment
    action_space: gymnasium.Space  # values of a Command
    observation_space: gymnasium.Space
    max_steps: int  # truncation

    @property
    def instruction(self) -> str:
        """What the arm is asked to do in this episode."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names that reset takes as `options["task"]`."""
        ...

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """options: {"task": name}; instruction override is {"instruction": text}."""
        ...

    def step(self, command: Command) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute one control period: (observation, reward, terminated, truncated, info).

        Raises SimulationError for a command of another mode or length or with NaN, and before the first reset.
        """
        ...

    def joint_state(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Names, positions float64[D], velocities float64[D] of the commanded joints: what /joint_states carries."""
        ...

    def close(self) -> None:
        """Free the renderer; may be called twice."""
        ...


class LazyImages(Mapping[str, np.ndarray]):
    """{camera: uint8[H, W, 3]} that renders on first access and remembers.

    The environment calls `expire()` before the next step.
    """

    def __init__(self, names: tuple[str, ...], render: Callable[[str], np.ndarray]):
        self._names, self._render = names, render
        self._done: dict[str, np.ndarray] = {}
        self._current = True

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(f"camera {name!r}. {nearest(name, self._names)}")
        if name not in self._done:
            if not self._current:
                raise SimulationError(
                    f"camera {name!r}: this observation is from an earlier step and was not rendered then. "
                    "Read the images before the next step()."
                )
            self._done[name] = self._render(name)
        return self._done[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def expire(self) -> None:
        """The simulation moved on: what was not rendered by now cannot be rendered any more."""
        self._current = False


# name -> "module:constructor"; imported on use, so that an extra that is not installed costs nothing.
ENVIRONMENTS = {
    "tabletop": "sim.tabletop.environment:TabletopEnvironment",
    "libero_spatial": "sim.libero.environment:LiberoEnvironment",
    "libero_object": "sim.libero.environment:LiberoEnvironment",
    "libero_goal": "sim.libero.environment:LiberoEnvironment",
    "libero_10": "sim.libero.environment:LiberoEnvironment",
    "robosuite": "sim.robosuite_adapter:RobosuiteEnvironment",
}


def check_name(name: str) -> None:
    """ConfigError for what is no environment, with the nearest name that is."""
    if name not in ENVIRONMENTS:
        raise ConfigError(f"env: unknown environment {name!r}. {nearest(name, ENVIRONMENTS)}")


def make(name: str, **options: Any) -> Any:
    """Construct an environment by name."""
    check_name(name)
    module, _, attribute = ENVIRONMENTS[name].partition(":")
    constructor = getattr(importlib.import_module(module), attribute)
    return constructor(suite=name, **options) if name.startswith("libero_") else constructor(**options)
